"""Samples that a held-out part shares with train are found, counted, and told of; nothing is decoded to do so."""

import gzip
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from stoker.data.folders import Images, images
from stoker.data.shared_rows import shared_note, shared_rows
from stoker.data.splitting import folds, split
from stoker.data.tables import table


def by_hand(first: list[Any], second: list[Any]) -> list[int]:
    """Positions in `second` of what is also in `first`."""
    known = set(first)
    return [j for j, row in enumerate(second) if row in known]


def pairs(first: Any, second: Any, **options: Any) -> list[tuple[int, int]]:
    found = shared_rows(first, second, **options)
    assert found is not None
    return found.pairs


# ------------------------------------------------------------------ tensors


ROWS = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=40)


@given(ROWS, ROWS, st.sampled_from([torch.float32, torch.float64, torch.int64, torch.int8, torch.bfloat16]))
def test_equal_rows_are_found_as_by_hand(first: Any, second: Any, dtype: torch.dtype) -> None:
    a, b = torch.tensor(first).to(dtype), torch.tensor(second).to(dtype)
    found = pairs((a[:, 0], a[:, 1]), (b[:, 0], b[:, 1]))
    assert [j for _, j in found] == by_hand(first, second)
    assert all(first[i] == second[j] for i, j in found)
    assert pairs(a, b) == found
    assert pairs({"x": a}, {"x": b}) == found
    assert pairs(TensorDataset(a), TensorDataset(b)) == found


def test_all_columns_must_agree() -> None:
    x = torch.arange(5.0)
    assert pairs((x, torch.zeros(5)), (x, torch.ones(5))) == []
    assert pairs((x, torch.zeros(5)), (x.flip(0), torch.zeros(5))) == [(4, 0), (3, 1), (2, 2), (1, 3), (0, 4)]


def test_nan_equals_nan_and_bytes_decide() -> None:
    nan = torch.tensor([[1.0, float("nan")], [2.0, 0.0]])
    assert pairs(nan, nan) == [(0, 0), (1, 1)]
    assert pairs(torch.tensor([0.0]), torch.tensor([-0.0])) == []


@pytest.mark.parametrize("shape", [(3,), (28, 28), (3, 80, 80)])
def test_long_rows_are_compared_to_the_last_byte(shape: tuple[int, ...]) -> None:
    first = torch.randn(50, *shape, generator=torch.Generator().manual_seed(0))
    second = first[[7, 3, 7]].clone()
    second[1].view(-1)[-2] += 1
    assert pairs(first, second) == [(7, 0), (7, 2)]


def test_rows_that_differ_in_signs_only_are_told_apart() -> None:
    """A linear hash modulo 2^64 takes two flipped top bits for none."""
    first = torch.ones(9, 8)
    for row, column in enumerate(range(1, 8, 2)):
        first[row, column] = first[row, 7] = -1
    assert [j for _, j in pairs(first[:4], first)] == [0, 1, 2, 3]


def test_others_cannot_be_compared() -> None:
    x = torch.arange(6.0)
    assert shared_rows(x, x.double()) is None
    assert shared_rows(x.reshape(3, 2), x.reshape(2, 3)) is None
    assert shared_rows({"x": x}, {"y": x}) is None
    assert shared_rows((x, x), x) is None
    assert shared_rows(x, [1.0]) is None
    assert shared_rows(torch.zeros(3, 0), torch.zeros(3, 0)) is None
    assert pairs((x[:0], x[:0]), (x, x)) == []


def test_a_part_of_very_many_is_looked_at_and_said() -> None:
    first = torch.arange(10_000)
    found = shared_rows(first, first[::-1] if isinstance(first, np.ndarray) else first.flip(0), limit=100)
    assert found is not None
    assert found.looked_at == (100, 100)
    assert len(shared_rows(first, first[:50], limit=100).pairs) == 1  # only multiples of 100 were looked at
    small = shared_rows(torch.zeros(1000, 1000), torch.zeros(1000, 1000), budget_s=1e-4)
    assert small is not None
    assert 0 < small.looked_at[0] < 1000
    assert len(small.pairs) == small.looked_at[1]


