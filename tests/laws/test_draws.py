"""Samples draw from generators keyed by (seed, epoch, index), also where they draw only now and then."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import stoker
from stoker.data.seeding import SAMPLE, fold, seed_all


class Draws(Dataset[Any]):
    """Sample i draws if `when(i)`; every read is counted."""

    def __init__(self, when: Callable[[int], bool]) -> None:
        self.when, self.reads = when, [0] * 64

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads[index] += 1
        drawn = [0.0, 0.0, 0.0]
        if self.when(index):
            drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([index, *drawn], dtype=torch.float64)


def expected(when: Callable[[int], bool], seed: int, epoch: int) -> dict[int, list[float]]:
    dataset, out = Draws(when), {}
    for index in range(64):
        seed_all(fold(seed, SAMPLE, epoch, index))
        out[index] = dataset[index].tolist()
    return out


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "when",
    [lambda i: True, lambda i: False, lambda i: i % 7 == 3, lambda i: i == 60],
    ids=["always", "never", "sometimes", "once"],
)
def test_every_sample_draws_its_own_numbers(when: Callable[[int], bool], workers: int) -> None:
    loader = stoker.Loader(Draws(when), 8, shuffle=True)
    feed = loader.feed(5, workers=workers)
    for epoch in range(3):
        rows = torch.cat([batch for batch, _ in feed.epoch(epoch)])
        assert [int(row[0]) for row in rows] == loader.indices(5, epoch)
        assert {int(row[0]): row.tolist() for row in rows} == expected(when, 5, epoch)
    feed.close()


def test_only_a_draw_after_a_batch_without_any_is_read_twice() -> None:
    for when, repeated in ((lambda i: True, 0), (lambda i: False, 0), (lambda i: i == 60, 8)):
        dataset = Draws(when)
        for _ in stoker.Loader(dataset, 8).feed(5).epoch(0):
            pass
        assert sum(dataset.reads) == 64 + repeated


def mix(samples: list[torch.Tensor]) -> torch.Tensor:
    """A collate function with a will of its own."""
    return torch.stack(samples)[torch.randperm(len(samples))] + random.random() + np.random.rand()


def test_a_collate_function_draws_anew_for_every_batch() -> None:
    epochs = []
    for workers in (0, 2, 0):
        feed = stoker.Loader(Draws(lambda i: False), 8, collate=mix).feed(5, workers=workers)
        epochs.append(torch.stack([batch for epoch in range(2) for batch, _ in feed.epoch(epoch)]))
        feed.close()
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])
    shifts = (epochs[0] - epochs[0].floor())[:, 0, 1]
    assert len(set(shifts.tolist())) == 16


def test_generators_are_left_alone(tmp_path: Path) -> None:
    def numbers() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    data = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.int64)
    recipe = stoker.Recipe(
        model=lambda: torch.nn.Linear(2, 2),
        loss=torch.nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=stoker.Loader(data, 4, shuffle=True),
    )
    fit = stoker.fit  # importing rich draws from `random`
    seed_all(11)
    before = numbers()
    seed_all(11)
    fit(recipe, epochs=1, out=tmp_path / "run", quiet=True)
    assert numbers() == before
