"""Splits: disjoint, complete, sized as asked, a function of the arguments and a seed of their own."""

import subprocess
import sys
from collections import Counter, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from stoker.data.loader import Loader, columns_of
from stoker.data.splitting import folds, split
from stoker.errors import UserError

LABELS = st.lists(st.sampled_from("aaaaaaaabbbbccd"), min_size=12, max_size=300)


def enough(labels: list[str], parts: int) -> list[str]:
    """Labels with every class at least `parts` times."""
    return labels + [c for c in set(labels) for _ in range(parts)]


def whole(parts: tuple[Any, ...], n: int) -> None:
    """The parts of a split of range(n) are ascending, disjoint and together everything."""
    for part in parts:
        assert list(part) == sorted(part)
    assert sorted(i for part in parts for i in part) == list(range(n))


# ------------------------------------------------------------------ random


@given(st.integers(4, 2000), st.floats(0.01, 0.9), st.integers(0, 2**63))
def test_a_fraction_is_rounded_to_the_nearest_count(n: int, fraction: float, seed: int) -> None:
    size = fraction * n
    if not 0.6 < size < n - 1:
        return
    parts = split(list(range(n)), fraction, seed=seed)
    whole(parts, n)
    assert abs(len(parts[1]) - size) <= 0.5 + 1e-9


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 400), st.integers())
def test_counts_are_exact(train: int, val: int, test: int, seed: int) -> None:
    n = train + val + test
    parts = split(list(range(n)), val, test, seed=seed)
    whole(parts, n)
    assert [len(part) for part in parts] == [train, val, test]


@pytest.mark.parametrize(("n", "fraction", "size"), [(10, 0.7, 7), (10, 0.3, 3), (1000, 0.29, 290), (5, 0.1, 1)])
def test_a_fraction_is_the_decimal_that_was_written(n: int, fraction: float, size: int) -> None:
    """0.29 * 1000 is 289.99999999999994 in doubles."""
    assert len(split(list(range(n)), fraction)[1]) == size
    assert len(split(list(range(n)), np.float64(fraction))[1]) == size


def test_the_seed_decides_and_nothing_else() -> None:
    data = list(range(1000))
    first = split(data, 0.1, seed=1)
    torch.manual_seed(7)
    np.random.seed(7)
    state = torch.get_rng_state()
    assert split(data, 0.1, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    held = [set(split(data, 0.1, seed=seed)[1]) for seed in range(20)]
    overlaps = [len(held[i] & held[j]) for i in range(20) for j in range(i)]
    assert 8 < np.mean(overlaps) < 12  # 10 of 100 by chance
    assert max(overlaps) < 30


def test_the_same_in_another_process() -> None:
    code = "from stoker.data import split; print(split(list(range(99)), 9, stratify=list('abc' * 33), seed=3)[1])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert out.stdout.strip() == str(split(list(range(99)), 9, stratify=list("abc" * 33), seed=3)[1])


def test_every_sample_is_held_out_alike() -> None:
    counts = np.zeros(50)
    for seed in range(2000):
        counts[split(list(range(50)), 10, seed=seed)[1]] += 1
    assert abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)


def test_val_stays_what_it_is_when_a_test_part_is_added() -> None:
    data = list(range(500))
    assert split(data, 50)[1] == split(data, 50, 100)[1]


# ------------------------------------------------------------------ stratified


@given(LABELS, st.floats(0.05, 0.45), st.floats(0.05, 0.45), st.integers(0, 1000))
def test_every_class_has_its_share_of_every_part(labels: list[str], val: float, test: float, seed: int) -> None:
    labels = enough(labels, 3)
    n = len(labels)
    if min(val, test) * n < 0.5:
        return
    parts = split(list(range(n)), val, test, seed=seed, stratify=labels)
    whole(parts, n)
    assert [len(p) for p in parts] == [len(p) for p in split(list(range(n)), val, test)]
    for name, count in Counter(labels).items():
        for part in parts:
            assert abs(sum(labels[i] == name for i in part) - count * len(part) / n) < 1