def test_fashion_mnist_has_images_of_its_test_set_twice(fashion_mnist: Path) -> None:
    def read(name: str) -> torch.Tensor:
        with gzip.open(fashion_mnist / name) as file:
            data = np.frombuffer(file.read(), np.uint8, offset=16)
        return torch.from_numpy(data.reshape(-1, 28, 28).copy())

    train, test = read("train-images-idx3-ubyte.gz"), read("t10k-images-idx3-ubyte.gz")
    found = shared_rows(train, test, budget_s=10)
    assert found is not None
    assert found.looked_at == (60_000, 10_000)
    rows = [[row.tobytes() for row in part.numpy()] for part in (train, test)]
    assert [j for _, j in found.pairs] == by_hand(*rows)
    copied = torch.cat([test[:100], train[500:600]])
    assert [(i, j) for i, j in pairs(train, copied, budget_s=10) if j >= 100] == [(j + 400, j) for j in range(100, 200)]


# ------------------------------------------------------------------ tables


ADULT = [f"c{i}" for i in range(14)] + ["income"]


def test_adults_real_duplicates(shared_data: Path) -> None:
    rows = table(shared_data / "adult/adult-train.csv", names=ADULT, target="income", missing=("?",))
    train, val = split(rows, 0.5, seed=0)
    encode = train.fit(unknown="code")
    raw = [list(zip(*(part[name] for name in ADULT), strict=True)) for part in (train, val)]
    expected = by_hand(*raw)
    assert len(expected) > 5
    found = pairs(encode(train), encode(val), budget_s=10)
    assert [j for _, j in found] == expected
    assert all(raw[0][i] == raw[1][j] for i, j in found)


def test_tables_with_texts_are_in_memory_too() -> None:
    texts = {"text": ["good day", "bad day", "good day", "so so"], "y": ["a", "b", "a", "b"]}
    rows = table(texts, target="y", types={"text": "text"})
    encode = rows.fit(tokenizer="word")
    found = pairs(encode(rows.subset(np.array([0, 1]))), encode(rows.subset(np.array([2, 3]))))
    assert found == [(0, 0)]


# ------------------------------------------------------------------ subsets, lists, streams


