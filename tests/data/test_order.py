"""Order and draws as arithmetic: functions of (seed, epoch, position), reached from anywhere, fair."""

import itertools
import math
import multiprocessing
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from stoker.data.batch import num_rows, split
from stoker.data.loader import Loader
from stoker.data.order import (
    Among,
    Chunked,
    Listed,
    Sequential,
    Shuffled,
    Weighted,
    order_of_sampler,
    permute,
    weighted,
)
from stoker.data.seeding import ORDER, SAMPLE, fold, isolated, seed_all
from stoker.errors import UserError


def assert_fair(observed: Any, expected: Any, freedom: int) -> None:
    """Pearson's chi-square below its 1 - 3e-7 quantile (Wilson & Hilferty, 1931), and not suspiciously low."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = math.sqrt(2 / (9 * freedom))
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 5 * spread) ** 3
    assert statistic > freedom * max(1 - 2 / (9 * freedom) - 5 * spread, 0) ** 3


def positions(*bounds: int) -> Any:
    return np.arange(*bounds, dtype=np.int64)


# ------------------------------------------------------------------ permutations


def test_every_small_n_is_permuted() -> None:
    for n in range(1, 2001):
        if n > 300 and n % 7:
            continue
        image = permute(positions(n), n, fold(n, ORDER, 0))
        assert np.array_equal(np.sort(image), positions(n)), n


@settings(max_examples=60)
@given(st.integers(1, 30_000), st.integers(0, 2**64 - 1))
def test_any_n_and_key(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(positions(n), n, key)), positions(n))


@pytest.mark.parametrize("n", [10**6 + 3, 2**20, 2**20 - 1, 2**20 + 1, 1024**2 - 1023])
def test_large_n(n: int) -> None:
    assert len(np.unique(permute(positions(n), n, 7))) == n


@pytest.mark.parametrize("n", [10**12, 2**40 + 1, 2**52 - 1])
def test_positions_are_evaluated_one_by_one(n: int) -> None:
    """Nothing of size n is made, and a position's image does not depend on what else is asked."""
    asked = np.array([0, 1, n // 2, n - 2, n - 1], dtype=np.int64)
    image = permute(asked, n, 3)
    assert len(set(image.tolist())) == 5
    assert ((image >= 0) & (image < n)).all()
    for position, value in zip(asked, image, strict=True):
        assert permute(np.array([position]), n, 3).tolist() == [value]
    block = permute(positions(n - 40_000, n), n, 3)
    assert len(np.unique(block)) == 40_000
    assert_fair(np.histogram(block, bins=16, range=(0, n))[0], [2500] * 16, 15)


@pytest.mark.parametrize(("n", "seeds"), [(2, 3000), (3, 3000), (5, 3000), (10, 3000), (100, 2500)])
@pytest.mark.parametrize("by", ["seed", "epoch"])
def test_every_sample_comes_at_every_position_alike(n: int, seeds: int, by: str) -> None:
    counts = np.zeros((n, n))
    for i in range(seeds):
        key = fold(i, ORDER, 0) if by == "seed" else fold(0, ORDER, i)
        counts[positions(n), permute(positions(n), n, key)] += 1
    assert_fair(counts, np.full((n, n), seeds / n), (n - 1) ** 2)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_order_is_alike_probable(n: int) -> None:
    seeds = 40 * math.factorial(n) + 1000
    counts = Counter(tuple(permute(positions(n), n, fold(seed, ORDER, 0)).tolist()) for seed in range(seeds))
    orders = list(itertools.permutations(range(n)))
    assert_fair([counts[o] for o in orders], [seeds / len(orders)] * len(orders), len(orders) - 1)


def test_neighbours_stay_no_neighbours() -> None:
    n, near = 1000, 0
    for seed in range(200):
        near += int((np.abs(np.diff(permute(positions(n), n, fold(seed, ORDER, 0)))) == 1).sum())
    expected = 200 * (n - 1) * 2 / n
    assert abs(near - expected) < 5 * math.sqrt(expected)


def test_epochs_and_seeds_differ() -> None:
    loader = Loader(list(range(50)), 8, shuffle=True)
    orders = {tuple(loader.indices(seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert loader.indices(3, 4) == Loader(list(range(50)), 5, shuffle=True).indices(3, 4)


@given(n=st.integers(1, 400), size=st.integers(1, 60), drop=st.booleans(), seed=st.integers(-5, 2**63))
@settings(max_examples=80)
def test_any_slice_is_part_of_the_whole(n: int, size: int, drop: bool, seed: int) -> None:
    plan = Chunked(Shuffled(n, n), size, drop)
    count = plan.count(seed, 1)
    whole = [batch.tolist() for batch in plan.take(seed, 1, 0, count)]
    assert len(whole) == count == (n // size if drop else -(-n // size))
    for start, stop in [(0, 1), (count // 2, count), (count - 1, count), (1, 3)]:
        if 0 <= start < stop <= count:
            assert [b.tolist() for b in plan.take(seed, 1, start, stop)] == whole[start:stop]


# ------------------------------------------------------------------ weights


def test_weights_with_replacement() -> None:
    weights = [0.5, 1.0, 0.0, 2.5, 6.0]
    loader = Loader(list(range(5)), 5, weights=weights)
    counts = Counter(i for seed in range(60) for epoch in range(60) for i in loader.indices(seed, epoch))
    assert counts[2] == 0
    drawn = [0, 1, 3, 4]
    assert_fair([counts[i] for i in drawn], [18_000 * weights[i] / 10 for i in drawn], 3)


def test_a_large_weighted_epoch() -> None:
    weights = np.linspace(1, 3, 40)
    order = weighted(weights, 40_000, replacement=True)
    counts = np.bincount(order.take(1, 2, 0, 40_000), minlength=40)
    assert_fair(counts, 40_000 * weights / weights.sum(), 39)
    assert order.take(1, 2, 123, 140).tolist() == order.take(1, 2, 0, 40_000)[123:140].tolist()
    assert order.take(1, 3, 0, 99).tolist() != order.take(1, 2, 0, 99).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_without_replacement_against_enumeration(count: int) -> None:
    weights = [1.0, 2.0, 3.0, 6.0]
    exact = {}
    for chosen in itertools.permutations(range(4), count):
        left, probability = sum(weights), 1.0
        for i in chosen:
            probability, left = probability * weights[i] / left, left - weights[i]
        exact[chosen] = probability
    assert sum(exact.values()) == pytest.approx(1)
    order = weighted(weights, count, replacement=False)
    seeds = 8000
    counts = Counter(tuple(order.take(seed, 0, 0, count).tolist()) for seed in range(seeds))
    assert_fair([counts[c] for c in exact], [seeds * p for p in exact.values()], len(exact) - 1)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, math.nan], [1, math.inf], [[1, 2]]])
def test_weights_that_are_none(weights: Any) -> None:
    with pytest.raises(UserError, match="weights must be"):
        weighted(weights, 2, replacement=True)


def test_more_than_there_is() -> None:
    with pytest.raises(UserError, match="only 2 have a weight above 0"):
        weighted([1, 0, 2], 3, replacement=False)
    with pytest.raises(UserError, match="3 weights for 4 samples"):
        Loader(list(range(4)), 2, weights=[1, 1, 1]).indices(0, 0)


# ------------------------------------------------------------------ samplers

DATA = list(range(20))


@pytest.mark.parametrize(
    ("sampler", "kind", "length"),
    [
        (SequentialSampler(DATA), Sequential, 20),
        (RandomSampler(DATA), Shuffled, 20),
        (RandomSampler(DATA, num_samples=7), Shuffled, 7),
        (RandomSampler(DATA, replacement=True, num_samples=33), Weighted, 33),
        (RandomSampler(DATA, num_samples=50), Listed, 50),
        (SubsetRandomSampler([3, 5, 8, 13]), Among, 4),
        (WeightedRandomSampler([1.0] * 20, 9), Weighted, 9),
        (WeightedRandomSampler([1.0] * 20, 9, replacement=False), Listed, 9),
        (DistributedSampler(DATA, num_replicas=2, rank=1), Shuffled, 20),
        (DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False), Sequential, 20),
    ],
    ids=lambda value: value.__class__.__name__ if isinstance(value, Sampler) else "",
)
def test_torchs_samplers(sampler: Any, kind: type, length: int) -> None:
    order = order_of_sampler(sampler, 20)
    assert type(order) is kind
    loader = Loader(DATA, 4, sampler=sampler)
    first = loader.indices(5, 2)
    assert len(first) == order.length(5, 2) == length
    torch.manual_seed(99)
    loader.indices(5, 3)
    assert Loader(DATA, 4, sampler=sampler).indices(5, 2) == first
    shuffles = kind is not Sequential
    assert (loader.indices(5, 3) != first) == shuffles
    assert (loader.indices(6, 2) != first) == shuffles
    if isinstance(sampler, SubsetRandomSampler):
        assert sorted(first) == [3, 5, 8, 13]
    elif kind is Shuffled or (isinstance(sampler, WeightedRandomSampler) and not sampler.replacement):
        assert len(set(first)) == len(first)
    elif isinstance(sampler, RandomSampler) and length == 50:
        assert set(Counter(first).values()) <= {2, 3}


class Own(Sampler[int]):
    """Draws from every global generator, and remembers which epochs it was told of."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        for _ in range(12):
            draw = torch.rand(()).item() + float(np.random.rand()) + random.random()
            yield int(draw * 1000) % 20


class Keeping(Sampler[int]):
    """Keeps a generator of its own between epochs."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(20, generator=self.generator).tolist()


@pytest.mark.parametrize("make", [Own, Keeping])
def test_a_users_sampler_is_a_function_of_seed_and_epoch(make: Any) -> None:
    def orders(loader: Loader, places: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
        return {place: loader.indices(*place) for place in places}

    places = [(seed, epoch) for seed in range(3) for epoch in range(3)]
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = orders(Loader(DATA, 4, sampler=make()), places)
    assert torch.get_rng_state().equal(before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    torch.manual_seed(6)
    assert orders(Loader(DATA, 4, sampler=make()), places[::-1]) == found
    assert len({tuple(order) for order in found.values()}) == 9


def test_set_epoch_is_called() -> None:
    sampler = Own()
    loader = Loader(DATA, 4, sampler=sampler)
    feed = loader.feed(0)
    for epoch in (0, 1, 5):
        list(feed.epoch(epoch))
    assert list(dict.fromkeys(sampler.told)) == [0, 1, 5]


@pytest.mark.parametrize(
    "inner", [Own, Keeping, lambda: RandomSampler(DATA), lambda: RandomSampler(DATA, generator=torch.Generator())]
)
def test_a_batch_sampler(inner: Any) -> None:
    def loader() -> Loader:
        return Loader(DATA, batch_sampler=BatchSampler(inner(), 6, drop_last=False))

    found = {(seed, epoch): loader().batches(seed, epoch) for seed in range(2) for epoch in range(3)}
    again = loader()
    for place in reversed(found):
        torch.manual_seed(1)
        assert again.batches(*place) == found[place]
    assert len({str(batches) for batches in found.values()}) == 6
    assert {len(batch) for batch in found[0, 0][:-1]} == {6}


def test_set_epoch_reaches_the_sampler_of_a_batch_sampler() -> None:
    """As a user who wraps one of their own expects it: torch leaves that call to whoever owns the loop."""
    sampler = Own()
    loader = Loader(DATA, batch_sampler=BatchSampler(sampler, 6, drop_last=False))
    loader.batches(0, 4)
    assert sampler.told == [4]


def test_batches_of_uneven_lengths() -> None:
    batches = [[0], [1, 2, 3], [4, 5]]
    loader = Loader(DATA, batch_sampler=batches)
    assert loader.batches(0, 0) == batches
    assert [batch.tolist() for batch, _ in loader.feed(0).epoch(0)] == batches
    assert [last for _, last in loader.feed(0).epoch(0)] == [False, False, True]


# ------------------------------------------------------------------ O(1)


class Virtual:
    """10^8 samples that are not there; what is asked for is written down, across processes."""

    def __init__(self) -> None:
        self.count = multiprocessing.Value("q", 0)
        self.read = torch.full((4096,), -1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return 10**8

    def __getitem__(self, index: int) -> int:
        with self.count.get_lock():
            self.read[self.count.value] = index
            self.count.value += 1
        return index

    def asked(self) -> list[int]:
        with self.count.get_lock():
            return self.read[: self.count.value].tolist()


BATCH, START = 5, 10**6


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_late_step_reads_its_own_samples_only(shuffle: bool) -> None:
    data = Virtual()
    loader = Loader(data, BATCH, shuffle=shuffle)
    batches = loader.feed(9).epoch(0, START)
    for step in range(3):
        batch, last = next(batches)
        expected = loader.plan().take(9, 0, START + step, START + step + 1)[0].tolist()
        assert batch.tolist() == expected == data.asked()[-BATCH:]
        assert not last
    assert len(data.asked()) == 3 * BATCH
    if not shuffle:
        assert data.asked() == list(range(START * BATCH, (START + 3) * BATCH))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_late_step_of_workers_reads_the_prefetch_only(workers: int) -> None:
    data = Virtual()
    loader = Loader(data, BATCH, shuffle=True)
    feed = loader.feed(9, workers=workers)
    batches = feed.epoch(0, START)
    taken = [next(batches)[0].tolist() for _ in range(2)]
    batches.close()
    feed.close()
    ahead = 2 * workers  # torch's prefetch_factor batches a worker
    expected = [b.tolist() for b in loader.plan().take(9, 0, START, START + 2 + ahead)]
    assert taken == expected[:2]
    asked = data.asked()
    assert len(asked) == len(set(asked)) <= (2 + ahead) * BATCH
    assert set(asked) <= set(itertools.chain(*expected))


def test_workers_go_on_into_the_next_epoch() -> None:
    data = list(range(10))
    loader = Loader(data, 4, shuffle=True)
    feed = loader.feed(1, workers=2)
    try:
        for epoch in range(3):
            found = [(batch.tolist(), last) for batch, last in feed.epoch(epoch)]
            assert [batch for batch, _ in found] == loader.batches(1, epoch)
            assert [last for _, last in found] == [False, False, True]
        assert [b.tolist() for b, _ in feed.epoch(1, 1)] == loader.batches(1, 1)[1:]
    finally:
        feed.close()


# ------------------------------------------------------------------ draws of samples


class Drawing:
    """A sample is what the three generators draw for it; `which` says which samples draw at all."""

    def __init__(self, which: str = "all") -> None:
        self.which = which

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        if (self.which == "few" and index % 7 != 5) or self.which == "none":
            return torch.tensor([index, 0.0, 0.0, 0.0], dtype=torch.float64)
        torch_, numpy_, python_ = self.which in ("all", "few", "torch"), self.which in ("all", "few", "numpy"), True
        if self.which in ("torch", "numpy"):
            python_ = False
        return torch.tensor(
            [
                index,
                torch.rand(()).item() if torch_ else 0.0,
                np.random.rand() if numpy_ else 0.0,
                random.random() if python_ else 0.0,
            ],
            dtype=torch.float64,
        )


def expected_draws(which: str, seed: int, epoch: int, index: int) -> list[float]:
    with isolated():
        seed_all(fold(seed, SAMPLE, epoch, index))
        return Drawing(which)[index].tolist()


@pytest.mark.parametrize("which", ["all", "few", "none", "torch", "numpy", "python"])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_a_samples_draws_depend_on_seed_epoch_and_index_alone(which: str, workers: int) -> None:
    for size, order, start in [(4, {"shuffle": True}, 0), (9, {"sampler": [5, 0, 5, 19, 7, 1, 2, 3, 4, 12, 23]}, 1)]:
        feed = Loader(Drawing(which), size, **order).feed(3, workers=workers)
        try:
            for epoch in (0, 2):
                rows = [row for batch, _ in feed.epoch(epoch, start) for row in batch.tolist()]
                assert rows == [expected_draws(which, 3, epoch, int(row[0])) for row in rows]
        finally:
            feed.close()


def test_draws_differ_between_samples_epochs_and_seeds() -> None:
    places = [(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in range(24)]
    draws = [expected_draws("all", *place)[1:] for place in places]
    for column in zip(*draws, strict=True):
        assert len(set(column)) > 0.99 * len(places)
        assert_fair(np.histogram(column, bins=8, range=(0, 1))[0], [len(places) / 8] * 8, 7)


def test_keys_do_not_collide() -> None:
    keys = {fold(s, SAMPLE, e, i) for s in range(-3, 9) for e in range(12) for i in range(300)}
    keys |= {fold(s, ORDER, e) for s in range(-3, 9) for e in range(300)}
    assert len(keys) == 12 * 12 * 300 + 12 * 300
    assert fold(0, 1, 2) != fold(0, 2, 1) != fold(1, 0, 2)


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("microbatch", [1, 2, 3, 6, 7, None])
def test_split_pieces_add_up(microbatch: int | None) -> None:
    x, y = torch.arange(14.0).reshape(7, 2), torch.arange(7)
    for batch in [(x, y), [x, y], {"x": x, "y": y}, x, {"x": (x, {"deep": y})}]:
        pieces = split(batch, microbatch)
        assert [num_rows(p) for p in pieces] == [min(microbatch or 7, 7 - i) for i in range(0, 7, microbatch or 7)]
        assert all(type(piece) is type(batch) for piece in pieces)
        assert torch.cat([_first(piece) for piece in pieces]).equal(x)


def _first(tree: Any) -> torch.Tensor:
    while not isinstance(tree, torch.Tensor):
        tree = next(iter(tree.values())) if isinstance(tree, dict) else tree[0]
    return tree


def test_split_what_belongs_to_no_sample_goes_to_every_piece() -> None:
    batch = {
        "x": torch.arange(4),
        "names": list("abcd"),
        "scale": torch.tensor(2.0),
        "edges": torch.zeros(9, 2),
        "n": 3,
    }
    pieces = split(batch, 2)
    assert [p["names"] for p in pieces] == [["a", "b"], ["c", "d"]]
    assert all(p["scale"] == 2 and p["edges"].shape == (9, 2) and p["n"] == 3 for p in pieces)


def test_split_without_rows() -> None:
    with pytest.raises(UserError, match="cannot be cut"):
        split({"n": 3}, 2)
