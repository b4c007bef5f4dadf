"""Iterable data: one order whoever reads it, found again after a kill, and refused where it cannot be."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

import stoker
from stoker import Loader, UserError
from tests.data.test_pool import forked
from tests.laws.runs import assert_same, final, wait


class Shards:
    """0, 1, 2 ... in shards of these sizes; the epochs that it is told of are noted."""

    def __init__(self, *sizes: int, first: int = 0) -> None:
        self.sizes, self.first, self.num_shards = sizes, first, len(sizes)
        self.epochs, self.rng = list[int](), np.random.default_rng(0)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def shard(self, num_shards: int, index: int) -> "Shards":
        assert num_shards == self.num_shards
        return type(self)(self.sizes[index], first=self.first + sum(self.sizes[:index]))

    def sample(self, number: int) -> Any:
        return number

    def __iter__(self) -> Iterator[Any]:
        yield from (self.sample(self.first + i) for i in range(sum(self.sizes)))


class Noisy(Shards):
    def sample(self, number: int) -> Any:
        return self.rng.random()


class Broken(Shards):
    def sample(self, number: int) -> Any:
        if number == 5:
            raise OSError("connection reset")
        return number


def epochs_of(loader: Loader, count: int = 2, workers: int = 0, **options: Any) -> list[list[tuple[Any, bool]]]:
    feed = loader.feed(3, workers=workers, **options)
    try:
        return [[(b.tolist() if b is not None else [], last) for b, last in feed.epoch(e)] for e in range(count)]
    finally:
        feed.close()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 11])
def test_batches_of_any_number_of_samples(n: int, drop_last: bool) -> None:
    expected = [list(range(i, min(i + 4, n))) for i in range(0, n, 4)]
    expected = [batch for batch in expected if len(batch) == 4 or not drop_last]
    data = Shards(n)
    for workers in (0, 1, 2, 4):
        for found in epochs_of(Loader(data, 4, drop_last=drop_last), workers=workers):
            assert found == [(batch, i == len(expected) - 1) for i, batch in enumerate(expected)]
    assert data.epochs == [0, 1]
    feed = Loader(data, 4).feed(0, evaluation=True)
    assert [len(list(feed.epoch(0))) for _ in range(2)] == [-(-n // 4)] * 2 and data.epochs == [0, 1, 0, 0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_any_position(workers: int, drop_last: bool) -> None:
    """From every batch on, in a feed of its own, and in one that was left in the middle of an epoch."""
    loader = Loader(Shards(22), 4, drop_last=drop_last)
    whole = [batch for batch, _ in epochs_of(loader)[0]]
    feed = loader.feed(3, workers=workers)
    for start in range(len(whole)):
        assert [b.tolist() for b, _ in loader.feed(3).epoch(0, start)] == whole[start:]
        batches = feed.epoch(0)
        assert [next(batches)[0].tolist() for _ in range(start)] == whole[:start]
        batches.close()
        assert [b.tolist() for b, _ in feed.epoch(0, start)] == whole[start:]
    feed.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_that_end_or_break(workers: int) -> None:
    for dataset in (Shards(0), Shards(0, 0), iter([])):
        with pytest.raises(UserError, match="yielded no sample in epoch 0"):
            epochs_of(Loader(dataset, 4), workers=workers)
    with pytest.raises(UserError, match="generator yielded no sample in epoch 1"):
        epochs_of(Loader((i for i in range(6)), 4))
    feed = Loader(Broken(9), 2).feed(0, workers=workers)
    with pytest.raises((OSError, UserError)) as caught:
        list(feed.epoch(0))
    text = str(caught.value) + " ".join(getattr(caught.value, "__notes__", []))
    assert "connection reset" in text and "position 5 of Broken in epoch 0" in text
    with pytest.raises((OSError, UserError)):  # it does not end there as if all had been read
        list(feed.epoch(0, 2))
    feed.close()
    with pytest.raises((RuntimeError, UserError)):  # a StopIteration in augment= is not the stream's end
        epochs_of(Loader(Shards(9), 2, augment=lambda i: next(iter([])) if i == 5 else i), workers=workers)


def test_own_generators_do_not_repeat() -> None:
    rng = np.random.default_rng(0)
    own = Loader(Shards(18), 4, augment=lambda x: rng.random())
    for loader in (Loader(Noisy(4, 5, 6, 3), 4, lanes=2), Loader(Noisy(18), 4), own):
        runs = [epochs_of(loader, workers=workers) for workers in (0, 2, 0)]
        assert runs[0] == runs[1] == runs[2]
        assert len({x for epoch in runs[0] for batch, _ in epoch for x in batch}) == 36


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_lanes_read_each_sample_once_in_one_order(lanes: int) -> None:
    """For any number of workers; ranks take slices of each batch."""
    loader = Loader(Shards(7, 0, 1, 9, 2, 0, 5), 8, lanes=lanes)
    here = epochs_of(loader, 3)
    for batches in here:
        assert sorted(chain(*(batch for batch, _ in batches))) == list(range(24))
        assert [last for _, last in batches] == [False] * (len(batches) - 1) + [True]
    for workers in (1, 2, 4):
        assert epochs_of(loader, 3, workers) == here
    for ranks in (2, 4):
        parts = [epochs_of(loader, 3, 2 * (rank == 1), rank=rank, ranks=ranks) for rank in range(ranks)]
        for batches, *slices in zip(here, *parts, strict=True):
            for batch, *pieces in zip(batches, *slices, strict=True):
                assert batch == (list(chain(*(piece for piece, _ in pieces))), pieces[0][1])
                assert max(len(p) for p, _ in pieces) - min(len(p) for p, _ in pieces) <= 1


def test_numbers_of_lanes_that_do_not_fit() -> None:
    """More than a batch has samples: refused, or read, but no run that never ends. Others than before: refused."""
    found = []
    try:
        for batch, _ in Loader(Shards(3, 3, 3, 3), 2, lanes=4).feed(0).epoch(0):
            found += batch.tolist()
            assert len(found) <= 12
    except UserError as error:
        assert "lanes" in str(error)
    else:
        assert sorted(found) == list(range(12))
    two, one = Loader(Shards(9, 9), 4, lanes=2).feed(0), Loader(Shards(9, 9), 4).feed(0)
    next(two.epoch(0))
    one.restore(json.loads(json.dumps(two.state(0, 1))))
    with pytest.raises(UserError, match=r"in 2 lanes, the recipe has lanes=1(.|\n)*lanes=2"):
        next(one.epoch(0, 1))


def mixed(samples: list[Any]) -> torch.Tensor:
    return torch.tensor(samples, dtype=torch.float64)[torch.randperm(len(samples))] + random.random()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_collate_function_that_draws_in_lanes(workers: int) -> None:
    """The same after a resume at every batch as without, and never the same draw twice."""
    loader = Loader(Shards(9, 2, 9, 12), 4, lanes=2, collate=mixed)
    whole = [batch for batch, _ in epochs_of(loader)[0]]
    assert len({batch[0] % 1 for batch in whole}) == len(whole)
    feed = loader.feed(3, workers=workers)
    states = [feed.state(0, batch) for batch, _ in enumerate(feed.epoch(0), 1)]
    feed.close()
    for start in range(1, len(whole)):
        again = loader.feed(3, workers=workers)
        again.restore(states[start - 1])
        assert [batch.tolist() for batch, _ in again.epoch(0, start)] == whole[start:]
        again.close()


class Rows(IterableDataset[Any]):
    """26 samples with noise from the global generators; `reads` is a file that grows by a byte a sample."""

    def __init__(self, reads: Path | None = None) -> None:
        self.reads, self.n, self.at = reads, 26, 0

    def row(self, i: int) -> Any:
        if self.reads is not None:
            with self.reads.open("ab") as file:
                file.write(b".")
        noise = 0.1 * (torch.randn(3) + np.random.normal() + random.gauss(0, 1))
        return (torch.arange(3) * 0.1 + i / self.n + noise).float(), i % 2

    def __iter__(self) -> Iterator[Any]:
        """Each worker its part, as torch's documentation has it."""
        info = get_worker_info()
        yield from map(self.row, range(info.id if info else 0, self.n, info.num_workers if info else 1))