@settings(max_examples=60)
@given(LABELS, st.integers(2, 7), st.integers(0, 1000))
def test_folds_cover_every_sample_once_and_every_class_alike(labels: list[str], k: int, seed: int) -> None:
    labels = enough(labels, k)
    n = len(labels)
    pairs = [folds(list(range(n)), k, fold, seed=seed, stratify=labels) for fold in range(k)]
    whole(tuple(val for _, val in pairs), n)
    for train, val in pairs:
        whole((train, val), n)
        assert len(val) in (n // k, -(-n // k))
        for name, count in Counter(labels).items():
            assert abs(sum(labels[i] == name for i in val) - count * len(val) / n) < 1


def test_quotas_with_a_thousand_classes_are_exact() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(1000), generator.integers(3, 40, 1000))
    n = len(labels)
    for part in split(np.arange(n), 0.13, 0.29, stratify=labels, seed=5):
        counts = np.bincount(labels[part], minlength=1000)
        assert abs(counts - np.bincount(labels) * len(part) / n).max() < 1


def test_which_rare_classes_are_held_out_depends_on_the_seed() -> None:
    labels = [c for c in range(100) for _ in range(2)]
    held = {tuple(labels[i] for i in split(list(range(200)), 20, stratify=labels, seed=s)[1]) for s in range(10)}
    assert len(held) == 10


@pytest.mark.parametrize(
    "labels",
    [
        ["ja", "nein"] * 50,
        torch.tensor([0, 1] * 50),
        np.array([0, 1] * 50, dtype=np.uint8),
        np.array(["ü", "ß"] * 50, dtype=object),
        pd.Series(["a", "b"] * 50, index=range(500, 600)),
        [torch.tensor(0), torch.tensor(1)] * 50,
        [np.int64(0), np.int64(1)] * 50,
        [True, False] * 50,
        [None, "x"] * 50,
        (0, 1) * 50,
        np.array([0.0, 1.0] * 50, dtype=np.float32),
    ],
)
def test_labels_of_any_kind(labels: Any) -> None:
    train, val = split(list(range(100)), 20, stratify=labels)
    assert sum(i % 2 for i in val) == 10
    assert sum(i % 2 for i in train) == 40


# ------------------------------------------------------------------ groups


@given(
    st.lists(st.integers(1, 30), min_size=3, max_size=60),
    st.floats(0.05, 0.4),
    st.integers(0, 1000),
)
def test_no_group_is_in_two_parts(group_sizes: list[int], val: float, seed: int) -> None:
    groups = [g for g, size in enumerate(group_sizes) for _ in range(size)]
    n = len(groups)
    if not 0.5 <= val * n < n - 2:
        return
    parts = split(list(range(n)), val, 1, seed=seed, groups=groups)
    whole(parts, n)
    held = [{groups[i] for i in part} for part in parts]
    assert all(held)
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])


@given(st.lists(st.integers(1, 20), min_size=40, max_size=80), st.integers(0, 100))
def test_grouped_parts_are_near_the_sizes_asked_for(group_sizes: list[int], seed: int) -> None:
    groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
    n = len(groups)
    _, val = split(np.arange(n), 0.25, seed=seed, groups=groups)
    assert abs(len(val) - n / 4) <= max(group_sizes) / 2
    sizes = [len(folds(np.arange(n), 4, f, seed=seed, groups=groups)[1]) for f in range(4)]
    assert max(sizes) - min(sizes) <= max(group_sizes)


def test_groups_of_one_size_fill_the_parts_exactly() -> None:
    groups = np.arange(1000) // 5
    assert [len(p) for p in split(np.arange(1000), 0.1, 0.2, groups=groups)] == [700, 100, 200]


def test_a_held_out_part_has_large_and_small_groups() -> None:
    """Filling the larger part first would leave it the patients with many visits, and the others the rest."""
    group_sizes = np.arange(1, 81)
    groups = np.repeat(np.arange(80), group_sizes)
    means = [group_sizes[np.unique(split(groups, 0.2, groups=groups, seed=s)[1])].mean() for s in range(10)]
    assert 28 < np.mean(means) < 53  # 40.5 by chance


