"""Plan: where and how a run happens. It changes cost, not results (precision apart, which belongs to the identity)."""

from dataclasses import dataclass
from typing import Any

import torch

from stoker.data.loader import Loader
from stoker.devices.strategy import PRECISIONS, Single, Strategy, find_device
from stoker.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Device, precision and partition of a run.

    Attributes:
        device: name of the device.
        devices: number of devices.
        strategy: "single".
        precision: "fp32", "bf16" or "fp16" (autocast; fp16 with a loss scaler).
        microbatch: samples per forward pass, None for the whole batch. Gradients accumulate as sums over counts.
        workers: processes that read samples; 0 reads in this process.
        compile: whether the model's forward is compiled.
        notes: what the reader of the plan should know.
    """

    device: str
    devices: int = 1
    strategy: str = "single"
    precision: str = "fp32"
    microbatch: int | None = None
    workers: int = 0
    compile: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the terminal."""
        words = [f"{self.devices} x {self.device}", self.precision]
        words += [f"microbatch {self.microbatch}"] if self.microbatch else []
        words += [f"{self.workers} workers"] if self.workers else []
        words += ["compiled"] if self.compile else []
        return ", ".join(words)

    def open(self) -> Strategy:
        """Return the strategy that carries the plan out."""
        return Single(torch.device(self.device), self.precision, self.compile)


def make_plan(
    train: Any,
    *,
    device: str | None = None,
    devices: int = 1,
    strategy: str = "single",
    precision: str = "fp32",
    microbatch: int | None = None,
    workers: int | None = None,
    compile: bool = False,
) -> Plan:
    """Complete a plan for the data `train`.

    Raises:
        UserError: an option that this machine or this version cannot honour.
    """
    if strategy != "single" or devices != 1:
        raise UserError(
            f"strategy {strategy!r} on {devices} devices is not available",
            why="this version trains on one device",
            remedy="leave out --strategy and --devices",
        )
    if precision not in PRECISIONS:
        raise UserError(f"no precision {precision!r}", remedy=f"--precision {', '.join(PRECISIONS)}")
    if microbatch is not None and microbatch < 1:
        raise UserError(f"microbatch must be at least 1, got {microbatch}")
    if workers is not None and workers < 0:
        raise UserError(f"workers must not be negative, got {workers}")
    notes = []
    if workers and isinstance(train, Loader) and train.columns is not None:
        notes.append("workers 0: the data are tensors in memory, fetched a batch at a time")
        workers = 0
    if workers and isinstance(train, Loader) and train.iterable:
        notes.append("workers 0: an iterable dataset is read in the main process, so that its order is exact")
        workers = 0
    if compile:
        notes.append("compiled kernels agree with eager ones to rounding, not to the bit")
    return Plan(
        str(find_device(device)),
        precision=precision,
        microbatch=microbatch,
        workers=workers or 0,
        compile=compile,
        notes=tuple(notes),
    )


def partition_notes(model: torch.nn.Module, plan: Plan, batch_size: int | None) -> tuple[str, ...]:
    """What a microbatch smaller than the batch changes in this model, layer kinds named."""
    if plan.microbatch is None or batch_size is None or plan.microbatch >= batch_size:
        return ()
    kinds = {type(module).__name__ for module in model.modules() if module.training}
    norms = sorted(k for k in kinds if "BatchNorm" in k)
    drops = sorted(k for k in kinds if "Drop" in k)
    notes = []
    if norms:
        notes.append(f"{', '.join(norms)} sees {plan.microbatch} samples at a time instead of {batch_size}")
    if drops:
        notes.append(f"{', '.join(drops)} draws other masks than without --microbatch (from the same distribution)")
    return tuple(notes)
