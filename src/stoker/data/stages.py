"""How long the stages of reading take: a sample, its transforms, a batch."""

import functools
import sysconfig
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from stoker.data.seeding import isolated
from stoker.errors import UserError

_NAMES = ("transform", "transforms", "target_transform", "augment")  # attributes that hold transforms
_DEEP = 8  # wrappers in wrappers, transforms in transforms
_READINGS = 5
_QUICK_S = 0.05  # below, samples are read again: a reading is short enough for its clock to matter, and no disk's work
_FUNCTIONS = 8  # named where there are no transforms
_TRIFLE = 0.01  # share of the time below which a function is not worth a line


@dataclass(frozen=True)
class Stages:
    """Time that reading takes in one process with one thread, as in a data worker."""

    samples: int  # that were read
    decode_s: float  # a sample
    collate_s: float  # a batch
    cpu_share: float  # of the decode time, less that of waiting for a cpu; below about 0.5 it waits for disk or network


def stage_times(
    dataset: Any, collate: Callable[[list[Any]], Any], indices: Sequence[int], seconds: float = 2.0
) -> Stages:
    """Time ``dataset[i]`` and ``collate(samples)``; both are medians of several readings, after one to warm up.

    Args:
        dataset: map-style.
        collate: samples to batch.
        indices: those of one batch, at least one.
        seconds: time for reading samples. Where it ends first, the batch is filled up with those that were read.
    """
    order = _some(indices)
    with _as_in_a_worker():
        dataset[order[0]]
        samples, readings, cpu_share = _decode(dataset, order, seconds)
        batch = [samples[i % len(samples)] for i in range(len(order))]
        collate(batch)
        collates = [_clocked(lambda: collate(batch)) for _ in range(_READINGS)]
    return Stages(len(samples), median(readings), median(collates), cpu_share)


def _some(indices: Sequence[int]) -> list[int]:
    if not len(indices):
        raise UserError(
            "there is no sample whose reading could be timed", remedy="check what the data set is made from"
        )
    return [int(index) for index in indices]