def test_another_seed_holds_out_other_groups_of_distinct_sizes() -> None:
    groups = np.repeat(np.arange(30), np.arange(10, 40))
    assert len({tuple(np.unique(split(groups, 0.2, groups=groups, seed=s)[1])) for s in range(10)}) >= 9


def test_a_group_larger_than_what_is_held_out_stays_in_train() -> None:
    groups = ["big"] * 900 + [f"g{i // 10}" for i in range(100)]
    train, val = split(list(range(1000)), 0.05, groups=groups)
    assert (len(train), len(val)) == (950, 50)


def test_groups_and_classes_together() -> None:
    """Forty patients, each of one diagnosis mostly; one in four is ill."""
    generator = np.random.default_rng(1)
    patients = np.repeat(np.arange(40), generator.integers(5, 15, 40))
    ill = (patients % 4 == 0) ^ (generator.random(len(patients)) < 0.05)
    for fold in range(5):
        _, val = folds(np.arange(len(patients)), 5, fold, groups=patients, stratify=ill)
        assert abs(ill[val].mean() - ill.mean()) < 0.06
        assert abs(len(val) - len(patients) / 5) < 15
        assert not set(patients[val]) & set(patients[np.setdiff1d(np.arange(len(patients)), val)])


# ------------------------------------------------------------------ kinds of data


def test_tensors_arrays_tuples_and_dicts_stay_what_they_are() -> None:
    x, y = torch.arange(20.0).reshape(10, 2), np.arange(10)
    train, val = split((x, y), 3)
    assert type(train) is tuple
    assert train[0].shape == (7, 2)
    assert isinstance(val[1], np.ndarray)
    assert torch.equal(val[0][:, 0], torch.from_numpy(val[1]) * 2.0)
    train, val = split({"x": x, "y": y, "name": list("abcdefghij")}, 3, stratify=None)
    assert set(val) == {"x", "y", "name"}
    assert val["name"] == ["abcdefghij"[i] for i in val["y"]]
    assert columns_of({k: v for k, v in val.items() if k != "name"}) is not None
    pair = namedtuple("pair", "x y")(x, y)
    assert type(split(pair, 3)[0]) is type(pair)
    assert split(y, 3)[1].dtype == y.dtype
    assert type(split(tuple("abcdef"), 2)[0]) is tuple


