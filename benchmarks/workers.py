"""`--workers auto` beside a sweep over numbers of workers: samples/s of whole runs, and how long deciding took.

usage: python benchmarks/workers.py [--kinds fast,slow,io]

fast: samples that cost microseconds; slow: 3 ms of computing each; io: 10 ms of waiting each. The model is tiny, so
reading bounds the run. Rates are of the last two thirds of a run's steps.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stoker

BATCH = 32
SWEEP = (0, 1, 2, 4, 8, 16, 32)


def compute(seconds: float) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


COSTS: dict[str, Callable[[], None]] = {
    "fast": lambda: None,
    "slow": lambda: compute(0.003),
    "io": lambda: time.sleep(0.01),
}


class Samples(torch.utils.data.Dataset[Any]):
    def __init__(self, kind: str) -> None:
        self.cost = COSTS[kind]

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        self.cost()
        return torch.full((3, 32, 32), float(i % 7)), i % 10


def recipe(kind: str) -> stoker.Recipe:
    return stoker.Recipe(
        model=lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 15 * 15, 10)
        ),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
        train=stoker.Loader(Samples(kind), BATCH, shuffle=True),
    )


def rate(kind: str, workers: int | str) -> tuple[float, float, Any]:
    """Samples/s; seconds to the first step; the number of workers there were."""
    steps = 1200 if kind == "fast" else 60 + 8 * (32 if workers == "auto" else int(workers))
    with tempfile.TemporaryDirectory() as folder:
        ends: list[float] = []
        began = time.perf_counter()
        stoker.fit(
            recipe(kind),
            steps=steps,
            out=Path(folder, "run"),
            quiet=True,
            workers=workers,
            log_every=10**6,
            on_step=[lambda progress, metrics: ends.append(time.perf_counter())],
        )
        chosen = json.loads(Path(folder, "run/run.json").read_text())["plan"]["workers"]
    first = len(ends) // 3
    return BATCH * (len(ends) - 1 - first) / (ends[-1] - ends[first]), ends[0] - began, chosen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", default="fast,slow,io")
    kinds = parser.parse_args().kinds.split(",")
    print("| data | " + " | ".join(map(str, SWEEP)) + " | auto | of the best | first step after |")
    print("|---" * (len(SWEEP) + 4) + "|")
    for kind in kinds:
        rates = [rate(kind, workers)[0] for workers in SWEEP]
        auto, first_s, chosen = rate(kind, "auto")
        cells = " | ".join(f"{r:,.0f}" for r in rates)
        print(f"| {kind} | {cells} | {auto:,.0f} ({chosen}) | {auto / max(rates):.0%} | {first_s:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