class Stateful(Rows):
    """As torchdata's documentation has it."""

    def __iter__(self) -> Iterator[Any]:
        while self.at < self.n:
            self.at += 1
            yield self.row(self.at - 1)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "kept": (np.arange(3), torch.ones(2), {"a": None})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert isinstance(state["kept"], tuple) and int(state["kept"][0][2]) == 2
        self.at = state["at"]


class OffByOne(Stateful):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"] + 1


class Iterated(Rows):
    """The state is the iterator's."""

    def __iter__(self) -> Any:
        return Cursor(self)


class Cursor:
    def __init__(self, rows: Rows) -> None:
        self.rows, self.at = rows, 0

    def __next__(self) -> Any:
        if self.at == self.rows.n:
            raise StopIteration
        self.at += 1
        return self.rows.row(self.at - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Lanes(Shards):
    def sample(self, number: int) -> Any:
        return torch.rand(3) + number / 26, number % 2


def hugging_face(shuffled: bool, lanes: int = 1) -> stoker.Recipe:
    import datasets

    def rows(parts: list[int]) -> Iterator[Any]:
        for part in parts:
            yield from ({"x": [i / 26, part, 0.5], "y": i % 2} for i in range(part, 26, 4))

    found = datasets.IterableDataset.from_generator(rows, gen_kwargs={"parts": [0, 1, 2, 3]})
    found = found.shuffle(seed=5, buffer_size=6) if shuffled else found
    return recipe(found, lanes=lanes, collate=lambda rows: tuple(torch.tensor([r[k] for r in rows]) for k in "xy"))


def with_own_generator() -> stoker.Recipe:
    rng = np.random.default_rng(0)
    return recipe(Rows(), augment=lambda sample: (sample[0] + rng.normal(), sample[1]))


def recipe(dataset: Any, **loader: Any) -> stoker.Recipe:
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2)),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        train=Loader(dataset, 4, **loader),
    )


