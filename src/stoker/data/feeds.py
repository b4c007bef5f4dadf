"""How a run draws its batches: each feed yields an epoch's batches from any position, in the order's arithmetic."""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, default_collate

from stoker.data.order import Batches
from stoker.data.seeding import COLLATE, SAMPLE, draws, fold, seed_all
from stoker.errors import UserError, told

# Batches whose indices are computed at once: amortises the vectorised arithmetic to ~1 us a batch.
_BLOCK_BATCHES = 256

_UNDRAWN = fold(0, SAMPLE)  # a seed that nobody chooses

Collate = Callable[[list[Any]], Any]


class Feed(Protocol):
    """Batches of an epoch, from any position."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        """Yield (batch, whether it is the epoch's last) from batch `start` on, reading nothing before it."""
        ...

    def close(self) -> None:
        """Release workers."""
        ...


class WholeFeed:
    """One object that is the batch of every step: an epoch is one step."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        yield self._batch, True

    def close(self) -> None:
        pass


class Gathers(Protocol):
    """In-memory data that can fetch many samples at once."""

    def take(self, indices: torch.Tensor) -> Any:
        """Gather rows."""
        ...


class TensorFeed:
    """In-memory tensors, a batch per gather. Worker processes could only slow it down, so it has none."""

    def __init__(self, columns: Gathers, batches: Batches, seed: int) -> None:
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

    def close(self) -> None:
        pass


class Reader:
    """Reads and collates batches; sample (epoch, index) draws from generators seeded by (seed, epoch, index).

    Seeding costs 8 us a sample, more than many samples do. Where the first batch's samples drew nothing, the
    generators are seeded once a batch and looked at after it; should a sample have drawn after all, that batch is
    read again with a seed for every sample, and so is all that follows.
    """

    def __init__(self, dataset: Any, collate: Collate, seed: int) -> None:
        self._dataset, self._collate, self._seed = dataset, collate, seed
        self._undrawn: tuple[float, float, float] | None = None  # draws after that seed, if the first batch drew none
        self._known = False

    def batch(self, epoch: int, indices: list[int]) -> Any:
        """Read and collate; a collate function that draws, to mix samples say, is keyed by the batch's first."""
        samples = self._read(epoch, indices)
        if self._collate is not default_collate:
            seed_all(fold(self._seed, COLLATE, epoch, indices[0]))
        return self._collate(samples)

    def _read(self, epoch: int, indices: list[int]) -> list[Any]:
        if self._undrawn is not None:
            seed_all(_UNDRAWN)
            samples = self._get(epoch, indices)
            if draws() == self._undrawn:
                return samples
            self._undrawn = None
        if self._known or torch.cuda.is_initialized():  # a CUDA generator's draws are not looked at
            return [sample for index in indices for sample in self._keyed(epoch, index)]
        self._known = True
        return self._first_batch(epoch, indices)

    def _first_batch(self, epoch: int, indices: list[int]) -> list[Any]:
        samples, drawn = [], False
        for index in indices:
            samples += self._keyed(epoch, index)
            after = draws()
            seed_all(fold(self._seed, SAMPLE, epoch, index))
            drawn = drawn or after != draws()
        if not drawn:
            seed_all(_UNDRAWN)
            self._undrawn = draws()
        return samples

    def _keyed(self, epoch: int, index: int) -> list[Any]:
        seed_all(fold(self._seed, SAMPLE, epoch, index))
        return self._get(epoch, [index])

    def _get(self, epoch: int, indices: list[int]) -> list[Any]:
        dataset, samples = self._dataset, []
        try:
            for index in indices:
                samples.append(dataset[index])
            return samples
        except Exception as error:
            error.add_note(f"while reading sample {index} in epoch {epoch}")
            raise


class SampleFeed:
    """A map-style dataset read in this process."""

    def __init__(self, dataset: Any, batches: Batches, collate: Collate, seed: int) -> None:
        self._reader, self._batches, self._seed = Reader(dataset, collate, seed), batches, seed

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        count = self._batches.count(self._seed, epoch)
        for block in range(start, count, _BLOCK_BATCHES):
            stop = min(block + _BLOCK_BATCHES, count)
            for i, indices in enumerate(self._batches.take(self._seed, epoch, block, stop), block):
                yield self._reader.batch(epoch, indices.tolist()), i == count - 1

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Failure:
    """An exception in a worker, in words: the exception itself may not survive the journey."""

    what: str
    why: str


class _WorkerSide:
    """A Reader in a worker; what goes wrong there comes back as a `_Failure`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitems__(self, key: tuple[int, list[int]]) -> Any:
        try:
            return self._reader.batch(*key)
        except Exception as error:
            message = told(error, "reading the data")
            return _Failure(message.what, message.why)


class _Stream:
    """Batch sampler over all epochs to come, so that workers prefetch across an epoch's end."""

    def __init__(self, batches: Batches, seed: int, epoch: int, start: int, repeat: bool) -> None:
        self._batches, self._seed, self._epoch, self._start, self._repeat = (
            batches,
            seed,
            epoch,
            start,
            repeat,
        )

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, start = self._epoch, self._start
        while True:
            count = self._batches.count(self._seed, epoch)
            for block in range(start, count, _BLOCK_BATCHES):
                stop = min(block + _BLOCK_BATCHES, count)
                for indices in self._batches.take(self._seed, epoch, block, stop):
                    yield [epoch, indices.tolist()]
            epoch, start = epoch if self._repeat else epoch + 1, 0


def _as_is(batch: Any) -> Any:
    return batch


def _quiet_worker(_: int) -> None:
    """Leave a signal sent to the whole job to the main process, which needs its workers to finish the step.

    The second SIGTERM ends a worker: the first may be the scheduler's, a later one is the loader's own shutdown.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class WorkerFeed:
    """A map-style dataset read by worker processes, kept alive and prefetching from epoch to epoch."""

    def __init__(
        self,
        dataset: Any,
        batches: Batches,
        collate: Collate,
        seed: int,
        workers: int,
        *,
        pin_memory: bool,
        repeat: bool,
    ) -> None:
        self._reader, self._batches, self._seed = Reader(dataset, collate, seed), batches, seed
        self._workers, self._pin_memory, self._repeat = workers, pin_memory, repeat
        self._next: tuple[int, int] | None = None
        self._iterator: Iterator[Any] | None = None

    def _open(self, epoch: int, start: int) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            _WorkerSide(self._reader),  # type: ignore[arg-type]
            batch_sampler=_Stream(self._batches, self._seed, epoch, start, self._repeat),
            collate_fn=_as_is,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_quiet_worker,
        )
        return iter(loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        if self._iterator is None or self._next != (epoch, start):
            self.close()
            self._iterator = self._open(epoch, start)
        count = self._batches.count(self._seed, epoch)
        for i in range(start, count):
            batch = self._read()
            last = i == count - 1
            following = epoch if self._repeat else epoch + 1
            self._next = (following, 0) if last else (epoch, i + 1)
            yield batch, last

    def _read(self) -> Any:
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except RuntimeError as error:  # a worker that was killed
            raise UserError(
                f"a data worker ended: {error}", remedy="fewer --workers need less memory; --workers 0 has none"
            ) from error
        if isinstance(batch, _Failure):
            raise UserError(batch.what, why=batch.why)
        return batch

    def close(self) -> None:
        iterator, self._iterator = self._iterator, None
        if iterator is not None:  # a traceback may hold it: its finaliser would come too late
            iterator._shutdown_workers()  # type: ignore[attr-defined]


class IterableFeed:
    """An IterableDataset read in this process.

    It cannot be asked for a position: to begin at batch `start`, the samples before it are read again and dropped,
    and a line on stderr says how many.
    """

    def __init__(self, dataset: Any, batch_size: int, drop_last: bool, collate: Collate, seed: int) -> None:
        self._dataset, self._batch_size, self._drop_last = dataset, batch_size, drop_last
        self._collate, self._seed = collate, seed

    def _samples(self, epoch: int) -> Iterator[Any]:
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        seed_all(fold(self._seed, SAMPLE, epoch, -1))
        samples = iter(self._dataset)
        position = 0
        while True:
            # Steps reseed the generators in between; keyed by position, a replay draws what the first reading drew.
            seed_all(fold(self._seed, SAMPLE, epoch, position))
            try:
                sample = next(samples)
            except StopIteration:
                return
            yield sample
            position += 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        samples = self._samples(epoch)
        if start:
            skipped = start * self._batch_size
            print(
                f"stoker: reading {skipped} samples again to reach batch {start} (iterable data)",
                file=sys.stderr,
            )
            for _ in islice(samples, skipped):
                pass
        chunk = list(islice(samples, self._batch_size))
        if not chunk and start == 0:
            raise UserError(f"the {type(self._dataset).__name__} yielded no sample in epoch {epoch}")
        while chunk:
            following = list(islice(samples, self._batch_size))
            if self._drop_last and len(following) < self._batch_size:
                following = []
            yield self._collate(chunk), not following
            chunk = following

    def close(self) -> None:
        pass
