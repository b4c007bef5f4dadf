"""How many workers keep a device busy: found by rehearsing the run for a few seconds, not by a rule of thumb."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any, NamedTuple

from stoker.data.collating import Allocate
from stoker.data.limits import machine
from stoker.data.loader import Loader
from stoker.data.order import Batches
from stoker.data.pool import Pool, Work
from stoker.data.reader import Reader

_BUDGET_S = 4.0  # after which no further number is tried
_WINDOW_S = 0.35  # for each number of workers
_CHUNK_S = 0.02  # of reading: what a worker is asked for at a time, so that slow samples fit into a window
_LONG_STEP_S = 0.25  # a step longer than this is not rehearsed: arithmetic does
_PROBED = 4096  # samples, at most, that one worker reads first
_NEAR = 0.95  # of the best rate is as good: the fewest workers that reach it are taken
_MOST = 32  # workers


@dataclass(frozen=True)
class Choice:
    """A number of workers and what it rests on.

    Attributes:
        workers: how many.
        read_s: time to read and collate one batch, in one process.
        cpu_share: how much of that is computing; the rest is waiting for files or the network.
        step_s: time of a training step on a batch that is there.
        rates: workers -> samples/s of the whole pipeline, measured (0: by arithmetic).
        took_s: time that this took.
    """

    workers: int
    read_s: float
    cpu_share: float
    step_s: float
    rates: dict[int, float]
    took_s: float

    def __str__(self) -> str:
        tried = ", ".join(f"{workers}: {rate:.0f}" for workers, rate in sorted(self.rates.items()))
        kind = "computing" if self.cpu_share > 0.5 else "waiting for files"
        return (
            f"workers {self.workers}: reading a batch takes {self.read_s * 1e3:.3g} ms (mostly {kind}), a step "
            f"{self.step_s * 1e3:.3g} ms; samples/s by workers: {tried} (measured in {self.took_s:.1f} s)"
        )


class Reading(NamedTuple):
    """What reading some samples took in one worker, and a whole batch made of them."""

    sample_s: float
    collate_s: float
    cpu_share: float
    batch: Any


@dataclass(frozen=True)
class _Probe:
    """A worker's work: read for a while, then collate what was read, over and over, to a whole batch.

    Not done in the main process: a file that a data set opens at its first sample must not be shared by later forks.
    """

    reader: Reader
    batch_size: int

    def __call__(self, task: tuple[int, list[int]], allocate: Allocate, board: Any) -> Reading:
        epoch, indices = task
        self.reader.board = board
        start, cpu = time.perf_counter(), time.process_time()
        samples = list(self.reader.read(epoch, indices[:1])[0])
        took, readings = time.perf_counter() - start, list[float]()
        size = max(1, min(self.batch_size, int(_CHUNK_S / took)))  # as a batch is read, where samples are quick
        while time.perf_counter() - start < _WINDOW_S:
            at = 1 + len(readings) * size % max(len(indices) - size, 1)
            began = time.perf_counter()
            read = self.reader.read(epoch, indices[at : at + size])[0]
            readings.append((time.perf_counter() - began) / len(read))
            samples = (samples + read)[-self.batch_size :]  # no more: memory has to be used again, as in a run
        cpu_share = (time.process_time() - cpu) / (time.perf_counter() - start)
        whole = [samples[i % len(samples)] for i in range(self.batch_size)]
        collate_s = time_of(lambda: self.reader.join(epoch, indices, whole, None), lambda: None, _CHUNK_S)
        batch = self.reader.join(epoch, indices, whole, allocate)
        # The first sample opens files and imports modules: it counts where there is no other.
        return Reading(max(median(readings or [took]), 1e-8), collate_s, cpu_share, batch)


@dataclass(frozen=True)
class _Chunk:
    """A worker's work: read and collate a few samples; what comes back is as large as ever, but is not looked at."""

    reader: Reader

    def __call__(self, task: tuple[int, list[int]], allocate: Allocate, board: Any) -> Any:
        self.reader.board = board
        return self.reader.batch(*task, allocate).batch


