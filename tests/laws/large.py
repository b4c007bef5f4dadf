"""A model of some 8 MB, 32 MB with optimizer and average, whose steps are cheap and change a part of everything."""

from typing import Any

import torch
from torch import nn

import stoker


class Large(nn.Module):
    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(numbers))
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(self.norm(x)) + self.table[:2]


def recipe(numbers: int = 2_000_000, batches: int = 10, sleep_s: float = 0.0):
    import time

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * batches, 3, generator=generator)

    def step(model: nn.Module, batch: Any, carry: Any) -> dict[str, Any]:
        x, y = batch
        time.sleep(sleep_s)
        seen = carry["seen"] if carry is not None else torch.zeros(3)
        loss = nn.functional.cross_entropy(model(x), y)
        return {"loss": loss, "carry": {"seen": torch.cat([seen, x[:, 0]])}}

    return stoker.Recipe(
        model=lambda: Large(numbers),
        step=step,
        optimizer=lambda p: torch.optim.Adam(p, 0.01),
        train=stoker.Loader((x, torch.arange(len(x)) % 2), 8, shuffle=True),
        ema=0.9,
    )