class Unreadable(Dataset[int]):
    """A data set that must not be read to tell."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        raise AssertionError("was read")


def test_subsets_of_one_data_set_share_what_both_select() -> None:
    data = Unreadable()
    assert pairs(Subset(data, [5, 9, 2]), Subset(data, [1, 2, 5])) == [(2, 1), (0, 2)]
    assert pairs(*split(data, 10)) == []
    inner = Subset(data, range(50, 100))
    assert pairs(Subset(data, [60, 70]), Subset(inner, [0, 10])) == [(0, 1)]
    assert len(pairs(data, data)) == 100
    assert len(pairs(data, Subset(data, [3, 4]))) == 2
    first, second = (folds(data, 5, fold)[1] for fold in (0, 1))
    assert pairs(first, second) == []
    assert len(pairs(first, folds(data, 5, 0, seed=1)[1])) < 20
    assert shared_rows(Unreadable(), Unreadable()) is None


def test_a_wrapper_around_every_sample_is_looked_through() -> None:
    class Wrapped:
        def __init__(self, dataset: Any) -> None:
            self.dataset = dataset

        def __len__(self) -> int:
            return len(self.dataset)

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("was read")

    data = Unreadable()
    assert pairs(Wrapped(Subset(data, [1, 2])), Wrapped(Wrapped(Subset(data, [2])))) == [(1, 0)]
    assert pairs(Wrapped(torch.arange(3)), torch.arange(2, 4)) == [(2, 0)]


def test_lists_of_samples_that_are_in_memory() -> None:
    first = [("ja", 1), ("nein", 0), ("ja", 0), (float("nan"), 1)]
    assert pairs(first, [("ja", 0), ("ja", 2), (float("nan"), 1), ("nein", False)]) == [(2, 0), (3, 2)]
    tensors = [{"ids": torch.tensor([1, 2]), "tags": np.array([3])}, {"ids": torch.tensor([1]), "tags": np.array([3])}]
    assert pairs(tensors, [{"tags": np.array([3]), "ids": torch.tensor([1])}]) == [(1, 0)]
    assert pairs(Subset(first, [1, 2]), first) == [(0, 1), (1, 2)]
    assert shared_rows([object()], [object()]) is None
    assert pairs([], first) == []


def test_a_stream_is_not_looked_at() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    assert shared_rows(Stream(), Stream()) is None
    assert shared_note({"train": Stream(), "val": Stream()}) == ()
    assert shared_note({"train": (stream := Stream()), "val": stream}) == ()
    assert shared_rows(itertools.count(), torch.arange(3)) is None


# ------------------------------------------------------------------ images


@pytest.fixture
def flowers(tmp_path: Path, shared_data: Path) -> Path:
    for part in ("train", "val"):
        for name in ("daisy", "roses"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for file in sorted((shared_data / "flowers700" / part / name).iterdir())[:20]:
                shutil.copy(file, folder)
    return tmp_path


def opened(root: Path) -> tuple[Images, Images]:
    train = images(root / "train")
    return train, images(root / "val", classes=train.classes)


def test_images_are_equal_where_their_files_are(flowers: Path) -> None:
    train, val = opened(flowers)
    assert pairs(train, val, budget_s=10) == []
    shutil.copy(train.file_of(3), flowers / "val" / "roses" / "another name.jpg")
    same_size = bytearray(Path(train.file_of(5)).read_bytes())
    same_size[-30] ^= 1
    (flowers / "val" / "roses" / "b.jpg").write_bytes(same_size)
    (flowers / "val" / "roses" / "empty.jpg").write_bytes(b"")
    (flowers / "train" / "roses" / "empty.jpg").write_bytes(b"")
    train, val = opened(flowers)
    found = pairs(train, val, budget_s=10)
    assert [(train.file_of(i), val.file_of(j)[-16:]) for i, j in found] == [(train.file_of(3), "another name.jpg")]


def test_parts_of_one_image_folder(flowers: Path) -> None:
    train, _ = opened(flowers)
    assert pairs(*split(train, 5), budget_s=10) == []
    assert pairs(train.subset(np.array([4, 8])), train.subset(np.array([8, 9])), budget_s=10) == [(1, 0)]
    assert pairs(Subset(train, [4, 8]), Subset(train, [8, 9]), budget_s=10) == [(1, 0)]


def test_torchvisions_folders_are_looked_at_alike(flowers: Path) -> None:
    folder = pytest.importorskip("torchvision.datasets").ImageFolder
    shutil.copy(opened(flowers)[0].file_of(3), flowers / "val" / "roses" / "0.jpg")
    train, val = (folder(str(flowers / part)) for part in ("train", "val"))
    assert pairs(train, Subset(val, [0, 20]), budget_s=10) == [(3, 1)]


def test_no_time_is_said(flowers: Path) -> None:
    train, _ = opened(flowers)
    found = shared_rows(train, train, budget_s=0)
    assert found is not None
    assert found.looked_at == (0, 0)


# ------------------------------------------------------------------ the line


def test_the_line_says_how_many_and_which() -> None:
    x = torch.arange(100.0)
    val = torch.cat([x[[17, 4, 90]], -x[1:10]])
    assert shared_note({"train": x, "val": val, "other": x}) == (
        "3 of 12 val rows are also in train (val 0 = train 17, val 1 = train 4, ...): the score on them is no estimate",
    )
    assert shared_note({"train": x, "val": -x[1:], "test": -x[5:7]}) == (
        "2 of 2 test rows are also in val (test 0 = val 4, test 1 = val 5): the score on them is no estimate",
    )
    assert shared_note({"train": x, "val": -x[1:]}) == ()
    assert shared_note({"train": x}) == ()
    assert shared_note({}) == ()


def test_the_line_says_when_only_a_part_was_looked_at() -> None:
    x = torch.arange(300_000)
    (line,) = shared_note({"train": x, "val": x[:10]})
    assert line.startswith("at least ")
    assert "of 10 val rows are also in train" in line
    assert "; 200,000 of 300,000 train rows were looked at)" in line
