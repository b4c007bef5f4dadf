"""How a run draws its batches: each feed yields an epoch's batches from any position, in the order's arithmetic."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from stoker.data.collating import Allocate
from stoker.data.order import Batches, Indices
from stoker.data.pool import Pool
from stoker.data.reader import Portion, Reader, Skipped
from stoker.interrupts import Interrupted, Interrupts

# Batches whose indices are computed at once: amortises the vectorised arithmetic to ~1 us a batch.
_BLOCK_BATCHES = 256
_STALL_S = 3.0  # of a stream, at the end of a run


class Feed(Protocol):
    """Batches of an epoch, from any position."""

    skipped: list[Skipped]  # samples left out of the batches so far; whoever counts them empties it

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        """Yield (batch, whether it is the epoch's last) from batch `start` on, reading nothing before it."""
        ...

    def state(self, epoch: int, batch: int) -> Any:
        """What finding the next batch again takes besides its position; None where that is all."""
        ...

    def restore(self, state: Any, *, force: bool = False) -> None:
        """Take over such a state; `force`: even where the data turn out to differ."""
        ...

    def cut(self, epoch: int, batch: int) -> None:
        """Stand before that batch, whether or not it has arrived: a signal ended the wait for it."""
        ...

    def close(self) -> None:
        """Release workers."""
        ...


def place_of(feed: Feed, interrupts: Interrupts, epoch: int, batch: int, *, finished: bool) -> Any:
    """State of a feed for a checkpoint. Between two epochs a stream reads the next one's beginning: a signal ends that,
    and where the run is about to end, a stall of some seconds.

    That of a stream so cut off is None: the epoch begins anew.
    """
    try:
        with interrupts.limit(_STALL_S) if interrupts.requested or finished else nullcontext():
            interrupts.waiting = True
            return feed.state(epoch, batch)
    except Interrupted:
        feed.cut(epoch, batch)
    finally:
        interrupts.waiting = False
    return feed.state(epoch, batch)


class Positional:
    """What feeds have in common whose batches are a function of (seed, epoch, position)."""

    def __init__(self) -> None:
        self.skipped: list[Skipped] = []

    def state(self, epoch: int, batch: int) -> Any:
        return None

    def restore(self, state: Any, *, force: bool = False) -> None:
        pass

    def cut(self, epoch: int, batch: int) -> None:
        pass

    def close(self) -> None:
        pass


class WholeFeed(Positional):
    """One object that is the batch of every step: an epoch is one step."""

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self._batch = batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        yield self._batch, True


class Gathers(Protocol):
    """In-memory data that can fetch many samples at once."""

    def take(self, indices: torch.Tensor) -> Any:
        """Gather rows."""
        ...


class TensorFeed(Positional):
    """In-memory tensors, a batch per gather. Worker processes could only slow it down, so it has none."""

    def __init__(self, columns: Gathers, batches: Batches, seed: int) -> None:
        super().__init__()
        self._columns, self._batches, self._seed = columns, batches, seed

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        count = self._batches.count(self._seed, epoch)
        take = self._columns.take
        for block in range(start, count, _BLOCK_BATCHES):
            stop = min(block + _BLOCK_BATCHES, count)
            indices = [torch.from_numpy(i) for i in self._batches.take(self._seed, epoch, block, stop)]
            last = len(indices) - 1 if stop == count else -1
            for i, index in enumerate(indices):
                yield take(index), i == last


class SampleFeed(Positional):
    """A map-style dataset read in this process."""

    def __init__(self, reader: Reader, batches: Batches, seed: int) -> None:
        super().__init__()
        self._reader, self._batches, self._seed = reader, batches, seed

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        count = self._batches.count(self._seed, epoch)
        for block in range(start, count, _BLOCK_BATCHES):
            stop = min(block + _BLOCK_BATCHES, count)
            for i, indices in enumerate(self._batches.take(self._seed, epoch, block, stop), block):
                batch, skipped = self._reader.batch(epoch, indices.tolist())
                self.skipped += skipped
                yield batch, i == count - 1


class _Read:
    """The workers' work: a task is an epoch and the indices of a batch."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __call__(self, task: tuple[int, Indices], allocate: Allocate, board: Any) -> Portion:
        self._reader.board = board
        return self._reader.batch(task[0], task[1].tolist(), allocate)


def _tasks(batches: Batches, seed: int, epoch: int, start: int, repeat: bool) -> Iterator[tuple[int, Indices]]:
    """Batches of all epochs to come, so that workers prefetch across an epoch's end."""
    while True:
        count = batches.count(seed, epoch)
        for block in range(start, count, _BLOCK_BATCHES):
            stop = min(block + _BLOCK_BATCHES, count)
            for indices in batches.take(seed, epoch, block, stop):
                yield epoch, indices
        epoch, start = epoch if repeat else epoch + 1, 0


class WorkerFeed(Positional):
    """A map-style dataset read by worker processes, kept alive and prefetching from epoch to epoch."""

    def __init__(
        self, reader: Reader, batches: Batches, seed: int, workers: int, *, timeout_s: float, repeat: bool
    ) -> None:
        super().__init__()
        self._reader, self._batches, self._seed = reader, batches, seed
        self._workers, self._timeout_s, self._repeat = workers, timeout_s, repeat
        self._next: tuple[int, int] | None = None
        self._pool: Pool | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        if self._pool is None or self._next != (epoch, start):
            self.close()
            tasks = _tasks(self._batches, self._seed, epoch, start, self._repeat)
            self._pool = Pool(_Read(self._reader), tasks, self._workers, self._timeout_s, self._reader.name)
        count = self._batches.count(self._seed, epoch)
        for i in range(start, count):
            try:
                portion = next(self._pool)
            except BaseException:
                self.close()  # whoever asks for this batch again shall get it, or its error
                raise
            last = i == count - 1
            following = epoch if self._repeat else epoch + 1
            self._next = (following, 0) if last else (epoch, i + 1)
            self.skipped += portion.skipped
            yield portion.batch, last

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