def test_a_column_may_be_named() -> None:
    data = {"x": torch.arange(40), "sex": ["f", "m"] * 20, "family": torch.arange(40) // 4}
    _, val = split(data, 0.2, stratify="sex", groups="family")
    assert Counter(val["sex"]) == {"f": 4, "m": 4}
    assert len(torch.unique(val["family"])) == 2
    with pytest.raises(UserError, match=r"names no column.*did you mean sex"):
        split(data, 0.2, stratify="sexe")


def test_a_frame_of_pandas() -> None:
    frame = pd.DataFrame({"a": range(10), "b": list("xy" * 5)}, index=range(100, 110))
    train, val = split(frame, 4, stratify="b")
    assert list(val["b"]).count("x") == 2
    assert sorted([*train["a"], *val["a"]]) == list(range(10))


def test_other_data_sets_become_subsets_that_read_with_plain_integers() -> None:
    class Squares(Dataset[int]):
        targets = np.array([0, 1] * 10)

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> int:
            assert type(index) is int
            return index * index

    train, val = split(Squares(), 4, stratify=True)
    assert isinstance(train, Subset)
    assert sorted([*(train[i] for i in range(16)), *(val[i] for i in range(4))]) == [i * i for i in range(20)]
    again = split(train, 4, stratify=True)
    assert type(again[1].dataset) is Squares  # not a Subset of a Subset
    assert set(again[0].indices) | set(again[1].indices) == set(train.indices)
    tensors = TensorDataset(torch.arange(20), torch.arange(20))
    assert columns_of(split(tensors, 4)[0]).num_rows == 16
    assert len(next(iter(DataLoader(split(tensors, 4)[1], 4)))[0]) == 4


def test_a_data_set_may_take_its_own_subset_at_once_or_later() -> None:
    class Rows:
        def __init__(self, indices: Any, lazy: bool) -> None:
            self.indices, self.lazy, self.read = indices, lazy, 0

        def __len__(self) -> int:
            self.read += 1
            return 10

        def __getitem__(self, name: str) -> list[int]:
            assert name == "y"
            return [0, 1] * 5

        def subset(self, indices: Any) -> "Rows":
            return Rows(indices, self.lazy)

    eager = split(Rows(None, False), 4, stratify="y")
    assert eager[1].indices.dtype == np.int64
    source = Rows(None, True)
    lazy = split(source, 4, stratify="y")
    assert source.read == 0
    assert np.array_equal(lazy[1].indices(), eager[1].indices)
    assert np.array_equal(lazy[0].indices(), eager[0].indices)
    assert source.read == 1
    late = folds(Rows(None, True), 20, 1)
    with pytest.raises(UserError, match="10 samples cannot fill 20 folds"):
        late[0].indices()


# ------------------------------------------------------------------ refused

REFUSED: list[tuple[str, Any]] = [
    ("val=0 is neither", lambda d: split(d, 0)),
    ("val=1.0 is neither", lambda d: split(d, 1.0)),
    ("val=-3 is neither", lambda d: split(d, -3)),
    ("val=True is neither", lambda d: split(d, True)),
    ("val=nan is neither", lambda d: split(d, float("nan"))),
    ("test='10%' is neither", lambda d: split(d, 0.1, "10%")),
    ("val=0.001 of 100 samples is none", lambda d: split(d, 0.001)),
    ("val=0.5 and test=0.5 of 100 samples leave none", lambda d: split(d, 0.5, 0.5)),
    ("val=100 of 100 samples leave none", lambda d: split(d, 100)),
    ("seed must be an integer, got 0.5", lambda d: split(d, seed=0.5)),
    ("1 folds leave nothing", lambda d: folds(d, 1)),
    ("fold 5 of 5: folds are numbered from 0", lambda d: folds(d, 5, 5)),
    ("100 samples cannot fill 101 folds", lambda d: folds(d, 101)),
    ("has 3 values for 100 samples", lambda d: split(d, stratify=[1, 2, 3])),
    ("stratify=True, but a list has no attribute targets", lambda d: split(d, stratify=True)),
    ("names no column of this list", lambda d: split(d, stratify="label")),
    ("2 members of every class.*'b' has 1", lambda d: split(d, stratify=["a"] * 99 + ["b"])),
    ("look like measurements", lambda d: split(d, stratify=np.linspace(0, 1, 100))),
    ("stratify= is nan at sample 7", lambda d: split(d, stratify=[0.0] * 7 + [float("nan")] * 93)),
    ("groups= is None at sample 99", lambda d: split(d, groups=["a"] * 50 + ["b"] * 49 + [None])),
    (r"stratify= has shape \[100, 2\]", lambda d: split(d, stratify=np.zeros((100, 2)))),
    (r"holds \[2\] values for one sample", lambda d: split(d, stratify=[torch.zeros(2)] * 100)),
    ("cannot be told apart", lambda d: split(d, stratify=[[1]] * 100)),
    ("1 group cannot fill 2 parts", lambda d: split(d, groups=["a"] * 100)),
    ("3 groups cannot fill 5 parts", lambda d: folds(d, groups=[i % 3 for i in d])),
    (
        "2 groups with a member of every class.*True has 1",
        lambda d: split(d, groups=[i % 10 for i in d], stratify=[i % 10 == 3 for i in d]),
    ),
    ("there are no samples to split", lambda d: split([], 0.1)),
    ("different lengths: 'a' 3, 'b' 2", lambda d: split({"a": [1, 2, 3], "b": [1, 2]}, 1)),
    ("got a Loader", lambda d: split(Loader(d, 4))),
    ("got a DataLoader", lambda d: split(DataLoader(d))),
    ("has no length and cannot be split", lambda d: split(iter(d))),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refused(message: str, call: Any) -> None:
    with pytest.raises(UserError, match=message):
        call(list(range(100)))


def test_a_stream_is_refused_even_with_a_length() -> None:
    class Stream(IterableDataset[int]):
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(UserError, match="split what it reads from"):
        split(Stream())