def _decode(dataset: Any, order: list[int], seconds: float) -> tuple[list[Any], list[float], float]:
    """Read the samples in a few readings, over again where that is quick; seconds a sample of each reading."""
    samples: list[Any] = []
    readings: list[float] = []
    size = -(-len(order) // _READINGS)
    cpu, kept_out, start = time.thread_time(), _kept_out_s(), time.perf_counter()
    while True:
        for first in range(0, len(order), size):
            began, count = time.perf_counter(), 0
            for index in order[first : first + size]:
                sample = dataset[index]
                count += 1
                if len(samples) < len(order):
                    samples.append(sample)
                if time.perf_counter() - start > seconds:
                    break
            readings.append((time.perf_counter() - began) / count)
            if time.perf_counter() - start > seconds:
                break
        took = time.perf_counter() - start
        if took > min(_QUICK_S, seconds):
            busy = time.thread_time() - cpu
            return samples, readings, min(1.0, busy / max(took - _kept_out_s() + kept_out, busy))


def _kept_out_s() -> float:
    """Seconds that this thread has waited for a cpu so far: others' doing, no sign of slow storage."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # not Linux, or not counted by this kernel
        return 0.0


def _clocked(task: Callable[[], Any]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


@contextmanager
def _as_in_a_worker() -> Iterator[None]:
    """One thread, and the global generators and the number of threads left as they were."""
    threads = torch.get_num_threads()
    with isolated():
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


# ------------------------------------------------------------------ transforms


def transform_times(dataset: Any, indices: Sequence[int]) -> list[tuple[str, float]]:
    """Seconds a sample of each transform of a data set, as they are called; first "reading", which is all the rest.

    Transforms are found in the attributes `transform`, `transforms`, `target_transform` and `augment` of the data set
    and of those that it wraps as `.dataset`: a Compose, an nn.Sequential or a list of them, or any callable. They are
    timed in copies: the data set is not touched. Where none is found or called, the result is the functions that take
    the time (cumulative), those of the user's own files first, at most 8.

    Args:
        dataset: map-style.
        indices: samples to read, at least one; the first is read once more, to warm up.
    """
    order = _some(indices)
    with _as_in_a_worker():
        dataset[order[0]]
        clocks: dict[int, _Clock] = {}
        try:
            timed = _with_clocks(dataset, clocks)
            timed[order[0]]
            for clock in clocks.values():
                clock.seconds = 0.0
            total = _clocked(lambda: [timed[index] for index in order])
        except Exception:  # a transform that cannot be wrapped, or a sample that cannot be read: then that will tell
            return _profile(dataset, order)
        called = sorted((clock for clock in clocks.values() if clock.first), key=lambda clock: clock.first)
        if not called:
            return _profile(dataset, order)
    names = _apart([clock.name for clock in called])
    inside = sum(clock.seconds for clock in called)
    times = [(name, clock.seconds / len(order)) for name, clock in zip(names, called, strict=True)]
    return [("reading", max(0.0, total - inside) / len(order)), *times]


class _Clock:
    """Stands in for a transform and adds up the time that its calls take."""

    def __init__(self, transform: Any, name: str) -> None:
        self.transform, self.name, self.seconds, self.first = transform, name, 0.0, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.transform(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start
            self.first = self.first or start

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["transform"], name)


def _with_clocks(dataset: Any, clocks: dict[int, _Clock], depth: int = _DEEP) -> Any:
    """Copy of a data set, and of those that it wraps, with a clock for every transform."""
    held = getattr(dataset, "__dict__", {})
    changed = {
        name: _clocked_transform(held[name], clocks, "target: " if name == "target_transform" else "")
        for name in _NAMES
        if held.get(name) is not None
    }
    if depth and hasattr(held.get("dataset"), "__getitem__"):
        changed["dataset"] = _with_clocks(held["dataset"], clocks, depth - 1)
    return _copied(dataset, changed) if changed else dataset


def _copied(value: Any, changed: dict[str, Any]) -> Any:
    """Copy of an object that differs in some attributes; what they refer to is not copied."""
    kind: Any = type(value)
    twin = kind.__new__(kind)
    twin.__dict__.update(value.__dict__, **changed)
    return twin


def _clocked_transform(value: Any, clocks: dict[int, _Clock], prefix: str = "", depth: int = _DEEP) -> Any:
    """Copy of a transform in which each part that does something has a clock."""

    def inner(part: Any, mark: str = prefix) -> Any:
        return _clocked_transform(part, clocks, mark, depth - 1)

    if depth and isinstance(value, list | tuple):
        return type(value)([inner(part) for part in value]) if not hasattr(value, "_fields") else value
    if depth and type(value) is dict:
        return {key: inner(part) for key, part in value.items()}
    if depth and isinstance(value, nn.Sequential | nn.ModuleList):
        return _copied(value, {"_modules": {name: inner(part) for name, part in value._modules.items()}})
    if depth and type(value).__name__ == "Compose" and isinstance(getattr(value, "transforms", None), list):
        return _copied(value, {"transforms": inner(value.transforms)})
    if depth and type(value).__name__ == "StandardTransform":
        parts = {"transform": inner(value.transform), "target_transform": inner(value.target_transform, "target: ")}
        return _copied(value, parts)
    if not callable(value):
        return value
    if id(value) not in clocks:  # a data set may hold one transform under two names
        clocks[id(value)] = _Clock(value, prefix + _name(value))
    return clocks[id(value)]


def _name(transform: Any) -> str:
    while isinstance(transform, functools.partial):
        transform = transform.func
    name = getattr(transform, "__qualname__", None) or type(transform).__name__
    if isinstance(transform, types.BuiltinFunctionType):
        name = transform.__name__  # torch's own would be _VariableFunctionsClass.abs
    code = getattr(transform, "__code__", None)
    where = f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code and "<lambda>" in name else ""
    return name.rpartition("<locals>.")[2] + where


def _apart(names: list[str]) -> list[str]:
    """Names, numbered where they are the same."""
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


# ------------------------------------------------------------------ functions


def _profile(dataset: Any, order: list[int]) -> list[tuple[str, float]]:
    """Functions that reading spends its time in, with what they call; seconds a sample."""
    import cProfile

    profile = cProfile.Profile()
    profile.runcall(lambda: [dataset[index] for index in order])
    found: dict[str, tuple[bool, float]] = {}
    entries = profile.getstats()
    least = _TRIFLE * max((entry.totaltime for entry in entries), default=0.0)
    for entry in entries:
        own, name = _function(entry.code)
        if name and entry.totaltime >= least:
            found[name] = own, entry.totaltime + found.get(name, (own, 0.0))[1]
    ranked = sorted(found.items(), key=lambda item: (not item[1][0], -item[1][1]))
    return [(name, seconds / len(order)) for name, (_, seconds) in ranked[:_FUNCTIONS]]


def _function(code: Any) -> tuple[bool, str]:
    """Whether a profiled function is the user's own, and its name; no name for what belongs to the profile itself."""
    if isinstance(code, str):
        return False, "" if "_lsprof.Profiler" in code else code.strip("<>")
    file = Path(code.co_filename)
    if file == Path(__file__):
        return False, ""
    return not _is_library(code.co_filename), f"{file.name}:{code.co_firstlineno} {code.co_qualname}"


def _is_library(filename: str) -> bool:
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return filename.startswith(("<frozen", str(Path(__file__).parents[1]), *folders))
