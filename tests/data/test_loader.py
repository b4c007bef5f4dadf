"""What a Loader takes, refuses and promises: the same samples and draws over any number of ranks and workers."""

import random
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import data as torch_data
from torch.utils.data import IterableDataset, Sampler, Subset, TensorDataset

import stoker
from stoker import Loader, UserError

N = 30
LENGTHS = [1 + (7 * i) % 11 for i in range(N)]
WEIGHTS = [0.5 + i % 4 for i in range(N)]
LABELS = [min(i % 7, 2) for i in range(N)]


class Drawing:
    """Sample i is (i, a draw of each global generator, a draw of its own)."""

    def __init__(self) -> None:
        self.rng, self.lengths, self.targets = np.random.default_rng(0), LENGTHS, LABELS

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = torch.rand(()).item(), np.random.rand(), random.random(), self.rng.random()
        return torch.tensor([index, *drawn], dtype=torch.float64)


class Own(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(N).tolist()[: 20 + random.randrange(5)]


class Uneven(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.permutation(N).tolist()
        yield from (order[:3], order[3:4], order[4:15], order[15:17], order[17:])


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(10)


ORDERS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "random": {"shuffle": True},
    "random, whole batches": {"shuffle": True, "drop_last": True},
    "random with replacement": {"sampler": torch_data.RandomSampler(range(N), replacement=True, num_samples=40)},
    "subset": {"sampler": torch_data.SubsetRandomSampler(range(3, 28, 2))},
    "weighted": {"weights": WEIGHTS},
    "weighted without replacement": {"sampler": torch_data.WeightedRandomSampler(WEIGHTS, 20, replacement=False)},
    "class-balanced": {"balance": True},
    "batch": {"batch_sampler": torch_data.BatchSampler(torch_data.SequentialSampler(range(N)), 8, drop_last=False)},
    "by length": {"lengths": True},
    "by length, random": {"lengths": LENGTHS, "shuffle": True},
    "distributed": {"sampler": torch_data.DistributedSampler(range(N), num_replicas=4, rank=2, shuffle=True)},
    "own sampler": {"sampler": Own()},
    "own batch sampler": {"batch_sampler": Uneven()},
}
ONCE = {"sequential", "random", "batch", "by length", "by length, random", "distributed", "own batch sampler"}


@pytest.mark.parametrize("name", ORDERS)
def test_samples_and_draws_are_the_same_over_ranks_and_workers(name: str) -> None:
    """Each sample of an epoch exactly once over 1, 2 and 4 ranks, with the same augmentation for 0 to 4 workers."""
    size = None if "batch_sampler" in ORDERS[name] else 8
    loader = Loader(Drawing(), size, augment=lambda row: row + torch.rand(()) * (torch.arange(5) > 0), **ORDERS[name])
    whole = [[batch.tolist() for batch, _ in loader.feed(5).epoch(epoch)] for epoch in (0, 1)]
    for epoch, batches in enumerate(whole):
        assert [[int(row[0]) for row in batch] for batch in batches] == loader.batches(5, epoch)
        indices = loader.indices(5, epoch)
        assert name not in ONCE or sorted(indices) == list(range(N))
        assert all(len({row[i] for batch in batches for row in batch}) == len(set(indices)) for i in range(1, 5))
    for ranks in (1, 2, 4):
        for workers in (0, 1, 2, 4):
            feeds = [loader.feed(5, workers=workers, rank=rank, ranks=ranks) for rank in range(ranks)]
            for epoch in (0, 1):
                steps = list(zip(*(feed.epoch(epoch) for feed in feeds), strict=True))
                found = [list(chain(*(part.tolist() for part, _ in step if part is not None))) for step in steps]
                assert found == whole[epoch]
                assert [{last for _, last in step} for step in steps] == [{False}] * (len(steps) - 1) + [{True}]
                parts = [loader.batches(5, epoch, rank=rank, ranks=ranks) for rank in range(ranks)]
                assert [[len(p) for p in step] for step in zip(*parts, strict=True)] == [
                    [0 if part is None else len(part) for part, _ in step] for step in steps
                ]
            for feed in reversed(feeds):
                feed.close()


CONTRADICTIONS: list[tuple[Any, dict[str, Any], str]] = [
    (range(9), {"shuffle": True, "sampler": [1, 2]}, "got shuffle and sampler"),
    (range(9), {"weights": [1] * 9, "balance": [0] * 9}, "got weights and balance"),
    (range(9), {"lengths": [1] * 9, "sampler": [0] * 9}, "got lengths and sampler|got sampler and lengths"),
    (
        range(9),
        {"lengths": [1] * 9, "shuffle": True, "weights": [1] * 9},
        "got .*lengths.*weights|got .*weights.*lengths",
    ),
    (range(9), {"batch_sampler": [[1]], "sampler": [1]}, "got sampler and batch_sampler"),
    (range(9), {"batch_sampler": [[1]], "batch_size": 3}, "batch_size"),
    (range(9), {"batch_sampler": [[1]], "drop_last": True}, "drop_last"),
    (range(9), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    (range(9), {"lanes": 2}, "lanes= is for iterable data"),
    (range(9), {"timeout_s": 0}, "timeout_s"),
    (range(9), {"on_error": "skipp"}, r"on_error is 'raise' or 'skip' \(did you mean skip\?\)"),
    (range(9), {"cache": "dsk"}, r"cache is None or 'memory' or 'disk' \(did you mean disk\?\)"),
    (range(9), {"weights": [1] * 8}, "8 weights for 9 samples"),
    (range(9), {"lengths": [1] * 10}, "10 lengths for 9 samples"),
    (range(9), {"balance": iter([1])}, "labels for 9 samples"),
    (range(9), {"balance": True}, "balance=True needs `targets`, which a range does not have"),
    (range(9), {"lengths": True}, "lengths=True needs `lengths`, which a range does not have"),
    ({"x": torch.ones(3), "y": np.ones(4)}, {}, r"columns of a Loader have different lengths: \[3, 4\]"),
    (Stream(), {"shuffle": True}, "shuffle does not apply to an IterableDataset"),
    (Stream(), {"lengths": True}, "lengths does not apply"),
    (Stream(), {"cache": "memory"}, "cache does not apply"),
    (Stream(), {"on_error": "skip"}, "on_error does not apply"),
    (Stream(), {"lanes": 2}, "lanes=2 of a Stream with 1 shards"),
    (torch_data.DataLoader([1, 2]), {}, "got a torch DataLoader"),  # type: ignore[arg-type]
    (object(), {}, "a object has no length"),
]


@pytest.mark.parametrize(("dataset", "arguments", "text"), CONTRADICTIONS, ids=[c[2][:30] for c in CONTRADICTIONS])
def test_arguments_that_do_not_go_together(dataset: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Loader(dataset, **arguments).plan(2)


def test_lengths_and_labels_of_the_data_set() -> None:
    for given, told in (({"lengths": LENGTHS}, {"lengths": True}), ({"balance": LABELS}, {"balance": True})):
        assert Loader(Drawing(), 4, **given).batches(1, 1) == Loader(Drawing(), 4, **told).batches(1, 1)
    columns, rows = (torch.randn(N, 2), torch.tensor(LABELS)), list(range(0, N, 3))
    expected = Loader(range(N), 4, balance=LABELS).batches(1, 1)
    for data in (columns, TensorDataset(*columns), {"x": columns[0], "y": columns[1].numpy()}):
        assert Loader(data, 4, balance=True).batches(1, 1) == expected
    found = Loader(Subset(TensorDataset(*columns), rows), 4, balance=True).batches(1, 1)
    assert found == Loader(rows, 4, balance=[LABELS[i] for i in rows]).batches(1, 1)


class Table:
    """Read from its file when it is first asked for anything."""

    reads = 0

    def columns(self) -> tuple[torch.Tensor, ...]:
        self.reads += 1
        return torch.arange(12.0)[:, None], torch.arange(12) % 2

    def __len__(self) -> int:
        return len(self.columns()[0])

    def __getitem__(self, index: int) -> Any:
        return tuple(column[index] for column in self.columns())

    @property
    def lengths(self) -> list[int]:
        return [1] * len(self)

    targets = lengths


def test_nothing_is_read_when_a_recipe_is_built() -> None:
    table, model, loss = Table(), nn.Linear(1, 2), nn.CrossEntropyLoss()
    options: list[Any] = [{}, {"lengths": True}, {"balance": True}, {"augment": tuple}, {"cache": "memory"}]
    loaders = [Loader(table, 4, **given) for given in options]
    for loader in loaders:
        stoker.Recipe(model=model, loss=loss, optimizer=torch.optim.SGD, train=loader, val=loader)
    assert table.reads == 0
    assert [len(loader) for loader in loaders] == [12] * 5
    batch, _ = next(loaders[0].feed(0, workers=2).epoch(0))
    assert [part.tolist() for part in batch] == [[[0.0], [1.0], [2.0], [3.0]], [0, 1, 0, 1]]


def test_columns_are_what_sample_by_sample_would_give() -> None:
    x, y = np.arange(24.0).reshape(12, 2), np.arange(12)
    frozen = x.copy()
    frozen.setflags(write=False)
    for column in (x, x[::-1], x[:, ::-1], frozen, x.astype(">f4"), x.astype(np.uint16), torch.from_numpy(x)):
        native = np.asarray(column).astype(np.asarray(column).dtype.newbyteorder("="))
        for data in (column, (column, y), {"x": column, "y": y}):
            loader = Loader(data, 5, shuffle=True)
            for rows, (batch, _) in zip(loader.batches(2, 0), loader.feed(2).epoch(0), strict=True):
                expected = [torch.from_numpy(native[rows]), torch.from_numpy(y[rows])]
                found = [batch] if data is column else list(batch.values()) if isinstance(batch, dict) else batch
                assert all(torch.equal(a, b) for a, b in zip(found, expected[: len(found)], strict=True))
    subset = Subset(TensorDataset(torch.from_numpy(x)), [3, 1, 4, 1, 5, 9])
    for inner in ([5, 0, 2], np.array([5, 0, 2]), [-1, 0, 2]):
        (batch,) = (batch for batch, _ in Loader(Subset(subset, inner), 3).feed(0).epoch(0))
        assert torch.equal(batch[0], torch.from_numpy(x[[9, 3, 4]]))
    assert [batch for batch, _ in Loader(np.array(["a", "b", "c"]), 2).feed(0).epoch(0)] == [["a", "b"], ["c"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_augment_comes_last(workers: int) -> None:
    """After the data set's own reading, and after the cache, which keeps nothing of it; also of plain tensors."""
    columns = torch.arange(12.0), torch.arange(12)
    for data, cache in ((columns, None), (TensorDataset(*columns), None), (TensorDataset(*columns), "memory")):
        loader = Loader(data, 4, augment=lambda row: (row[0] + torch.rand(()), row[1]), cache=cache)
        assert len(loader) == 12
        feed = loader.feed(3, workers=workers)
        first, second = (torch.cat([b[0] for b, _ in feed.epoch(epoch)]) for epoch in (0, 1))
        again = torch.cat([b[0] for b, _ in loader.feed(3).epoch(1)])
        feed.close()
        assert torch.equal(first.floor(), columns[0]) and torch.equal(second.floor(), columns[0])
        assert not torch.equal(first, second) and torch.equal(second, again)
    feed = Loader(Stream(), 4, augment=lambda i: -i).feed(0, workers=workers)
    assert [i for batch, _ in feed.epoch(0) for i in batch.tolist()] == [-i for i in range(10)]
    (batch, _), *_ = Loader(columns, 4, collate=lambda rows: [int(y) for x, y in rows]).feed(0).epoch(0)
    assert batch == [0, 1, 2, 3]