AGAIN, WRONG = "reading [0-9]+ samples of .* again", "the state_dict of .* does not go on where it was saved"
FEW, MANY = [(6, 1), (12, 0), (None, 2)], [(1, 2), (5, 0), (6, 1), (9, 2), (14, 4), (17, 0), (None, 2)]
# What to train on; the steps of the kills, and workers; what has to be said, all of it
KILLED: dict[str, tuple[Callable[[], stoker.Recipe], Any, list[str]]] = {
    "generator": (lambda: recipe(Rows()), MANY, [AGAIN]),
    "state": (lambda: recipe(Stateful()), MANY, []),
    "state, whole batches": (lambda: recipe(Stateful(), drop_last=True), MANY, []),
    "iterator's state": (lambda: recipe(Iterated()), MANY, []),
    "wrong state": (lambda: recipe(OffByOne()), FEW, [AGAIN, WRONG]),
    "generator of augment's own": (with_own_generator, FEW, [AGAIN]),
    "lanes": (lambda: recipe(Lanes(5, 0, 9, 1, 11), lanes=3), [(1, 2), (6, 1), (11, 4), (17, 2), (None, 4)], [AGAIN]),
    "Hugging Face": (lambda: hugging_face(False), FEW, []),
    "Hugging Face, shuffled": (lambda: hugging_face(True), FEW, [AGAIN, WRONG]),
    "Hugging Face, shuffled, in lanes": (lambda: hugging_face(True, 4), FEW, [AGAIN, WRONG]),
}


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed(name: str, tmp_path: Path) -> None:
    """The same weights, events and metrics as in one go, whatever the number of workers each time."""
    make, deaths, expected = KILLED[name]
    options: dict[str, Any] = {"epochs": 3, "seed": 1, "log_every": 4, "checkpoint_every": 2, "quiet": True}
    stoker.fit(make(), out=tmp_path / "whole", **options)
    log = tmp_path / "log"
    for step, workers in deaths:
        steps = [lambda progress, _, step=step: progress.step == step and os.kill(os.getpid(), signal.SIGKILL)]
        child = partial(stoker.fit, make(), out=tmp_path / "killed", workers=workers, on_step=steps, **options)
        assert wait(forked(child, log), log) == (-signal.SIGKILL if step else 0), log.read_text()
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert [text for text in (AGAIN, WRONG) if re.search(text, log.read_text())] == expected