def choose_workers(
    loader: Loader, seed: int, batch_size: int, step: Callable[[Any], None], settle: Callable[[], None]
) -> Choice:
    """Rehearse reading and training together for a few seconds and take the fewest workers that do nearly best.

    Args:
        loader: map-style data.
        seed: the run's.
        batch_size: samples a step.
        step: trains one step on a batch, on weights that do not matter.
        settle: waits until the device has finished.

    Raises:
        UserError: the data cannot be read.
    """
    began = time.perf_counter()
    reader, plan = loader.reader(seed), loader.plan(batch_size)
    chunks = _Chunks(plan, seed)
    with _pool(_Probe(reader, batch_size), chunks.of(_PROBED), 1, loader, reader) as pool:
        alone = next(pool)
    step_s = time_of(lambda: step(alone.batch), settle)
    read_s = alone.sample_s * batch_size + alone.collate_s
    rates = {0: batch_size / (step_s + read_s)}
    enough = _NEAR * batch_size / step_s  # the device is busy
    most = machine().cpus if alone.cpu_share > 0.5 else _MOST  # more than the cores only take them from one another
    needed = max(1, min(math.ceil(read_s / step_s / _NEAR), most))
    if rates[0] < enough and step_s > _LONG_STEP_S:
        return Choice(needed, read_s, alone.cpu_share, step_s, rates, time.perf_counter() - began)
    chunk = max(1, min(batch_size, round(_CHUNK_S / alone.sample_s)))

    def rate(workers: int) -> float:
        with _pool(_Chunk(reader), chunks.of(chunk), workers, loader, reader) as pool:
            found = rates[workers] = _together(pool, chunk, batch_size, step, settle, alone.batch)
        return found

    if rates[0] < enough:
        workers = needed
        if rate(workers) < enough and workers < most:
            rate(min(2 * workers, most))
        # Then ever fewer, as long as that costs nothing.
        while workers > 1 and rates[workers] >= _NEAR * max(rates.values()) and time.perf_counter() - began < _BUDGET_S:
            workers = -(-workers // 2)
            rate(workers)
    best = max(rates.values())
    chosen = min(workers for workers, rate in rates.items() if rate >= _NEAR * best)
    return Choice(chosen, read_s, alone.cpu_share, step_s, rates, time.perf_counter() - began)


class _Chunks:
    """Indices of ever further samples in the run's order, so that what one window has read is not read again."""

    def __init__(self, plan: Batches, seed: int) -> None:
        self._indices = self._all(plan, seed)

    @staticmethod
    def _all(plan: Batches, seed: int) -> Iterator[tuple[int, int]]:
        for epoch in count():
            for batch in range(plan.count(seed, epoch)):
                for index in plan.take(seed, epoch, batch, batch + 1)[0]:
                    yield epoch, int(index)

    def of(self, size: int) -> Iterator[tuple[int, list[int]]]:
        """Endless tasks of `size` samples."""
        while True:
            found = [next(self._indices) for _ in range(size)]
            yield found[0][0], [index for _, index in found]


@contextmanager
def _pool(work: Work, tasks: Iterator[Any], workers: int, loader: Loader, reader: Reader) -> Iterator[Pool]:
    pool = Pool(work, tasks, workers, loader.timeout_s, reader.name)
    try:
        yield pool
    finally:
        pool.close()


def time_of(task: Callable[[], Any], settle: Callable[[], None], seconds: float = _WINDOW_S) -> float:
    """Seconds that a task takes; its first time, which makes kernels and caches, is not counted."""
    took: list[float] = []
    began = time.perf_counter()
    while len(took) < 2 or (time.perf_counter() - began < seconds and len(took) < 200):
        start = time.perf_counter()
        task()
        settle()
        took.append(time.perf_counter() - start)
    return median(took[1:])


def _together(
    pool: Pool, chunk: int, batch_size: int, step: Callable[[Any], None], settle: Callable[[], None], batch: Any
) -> float:
    """Samples a second with a step whenever a batch's worth of them has come; what was read ahead is not counted."""
    samples, due, ahead = 0, 0, pool.workers * 2 * chunk
    began = started = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < _WINDOW_S or not samples:
        if time.perf_counter() - started > 4 * _WINDOW_S:
            break
        next(pool)
        due += chunk
        if due >= batch_size:
            due -= batch_size
            step(batch)
            settle()
        if ahead > 0:
            ahead -= chunk
            began = time.perf_counter()
        else:
            samples += chunk
    return samples / elapsed
