"""Batches: every sample once over any number of ranks, alike in length, fair to classes, from anywhere in O(window)."""

import math
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

from stoker.data.batching import Bucketed, Sharded, balanced
from stoker.data.order import (
    Among,
    Batches,
    Chunked,
    Sequential,
    Shuffled,
    batches_of_sampler,
    order_of_sampler,
    weighted,
)
from stoker.errors import UserError

N = 103
LENGTHS = np.random.default_rng(0).integers(1, 40, N)


class Backwards(Sampler[int]):
    """A user's own, which draws as well."""

    def __iter__(self) -> Any:
        first = torch.randperm(N)[0].item()
        yield from ((first - i) % N for i in range(N))


def everything(batches: Batches, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in batches.take(seed, epoch, 0, batches.count(seed, epoch))]


def flat(batches: Any) -> list[int]:
    return list(chain.from_iterable(batches))


ONCE: dict[str, Batches] = {
    "sequential": Chunked(Sequential(N), 10, False),
    "shuffled": Chunked(Shuffled(N, N), 10, False),
    "small batches": Chunked(Shuffled(N, N), 3, False),
    "subset": Chunked(Among(np.arange(0, N), Shuffled(N, N)), 7, False),
    "torch's subset": Chunked(order_of_sampler(SubsetRandomSampler(range(N)), N), 7, False),
    "without replacement": Chunked(weighted(np.arange(1, N + 1), N, replacement=False), 10, False),
    "own sampler": Chunked(order_of_sampler(Backwards(), N), 10, False),
    "own batch sampler": batches_of_sampler(BatchSampler(Backwards(), 8, drop_last=False)),
    "torch's batch sampler": batches_of_sampler(BatchSampler(RandomSampler(range(N)), 8, drop_last=False)),
    "bucketed": Bucketed(LENGTHS, 10, True, False, window_batches=3),
    "bucketed, in order": Bucketed(LENGTHS, 10, False, False, window_batches=3),
    "bucketed, one window": Bucketed(LENGTHS.tolist(), 10, True, False),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("batches", ONCE.values(), ids=list(ONCE))
def test_every_sample_once_over_the_ranks(batches: Batches, ranks: int) -> None:
    for epoch in range(2):
        whole = everything(batches, 5, epoch)
        shards = [everything(Sharded(batches, rank, ranks), 5, epoch) for rank in range(ranks)]
        assert [flat(parts) for parts in zip(*shards, strict=True)] == whole
        assert sorted(flat(whole)) == list(range(N))
        for parts in zip(*shards, strict=True):
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


DRAWN: dict[str, Any] = {
    "weighted": (weighted(np.arange(1, 9), 40_000, replacement=True), np.arange(1, 9) / 36),
    "torch's weighted": (order_of_sampler(WeightedRandomSampler([1.0, 2.0, 5.0], 20_000), 3), [1 / 8, 2 / 8, 5 / 8]),
    "replacement": (order_of_sampler(RandomSampler(range(6), replacement=True, num_samples=20_000), 6), [1 / 6] * 6),
}


def assert_chi_square(counts: Any, probabilities: Any) -> None:
    """Pearson's statistic below its 1 - 1e-4 quantile (Wilson & Hilferty, 1931)."""
    expected = sum(counts) * np.asarray(probabilities)
    statistic = float(((np.asarray(counts) - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    spread = math.sqrt(2 / (9 * freedom))
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * spread) ** 3, (counts, expected)


@pytest.mark.parametrize(("order", "probabilities"), DRAWN.values(), ids=list(DRAWN))
def test_drawn_frequencies_on_four_ranks(order: Any, probabilities: Any) -> None:
    batches = Chunked(order, 64, False)
    for rank in range(4):
        drawn = flat(everything(Sharded(batches, rank, 4)))
        assert abs(len(drawn) - order.length(0, 0) / 4) <= batches.count(0, 0)
        assert_chi_square(np.bincount(drawn, minlength=len(probabilities)), probabilities)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, "strings", "mixed"])
def test_balanced_classes_on_four_ranks(kind: Any) -> None:
    numbers = [0] * 900 + [1] * 90 + [5] * 9 + [-1]
    labels: Any = numbers
    if kind == "strings":
        labels = [f"class {number}" for number in numbers]
    elif kind == "mixed":
        labels = [number if number else "none" for number in numbers]
    elif kind is not list:
        labels = kind(numbers)
    batches = Chunked(balanced(labels, 20_000), 50, False)
    everywhere: Counter[int] = Counter()
    for rank in range(4):
        drawn = flat(everything(Sharded(batches, rank, 4), 3))
        classes = Counter(numbers[i] for i in drawn)
        assert_chi_square([classes[c] for c in (0, 1, 5, -1)], [0.25] * 4)
        everywhere.update(drawn)
    assert sum(everywhere.values()) == 20_000
    assert_chi_square([everywhere[i] for i in range(990, 999)], [1 / 9] * 9)
    assert balanced(labels).length(0, 0) == 1000


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([], "one class per sample, got shape (0,)"),
        (torch.eye(3), "got shape (3, 3)"),
        ([1, None, 2], "label 1 is None"),
        ([0.5, 1.5], "label 0 is 0.5"),
        (np.array([1.0, np.nan]), "which is no class"),
    ],
)
def test_labels_that_are_none(labels: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        balanced(labels)
    assert text in caught.value.what and caught.value.remedy
    with pytest.raises(UserError, match="num_samples must be"):
        balanced([1, 2], 0)
    assert balanced([torch.tensor(1), torch.tensor(1), np.int64(2)]).weights.tolist() == [0.5, 0.5, 1.0]  # type: ignore[attr-defined]


# ------------------------------------------------------------------ buckets


@settings(max_examples=80)
@given(
    st.lists(st.integers(0, 30), max_size=80),
    st.integers(1, 12),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_buckets(lengths: list[int], size: int, window: int, shuffle: bool, drop: bool, seed: int) -> None:
    n = len(lengths)
    plan = Bucketed(lengths, size, shuffle, drop, window)
    whole = everything(plan, seed, 1)
    assert len(whole) == plan.count(seed, 1) == (n // size if drop else -(-n // size))
    assert all(len(batch) == size for batch in whole[:-1])
    samples = flat(whole)
    assert len(samples) == len(set(samples)) == (n - n % size if drop else n)
    fresh = Bucketed(lengths, size, shuffle, drop, window)
    for start, stop in [(len(whole) // 2, len(whole)), (0, 1), (1, 4), (len(whole), len(whole) + 3)]:
        assert [b.tolist() for b in fresh.take(seed, 1, start, stop)] == whole[start:stop]
    for first in range(0, len(whole), window):  # within a window, no batch's lengths overlap another's
        ranges = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in whole[first : first + window])
        assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    if not shuffle:
        span = size * window
        assert all(i // span == place // span for place, i in enumerate(samples))


def test_buckets_are_shuffled_every_epoch_and_dropped_fairly() -> None:
    plan = Bucketed(LENGTHS, 10, True, True, 5)
    assert len({str(everything(plan, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    first = [LENGTHS[everything(plan, 0, epoch)[0]].mean() for epoch in range(60)]
    assert min(first) < 10 and max(first) > 30  # an epoch begins with any length
    dropped = [i for epoch in range(400) for i in set(range(N)) - set(flat(everything(plan, 1, epoch)))]
    assert len(dropped) == 1200
    long = np.median(LENGTHS) < LENGTHS
    share = long.mean()
    assert abs(long[dropped].mean() - share) < 5 * math.sqrt(share * (1 - share) / 1200)


def padding(batches: Batches, lengths: Any) -> float:
    """Share of a padded epoch that is padding."""
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in everything(batches))
    return 1 - sum(lengths) / padded


def test_padding_saved_on_messages(shared_data: Path) -> None:
    lines = (shared_data / "sms-spam" / "SMSSpamCollection").read_text("utf-8").splitlines()
    lengths = [len(line.split("\t", 1)[1]) for line in lines if "\t" in line]
    n = len(lengths)
    assert n > 5000
    assert padding(Bucketed(lengths, 32, True, False), lengths) < 0.2 * padding(
        Chunked(Shuffled(n, n), 32, False), lengths
    )


class Watched(np.ndarray):
    """10^8 equal lengths that take no memory, and what was asked of them."""

    asked: list[int] = []  # noqa: RUF012

    def __getitem__(self, index: Any) -> Any:
        Watched.asked.append(len(index))
        return np.asarray(super().__getitem__(index))


def test_a_late_batch_touches_its_window_only() -> None:
    lengths = np.broadcast_to(np.array(7), 10**8).view(Watched)
    Watched.asked.clear()
    plan = Sharded(Bucketed(lengths, 10, True, False), 1, 2)
    (batch,) = plan.take(3, 0, 10**6, 10**6 + 1)
    assert len(batch) == 5 and Watched.asked == [1000]
    rest = plan.take(3, 0, 10**6, 10**6 + 100)
    assert rest[0].tolist() == batch.tolist() and len(set(np.concatenate(rest).tolist())) == 500
    assert Watched.asked == [1000]  # the window was kept
    for window in range(20):
        plan.take(3, 0, window * 100, window * 100 + 1)
    assert Watched.asked == [1000] * 21 and len(plan.batches._windows) == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("lengths", [[[1, 2]], [1.5, 2.0], ["a"], np.array(3)])
def test_lengths_that_are_none(lengths: Any) -> None:
    with pytest.raises(UserError, match="one integer per sample"):
        Bucketed(lengths, 2, True, False)


def test_sizes_and_ranks_that_are_none() -> None:
    with pytest.raises(UserError, match="at least 1"):
        Bucketed([1, 2], 0, True, False)
    for rank, ranks in [(2, 2), (-1, 2), (0, 0)]:
        with pytest.raises(UserError, match="ranks count from 0"):
            Sharded(ONCE["sequential"], rank, ranks)
    assert everything(Bucketed([], 4, True, False)) == []
    assert everything(Sharded(Chunked(Sequential(3), 3, False), 0, 4)) == [[]]
