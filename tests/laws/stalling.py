"""Data that stall while a file is there: map-style and streams, plain, with a state, in shards; and steps that do."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import stoker

ROWS = 24


def stall(flag: str) -> None:
    """Wait for a minute, saying so, while the file is there."""
    if flag and os.path.exists(flag):
        Path(f"{flag}.hit").touch()
        time.sleep(60)


class Rows(Dataset):
    def __init__(self, flag: str, at: int) -> None:
        self.flag, self.at = flag, at
        self.x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index >= self.at:
            stall(self.flag)
        return self.x[index] + torch.randn(3), torch.tensor(index % 2)


class Stream(IterableDataset):
    """Stalls at sample `at` of epoch `epoch`."""

    num_shards = 4

    def __init__(self, flag: str, at: int, epoch: int, part: tuple[int, int] = (1, 0)) -> None:
        self.flag, self.at, self.stalling, self.part, self.epoch = flag, at, epoch, part, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def shard(self, num_shards: int, index: int) -> "Stream":
        return Stream(self.flag, self.at, self.stalling, (num_shards, index))

    def sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index >= self.at and self.epoch == self.stalling:
            stall(self.flag)
        return torch.full((3,), float(index)), torch.tensor(index % 2)  # the same in every epoch

    def __iter__(self) -> Any:
        yield from (self.sample(i) for i in range(self.part[1], ROWS, self.part[0]))


class Stateful(Stream):
    position = 0

    def __iter__(self) -> Any:
        while self.position < ROWS:
            found = self.sample(self.position)
            self.position += 1
            yield found
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def recipe(kind: str = "rows", flag: str = "", at: int = ROWS, epoch: int = 1, slow: str = ""):
    """`slow`: "compile" compiles for a minute, "c" computes in C for a while, once, in the fifth step."""
    data = {
        "rows": lambda: Rows(flag, at),
        "val": lambda: Rows("", at),
        "stream": lambda: Stream(flag, at, epoch),
        "state": lambda: Stateful(flag, at, epoch),
        "shards": lambda: Stream(flag, at, epoch),
    }[kind]()
    steps = iter(range(10**6))

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        if slow == "c" and next(steps) == 4 and not Path(f"{flag}.hit").exists():
            Path(f"{flag}.hit").touch()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)  # lets other threads run, but no signal handler
            Path(f"{flag}.done").touch()
        return nn.functional.cross_entropy(model(x), y)

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        return torch.compile(model, backend=compiler) if slow == "compile" else model

    def compiler(graph: Any, examples: Any) -> Any:
        stall(flag)
        return graph.forward

    return stoker.Recipe(
        model=build,
        step=step,
        optimizer=lambda p: torch.optim.Adam(p, 0.01),
        train=stoker.Loader(data, 4, **({"lanes": 2} if kind == "shards" else {})),
        val=stoker.Loader(Rows(flag if kind == "val" else "", 5), 4),
    )
