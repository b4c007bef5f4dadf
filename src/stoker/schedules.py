"""Learning-rate schedules with warm-up, as functions of the step: nothing to restore but the step."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

Schedule = Callable[[torch.optim.Optimizer, int], LambdaLR]


def _warmed(shape: Callable[[float], float], warmup_steps: int, final: float) -> Schedule:
    def schedule(optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            span = max(total_steps - warmup_steps, 1)
            return final + (1 - final) * shape(min((step - warmup_steps) / span, 1.0))

        return LambdaLR(optimizer, factor)

    return schedule


def cosine(warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Rise linearly over `warmup_steps`, then fall along half a cosine to `final` times the rate at the run's end.

    Source: Loshchilov & Hutter, "SGDR", 2017 (one cycle).
    """
    return _warmed(lambda t: 0.5 * (1 + math.cos(math.pi * t)), warmup_steps, final)


def linear(warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Rise linearly over `warmup_steps`, then fall linearly to `final` times the rate at the run's end."""
    return _warmed(lambda t: 1 - t, warmup_steps, final)


def constant(warmup_steps: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """Rise linearly over `warmup_steps`, then stay."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: min((step + 1) / (warmup_steps + 1), 1.0))