@pytest.mark.parametrize("kind", [Stateful, Iterated])
def test_a_state_saves_reading_again(kind: Any, tmp_path: Path) -> None:
    reads, options = tmp_path / "reads", {"out": tmp_path / "run", "seed": 1, "quiet": True}
    stoker.fit(recipe(kind(reads)), steps=4, **options)
    assert reads.stat().st_size == 17
    reads.unlink()
    stoker.fit(recipe(kind(reads)), steps=5, **options)
    assert reads.stat().st_size <= 4 + 1


class Clock(Rows):
    def row(self, i: int) -> Any:
        return torch.tensor([time.time_ns() % 1e6, i, 0]).float(), i % 2


class Numbers(Shards):
    def sample(self, number: int) -> Any:
        return np.int64(time.time_ns())


class Shared(Rows):
    """Goes on where the last reader stopped, as an open socket does."""

    def __iter__(self) -> Iterator[Any]:
        while self.at < self.n:
            self.at += 1
            yield self.row(self.at - 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [Clock, Shared])
def test_other_data_are_refused(kind: Any, workers: int, tmp_path: Path) -> None:
    dataset = kind()
    made = recipe(dataset)
    options: dict[str, Any] = {"out": tmp_path / "run", "seed": 1, "quiet": True, "workers": workers}
    stoker.fit(made, steps=3, **options)
    dataset.at = 13  # also where a worker has read it
    with pytest.raises(UserError, match=rf"{kind.__name__} gave other samples .* up to position 12(.|\n)*--force"):
        stoker.fit(made, steps=5, **options)
    assert final(tmp_path / "run")["state"]["progress"]["step"] == 3
    dataset.at = 0
    assert stoker.fit(made, steps=5, force=True, **options).step == 5


def test_other_numbers_are_refused() -> None:
    one, two = (Loader(Numbers(9), 4).feed(0) for _ in range(2))
    next(one.epoch(0))
    two.restore(one.state(0, 1))
    with pytest.raises(UserError, match="Numbers gave other samples"):
        next(two.epoch(0, 1))


class Counted(Rows):
    """Another order every time that it is read, by a count of its own, which a new process begins anew."""

    def __iter__(self) -> Iterator[Any]:
        self.at += 1
        yield from map(self.row, np.random.default_rng(self.at).permutation(self.n))


@pytest.mark.parametrize("stop", [3, 7, 10])
def test_an_order_by_a_count_of_ones_own(stop: int, tmp_path: Path) -> None:
    """Exact, or refused; silently another one it must not be, nor where the stop is between two epochs."""
    options: dict[str, Any] = {"seed": 1, "quiet": True, "log_every": 1}
    stoker.fit(recipe(Counted()), steps=14, out=tmp_path / "whole", **options)
    stoker.fit(recipe(Counted()), steps=stop, out=tmp_path / "stopped", **options)
    try:
        stoker.fit(recipe(Counted()), steps=14, out=tmp_path / "stopped", **options)
    except UserError as error:
        assert "Counted gave other samples" in str(error)
    else:
        assert final(tmp_path / "whole")["tensors"] == final(tmp_path / "stopped")["tensors"]


def test_it_is_said_how_long_reading_again_takes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Slow(Rows):
        wait_s = 0.0

        def row(self, i: int) -> Any:
            time.sleep(self.wait_s if i == 1 else 0)
            return super().row(i)

    stoker.fit(recipe(Slow()), out=tmp_path / "run", steps=5, quiet=True)
    Slow.wait_s = 0.55
    stoker.fit(recipe(Slow()), out=tmp_path / "run", steps=6, quiet=True)
    (seconds,) = re.findall("reading 20 samples of Slow again to go on .*, about ([0-9]+) s", capfd.readouterr().err)
    assert 3 <= int(seconds) <= 60
