"""What data workers cost this machine: the Python objects that forked workers copy, and what bounds their number."""

import ctypes
import functools
import gc
import json
import logging
import math
import os
import select
import signal
import sys
import time
import types
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stoker.data.packing import Packed

_MANY = 1000  # objects, below which a holder is not worth a word
_OPENED = 64  # elements up to which a container is a crossroads, whose elements have paths of their own
_VISITS = 5_000  # objects that the walk looks into: a bound on its time
_SAMPLES = (1000, 32, 8)  # elements looked at of a container, of those in it, of those further down
_GLANCES = 50_000  # objects looked at to estimate one holder: about 50 ms
_PAGE = 4096

_LEAVES = (str, bytes, bytearray, memoryview, array, int, float, complex, type(None), torch.Tensor, Packed, range)
_OPAQUE = (types.ModuleType, type, types.CodeType, types.FrameType, types.BuiltinFunctionType, logging.Logger)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)


@dataclass(frozen=True)
class Holder:
    """An attribute that holds many Python objects: workers that are forked copy them as they read them."""

    path: str  # from the data set, "dataset.dataset.index['train']"
    kind: str  # "list of 5,000,000 dict"
    objects: int  # estimate
    size_bytes: int  # estimate of what the objects take


def holders(dataset: Any) -> list[Holder]:
    """Find the attributes of a data set that hold at least 1,000 Python objects, the largest first.

    Numbers and bytes are estimates from about 1,000 elements of a container; what more than one of those refers to,
    a small int or a class name, counts once. Arrays of numbers, tensors and Packed are one object each.
    """
    found: list[Holder] = []
    seen: dict[int, Any] = {}  # values, too: were one gone, another could come to have its id
    queue: deque[tuple[str, Any]] = deque([("dataset", dataset)])
    for _ in range(_VISITS):
        if not queue:
            break
        path, value = queue.popleft()
        if id(value) in seen or isinstance(value, (*_LEAVES, *_OPAQUE)):
            continue
        seen[id(value)] = value
        if _is_held(value):
            objects, size_bytes = _estimate(value)
            if objects >= _MANY:
                found.append(Holder(path, _describe(value), objects, size_bytes))
        else:
            queue.extend((path + step, part) for step, part in _parts(value))
    return sorted(found, key=lambda holder: -holder.size_bytes)


def _is_held(value: Any) -> bool:
    """Whether a value's elements are counted, rather than each looked into."""
    if isinstance(value, np.ndarray):
        return True
    return isinstance(value, _CONTAINERS) and len(value) > _OPENED


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value refers to, each with the step of the path that leads there."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple | deque):
        names = [f".{name}" for name in getattr(value, "_fields", ())]
        yield from zip(names or (f"[{i}]" for i in range(len(value))), value, strict=True)
    elif isinstance(value, set | frozenset):
        yield from (("{...}", part) for part in value)
    elif isinstance(value, functools.partial):
        yield from ((f".args[{i}]", part) for i, part in enumerate(value.args))
        yield from ((f".keywords[{name!r}]", part) for name, part in value.keywords.items())
        yield ".func", value.func
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        yield from _captured(value)
    elif type(value).__module__.partition(".")[0] == "pandas":
        yield from _columns(value)
        return
    yield from _attributes(value)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((f".{name}", part) for name, part in list(attributes.items()))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            slot = kind.__dict__.get(f"_{kind.__name__.lstrip('_')}{name}" if _is_mangled(name) else name)
            if isinstance(slot, types.MemberDescriptorType) and (part := _read(slot, value)) is not None:
                yield f".{name}", part


