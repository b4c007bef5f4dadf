"""Samples per second of stoker's loader and of a hand-tuned torch DataLoader, side by side in one process.

usage: python benchmarks/loading.py [--rounds 5]    photos: flowers700 in $STOKER_TEST_DATA (default ../shared/data)

Both read the same data sets through the same transforms; rounds alternate between them, and the figure is the median of
the rounds' ratios. The DataLoader has as many workers, persistent, prefetching 4 batches each.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

import stoker

DATA = Path(os.environ.get("STOKER_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
BATCH = 32


def augmented() -> Dataset[Any]:
    steps = [
        v2.Resize(256, antialias=True),
        v2.RandomResizedCrop(224, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
    ]
    return stoker.data.images(DATA / "flowers700/train", v2.Compose(steps))


def torch_batches(dataset: Dataset[Any], workers: int) -> Callable[[], Iterator[Any]]:
    options = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, **options)
    return lambda: iter(loader)


def stoker_batches(dataset: Any, workers: int, **options: Any) -> Callable[[], Iterator[Any]]:
    feed = stoker.Loader(dataset, BATCH, shuffle=True, **options).feed(seed=0, workers=workers)
    epochs = iter(range(10**9))
    return lambda: (batch for batch, _ in feed.epoch(next(epochs)))


def rate(batches: Callable[[], Iterator[Any]], epochs: int) -> float:
    """Samples a second over whole epochs, the gaps between them included."""
    samples, began = 0, time.perf_counter()
    for _ in range(epochs):
        for batch in batches():
            samples += len(batch[0])
    return samples / (time.perf_counter() - began)


def gap(batches: Callable[[], Iterator[Any]], step_s: float) -> float:
    """Wait for the first batch of an epoch after the last of another, in steps of `step_s`."""
    for _ in batches():
        time.sleep(step_s)
    began = time.perf_counter()
    for _ in batches():
        return (time.perf_counter() - began) / step_s
    raise AssertionError


def compare(
    name: str, ours: Callable[[], Iterator[Any]], theirs: Callable[[], Iterator[Any]], epochs: int, n: int
) -> None:
    rate(ours, 1), rate(theirs, 1)  # workers start, files come into the cache
    rounds = [(rate(ours, epochs), rate(theirs, epochs)) for _ in range(n)]
    ratios = [a / b for a, b in rounds]
    quartiles = statistics.quantiles(ratios, n=4) if n > 1 else [ratios[0]] * 3
    a, b = (statistics.median(side) for side in zip(*rounds, strict=True))
    print(f"| {name} | {a:,.0f} | {b:,.0f} | {statistics.median(ratios):.2f} ({quartiles[0]:.2f}-{quartiles[2]:.2f}) |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    workers = len(os.sched_getaffinity(0))
    photos, images = augmented(), torch.randn(60_000, 1, 28, 28)
    memory = TensorDataset(images, torch.arange(60_000) % 10)
    print(f"torch {torch.__version__}, {workers} cores, {rounds} rounds, samples/s, batch {BATCH}\n")
    print("| data | stoker | DataLoader | ratio (quartiles) |\n|---|---|---|---|")
    compare("JPEG, 0 workers", stoker_batches(photos, 0), torch_batches(photos, 0), 1, rounds)
    compare(f"JPEG, {workers} workers", stoker_batches(photos, workers), torch_batches(photos, workers), 4, rounds)
    cached = stoker_batches(photos, workers, cache="memory")
    compare(f"JPEG, {workers} workers, cache='memory'", cached, torch_batches(photos, workers), 4, rounds)
    compare("tensors in memory", stoker_batches(memory, 0), torch_batches(memory, 0), 1, rounds)
    print("\nfirst batch of the next epoch, in steps of 20 ms:")
    for name, batches in (("stoker", stoker_batches(photos, workers)), ("DataLoader", torch_batches(photos, workers))):
        print(f"  {name}: {statistics.median(gap(batches, 0.02) for _ in range(3)):.2f}")


if __name__ == "__main__":
    main()