def _is_mangled(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def _read(slot: types.MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:  # not set
        return None


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".<closure>.{name}", cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _columns(value: Any) -> Iterator[tuple[str, Any]]:
    """Arrays behind a pandas DataFrame, Series or Index: those that hold Python objects are holders."""
    if hasattr(value, "columns"):
        yield from ((f"[{name!r}]", series) for name, series in value.items())
    elif hasattr(value, "array"):
        yield "", getattr(value.array, "_ndarray", None)  # absent where the column lies in Arrow or is a range
    if hasattr(value, "index"):
        yield ".index", value.index


# ------------------------------------------------------------------ how much a container holds


def _estimate(value: Any) -> tuple[int, int]:
    """Number of objects in a container and their bytes, scaled up from a sample."""
    tally = _Tally()
    looked_at = 0
    for element in _sample(value, _SAMPLES[0]):
        tally.add(element, looked_at)
        looked_at += 1
        if tally.glances > _GLANCES:
            break
    return tally.total(_length(value) / looked_at) if looked_at else (0, 0)


def _length(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return int(value.size) if value.dtype.hasobject else 0
    return len(value)


def _sample(value: Any, most: int) -> Iterator[Any]:
    """Up to `most` elements, spread where a container can be asked for any of them; of a dict (key, value) pairs."""
    if isinstance(value, dict):
        pairs, few = value.items(), len(value) <= most
        return starmap(_Pair, pairs if few else chain(islice(pairs, most // 2), islice(reversed(pairs), most // 2)))
    if isinstance(value, np.ndarray):
        if not value.dtype.hasobject:
            return iter(())
        value = value.flat
    if isinstance(value, list | tuple | np.flatiter):
        width = max(1, len(value) // most)  # one out of each so many, not always the first: data alternates
        return (value[start + start * 40503 // 64 % width] for start in range(0, len(value) - width + 1, width))
    return islice(value, most)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A dict's key and value while they are counted; not an object of the data."""

    key: Any
    value: Any


@dataclass
class _Tally:
    """Objects reached from the elements of a sample: those reached from one element only are its own."""

    glances: int = 0
    _alive: list[Any] = field(default_factory=list)  # ids are of these
    _own: dict[int, tuple[int, float, float]] = field(default_factory=dict)  # id: (element, objects, bytes)
    _shared: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, value: Any, element: int, weight: float = 1.0, depth: int = 1) -> None:
        """Count a value and what it holds for an element; `weight` is how many like it the sample stands for."""
        self.glances += 1
        if isinstance(value, _Pair):
            self.add(value.key, element, weight, depth)
            self.add(value.value, element, weight, depth)
            return
        if isinstance(value, _OPAQUE) or not self._is_new(value, element, weight) or isinstance(value, _LEAVES):
            return
        if depth > 6:
            return
        if isinstance(value, (*_CONTAINERS, np.ndarray)):
            length = _length(value)
            inner = list(_sample(value, _SAMPLES[min(depth, len(_SAMPLES) - 1)]))
            for part in inner:
                self.add(part, element, weight * length / len(inner), depth + 1)
        else:
            for _, part in islice(_parts(value), _SAMPLES[1]):
                self.add(part, element, weight, depth + 1)

    def _is_new(self, value: Any, element: int, weight: float) -> bool:
        key = id(value)
        if key in self._shared:
            return False
        if key in self._own:
            owner, objects, size = self._own[key]
            if owner != element:
                del self._own[key]
                self._shared[key] = 1.0, size / objects
            return False
        self._alive.append(value)
        self._own[key] = element, weight, weight * _size(value)
        return True

    def total(self, scale: float) -> tuple[int, int]:
        """Objects and bytes of the whole container, `scale` times as long as the sample."""
        objects = scale * sum(own[1] for own in self._own.values()) + len(self._shared)
        size = scale * sum(own[2] for own in self._own.values()) + sum(size for _, size in self._shared.values())
        return round(objects), round(size)


def _size(value: Any) -> int:
    """Bytes that a worker copies when it reads the object: at most a page of one that is a buffer."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return 112
    size = sys.getsizeof(value, 64) + (sys.getsizeof(value.__dict__) if hasattr(value, "__dict__") else 0)
    return min(size, _PAGE) if isinstance(value, str | bytes | bytearray | array) else size


def _describe(value: Any) -> str:
    sample = (part.value if isinstance(part, _Pair) else part for part in _sample(value, _SAMPLES[0]))
    kinds = sorted({type(part).__name__ for part in sample})
    of = kinds[0] if len(kinds) == 1 else f"objects ({', '.join(kinds[:4])}{', ...' if len(kinds) > 4 else ''})"
    name = "object array" if isinstance(value, np.ndarray) else type(value).__name__
    return f"{name} of {_length(value):,} {of}"


# ------------------------------------------------------------------ how much a worker grows


@dataclass(frozen=True)
class Growth:
    """Memory that a forked worker takes for itself as it reads."""

    samples: int  # that were read and counted
    copied_bytes: float  # a sample: pages that it had shared with its parent, and wrote to (reference counts)
    added_bytes: float  # a sample: memory that is new, such as a cache in the data set
    epoch_bytes: int  # of a worker that reads every sample once
    error: str = ""  # what went wrong instead


def growth(dataset: Any, indices: Sequence[int], seconds: float = 1.0) -> Growth | None:
    """Fork a worker, let it read samples, and see by how much its own memory grows.

    The first half warms up (imports, the allocator's stock); of the rest, in four parts, what grows in every part is
    counted. Samples are read by ascending index: where they are neighbours, what an epoch will take is truest. With
    slow samples, a few hundred bytes a sample are still the allocator's.

    Args:
        dataset: map-style.
        indices: samples that may be read; as many are as `seconds` allow.
        seconds: time for reading. The worker is ended after ten times as long.

    Returns:
        The growth, or None where processes do not fork, or do not tell their memory (outside Linux).
    """
    if not hasattr(os, "fork") or not _SMAPS.is_file():
        return None
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+ on forking beside torch's threads
        pid = os.fork()
    if pid == 0:
        _work(writable, lambda: _grow(dataset, sorted(map(int, indices)), seconds))
    try:
        os.close(writable)
        answer = _answer(readable, time.monotonic() + 10 * seconds)
    finally:
        os.kill(pid, signal.SIGKILL)  # it has not been waited for: the id is still its own
        _, status = os.waitpid(pid, 0)
        os.close(readable)
    if answer is None:
        return Growth(0, 0.0, 0.0, 0, f"reading in a forked process did not end within {10 * seconds:g} s")
    if not answer:
        return Growth(0, 0.0, 0.0, 0, f"reading in a forked process ended it ({_ended(status)})")
    return Growth(**json.loads(answer))


def _ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"


def _work(writable: int, task: Callable[[], dict[str, Any]]) -> None:
    """Run the task in a forked child, write what it returns as a line, and end the process whatever happens."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's, which ends this process
        torch.set_num_threads(1)  # as in a data worker: the parent's other threads do not exist here
        gc.freeze()  # a collection of what the parent made would write to all of it at once
        _give_back()
        os.write(writable, json.dumps(task()).encode() + b"\n")
    finally:
        os._exit(0)


def _give_back() -> None:
    """Return what malloc holds free to the system: used again, it would look like pages copied from the parent."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another libc than glibc
        return


def _answer(readable: int, deadline: float) -> bytes | None:
    """Read one line: empty where the child ended without, None where it is late."""
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([readable], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(readable, 1 << 16)
        if not part:
            return b""
        line += part
    return line


def _grow(dataset: Any, order: list[int], seconds: float) -> dict[str, Any]:
    """Read samples in this process; fields of a Growth."""
    try:
        done = _read_for(dataset, order[: len(order) // 2], seconds / 2)
        _memory()
        private, anonymous = _memory()
        shared = anonymous - private
        quarter, samples = math.ceil((len(order) - done) / 4), 0
        parts: list[tuple[float, float]] = []
        for _ in range(4):
            count = _read_for(dataset, order[done : done + quarter], seconds / 8)
            if not count:
                break
            now_private, now_anonymous = _memory()
            new = now_anonymous - anonymous
            parts.append(((now_private - private - new) / count, new / count))
            private, anonymous = now_private, now_anonymous
            done, samples = done + count, samples + count
    except Exception as error:
        return {"samples": 0, "copied_bytes": 0.0, "added_bytes": 0.0, "epoch_bytes": 0, "error": _said(error)}
    copied, added = (max(0.0, min((part[i] for part in parts), default=0.0)) for i in range(2))
    n = len(dataset) if hasattr(dataset, "__len__") else len(order)
    return {
        "samples": samples,
        "copied_bytes": copied,
        "added_bytes": added,
        "epoch_bytes": round(min(copied * n, shared) + added * n),
    }


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000] + "".join(f"; {note}" for note in getattr(error, "__notes__", []))


def _read_for(dataset: Any, indices: list[int], seconds: float) -> int:
    """Read samples for so long, at least one; return how many."""
    end = time.perf_counter() + seconds
    count = 0
    for index in indices:
        try:
            _touch(dataset[index])
        except Exception as error:
            error.add_note(f"while reading sample {index}")
            raise
        count += 1
        if time.perf_counter() > end:
            break
    return count


def _touch(sample: Any) -> None:
    """Refer to every value of a sample, as collate will: a data set that returns a dict it holds has read the dict."""
    for value in sample.values() if isinstance(sample, dict) else sample if isinstance(sample, list | tuple) else ():
        _touch(value)


_SMAPS = Path("/proc/self/smaps_rollup")


def _memory() -> tuple[int, int]:
    """Bytes of this process: written and no one else's; and all that is no file, shared with its parent or not."""
    gc.collect()
    lines = dict(line.split(":", 1) for line in _SMAPS.read_text().splitlines()[1:])
    private, anonymous = (int(lines[name].split()[0]) * 1024 for name in ("Private_Dirty", "Anonymous"))
    return private, anonymous
