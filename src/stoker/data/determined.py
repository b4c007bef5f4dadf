"""Which part of a sample is random: the transforms from the first that draws on. Measured, not assumed."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from stoker.data.fingerprint import fingerprint
from stoker.data.generators import States, generators_of, reseed, untouched
from stoker.data.reader import file_of
from stoker.data.reads import Recording, bytes_read, recording, state_of
from stoker.data.samplecodec import decode, encode
from stoker.data.seeding import SAMPLE, fold, seed_all
from stoker.errors import UserError

_PROBE_S = 2.0  # fewer samples (but two) are looked at where they take longer than this
_SLOTS_OF_PYTHON = ("__dict__", "__weakref__")

Transform = Callable[..., Any]


class Unfit(Exception):
    """Why what is random cannot be told from what is not, or a sample is not made as the first ones were."""


# ---- the split


@dataclass
class Head:
    """The transforms up to the first that draws; remembers what it returned, by which its place is found again."""

    steps: list[Transform]
    results: list[tuple[Any, ...]] = field(default_factory=list)

    def __call__(self, *inputs: Any) -> Any:
        results = _run(self.steps, inputs)
        self.results.append(results)
        return results if len(results) > 1 else results[0]


@dataclass(frozen=True)
class Split:
    """A data set whose transform is the part that draws nothing, and the transforms that are left."""

    source: Any
    head: Head | None = None  # the transform of `source`; None where whole samples are kept
    rest: tuple[Transform, ...] = ()
    keys: tuple[Any, ...] = ()  # where in a sample the head's results are; none: it is the sample

    def begin(self, row: int) -> Any:
        """Return what of a sample can be kept.

        Raises:
            Unfit: its transform was not called as for the first samples.
        """
        head = self.head
        if head is None:
            return self.source[row]
        head.results = []
        sample = self.source[row]
        results, head.results = head.results, []
        if len(results) != 1 or _keys_of(sample, results[0]) != self.keys:
            raise Unfit("its transform is called otherwise than for the first samples")
        return sample

    def finish(self, begun: Any) -> Any:
        """Apply the transforms that are left."""
        if not self.rest:
            return begun
        if not self.keys:
            return _run(self.rest, (begun,))[0]
        return _with(begun, self.keys, _run(self.rest, tuple(begun[key] for key in self.keys)))


def _run(steps: Sequence[Transform], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Call one transform after the other, as torchvision's Compose does."""
    for step in steps:
        result = step(*inputs)
        inputs = tuple(result) if len(inputs) > 1 else (result,)
    return inputs


def _steps_of(transform: Any) -> list[Transform]:
    """Transforms that a composition calls in turn."""
    kind = type(transform)
    plain = not any(getattr(transform, name, None) for name in ("_forward_hooks", "_forward_pre_hooks"))
    composed = kind.__name__ == "Compose" and kind.__module__.startswith("torchvision.transforms")
    if plain and composed:
        return [step for part in transform.transforms for step in _steps_of(part)]
    if plain and kind is nn.Sequential:
        return [step for part in transform for step in _steps_of(part)]
    return [transform]


def _keys_of(sample: Any, results: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Where in a sample these very objects are; () if it is the only one; None if they are not there."""
    if len(results) == 1 and sample is results[0]:
        return ()
    if isinstance(sample, list | tuple):
        places: list[tuple[Any, Any]] = list(enumerate(sample))
    elif type(sample) is dict:
        places = list(sample.items())
    else:
        return None
    keys = tuple(next((key for key, part in places if part is result), None) for result in results)
    return None if None in keys or len(set(keys)) < len(keys) else keys


def _with(sample: Any, keys: tuple[Any, ...], parts: tuple[Any, ...]) -> Any:
    """Return a sample with other parts at these keys."""
    new = dict(zip(keys, parts, strict=True))
    if isinstance(sample, dict):
        return {**sample, **new}
    values = [new.get(i, part) for i, part in enumerate(sample)]
    return type(sample)(*values) if hasattr(sample, "_fields") else type(sample)(values)


# ---- copies of a data set


def _holder(base: Any) -> tuple[list[Any], str] | None:
    """Chain of data sets down to the one that has a transform, and its attribute's name."""
    chain = [base]
    for _ in range(8):
        for name in ("transform", "transforms"):
            if callable(getattr(chain[-1], name, None)):
                return chain, name
        inner = getattr(chain[-1], "dataset", None)
        if inner is None:
            return None
        chain.append(inner)
    return None


def _shallow(value: Any) -> Any:
    """Copy of an object that shares its attributes: a file that it opens later is not opened for the original."""
    if not hasattr(value, "__dict__") or isinstance(value, list | tuple | dict | torch.Tensor | np.ndarray):
        return value
    try:
        copy = object.__new__(type(value))
    except TypeError:  # derived from a type of C
        return value
    copy.__dict__.update(value.__dict__)
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in _SLOTS_OF_PYTHON and hasattr(value, name):
                object.__setattr__(copy, name, getattr(value, name))
    return copy


def _rebuilt(base: Any, transform: Transform | None) -> Any:
    """Copy of a data set, with another transform; the original stays as it is.

    Raises:
        Unfit: the transform cannot be exchanged.
    """
    found = _holder(base)
    if found is None or transform is None:
        return _shallow(base)
    chain, name = found
    inner = _shallow(chain[-1])
    if inner is chain[-1]:
        raise Unfit("its transform cannot be exchanged")
    old = getattr(inner, name)
    try:
        object.__setattr__(inner, name, transform)
        joint = getattr(inner, "transforms", None)  # torchvision keeps (transform, target_transform) there as well
        if joint is not None and name == "transform" and getattr(joint, "transform", None) is old:
            inner.transforms = _shallow(joint)
            inner.transforms.transform = transform
        for outer in reversed(chain[:-1]):
            copy = _shallow(outer)
            object.__setattr__(copy, "dataset", inner)
            inner = copy
    except AttributeError as error:
        raise Unfit(f"its transform cannot be exchanged: {error}") from None
    return inner


# ---- looking at the first samples


@dataclass(frozen=True)
class Probe:
    """What the first samples showed."""

    split: Split
    sample_bytes: int = 1  # mean, of what is kept
    common: tuple[str, ...] = ()  # files that were opened once for many samples


@dataclass
class _Watch:
    """All transforms, one by one; notes the states around a call, and which transform was the first to draw."""

    steps: list[Transform]
    generators: list[Any]
    first_draw: int | None = None
    entered: list[States] = field(default_factory=list)
    left: list[States] = field(default_factory=list)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if named:
            raise Unfit("its transform is called with keyword arguments")
        start = States.now(self.generators)
        self.entered.append(start)
        for i, step in enumerate(self.steps):
            inputs = _run([step], inputs)
            if self.first_draw is None and States.now(self.generators) != start:
                self.first_draw = i
        self.left.append(States.now(self.generators))
        return inputs if len(inputs) > 1 else inputs[0]

    def read(self, source: Any, row: int) -> tuple[Any, Recording, list[int]]:
        """Sample, files, and the transform that drew first, as a list of at most one."""
        _seed(source, row)
        self.first_draw, self.entered, self.left = None, [], []
        start = States.now(self.generators)
        with recording() as record:
            sample = source[row]
        end = States.now(self.generators)
        if start == end:
            return sample, record, []
        if len(self.entered) != 1:
            where = f", and calls its transform {len(self.entered)} times" if self.entered else ""
            raise Unfit(f"sample {row} draws random numbers in __getitem__{where}")
        if self.first_draw is None or self.entered[0] != start or self.left[0] != end:
            raise Unfit(f"sample {row} draws random numbers in __getitem__, outside of its transform")
        return sample, record, [self.first_draw]


def probe(base: Any, rows: list[int]) -> Probe:
    """Find where samples begin to be random, on some of them. Leaves all generators and the data set as they were.

    Args:
        base: a map-style data set.
        rows: samples to look at.

    Raises:
        UserError: they are random elsewhere than in a transform, differ from one reading to the next, hold something
            that cannot be kept, or are read from files that nobody can name.
    """
    if not rows:
        return Probe(Split(base))
    generators = generators_of(base)
    with untouched(generators):
        try:
            found = _holder(base)
            steps = _steps_of(getattr(found[0][-1], found[1])) if found is not None else []
            watched = _watched(base, rows, _Watch(steps, generators))
            split = _split_at(base, steps, watched)
            size = _checked(base, split, watched.rows, generators)
            source = _rebuilt(base, split.head)  # what was opened while looking is not for the processes to come
            return Probe(Split(source, split.head, split.rest, split.keys), size, watched.common)
        except Unfit as reason:
            raise UserError(
                f"the samples of {type(base).__name__} cannot be cached: {reason}",
                why="what is random would come out the same in every epoch",
                remedy="move what is random into the data set's `transform`, or into Loader(augment=...), which comes "
                "after the cache; or leave out cache=",
            ) from None


@dataclass(frozen=True)
class _Watched:
    rows: list[int]  # that could be read
    first_draw: int | None
    common: tuple[str, ...]


def _watched(base: Any, rows: list[int], watch: _Watch) -> _Watched:
    """Read samples twice from one copy of the data set: what it opens only once is open for many."""
    source = _rebuilt(base, watch)
    seen: list[int] = []
    first_draws: list[int] = []
    common: set[str] = set()
    failed: Exception | None = None
    deadline = time.monotonic() + _PROBE_S
    for row in rows:
        if len(seen) > 1 and time.monotonic() > deadline:
            break
        try:
            sample, before, draws = watch.read(source, row)
        except Unfit:
            raise
        except Exception as error:  # raised when it is its turn, or skipped, as without a cache
            failed = error
            continue
        start = bytes_read()
        again, record, _ = watch.read(source, row)
        stop = bytes_read()
        if fingerprint(sample, f"sample {row}") != fingerprint(again, f"sample {row}"):
            raise Unfit(f"sample {row} comes out differently when it is read again, with the same seeds")
        common |= set(before.opened) - set(record.opened) - before.written
        named = record.opened or common or named_files(base, row)
        if start and stop and stop[0] - start[0] > start[1] and not named:
            raise _nameless(base, row)
        seen.append(row)
        first_draws += draws
    if not seen and failed is not None:
        raise failed
    there = sorted(path for path in common if state_of(path) is not None)
    return _Watched(seen, min(first_draws, default=None), tuple(there))


def _split_at(base: Any, steps: list[Transform], watched: _Watched) -> Split:
    if watched.first_draw is None:
        return Split(_shallow(base))
    head = Head(steps[: watched.first_draw])
    source = _rebuilt(base, head)
    sample = source[watched.rows[0]]
    keys = _keys_of(sample, head.results[0])
    head.results = []
    if keys is None:
        raise Unfit("what its transform returns is changed, or is not in the sample, afterwards")
    return Split(source, head, tuple(steps[watched.first_draw :]), keys)


def _checked(base: Any, split: Split, rows: list[int], generators: list[Any]) -> int:
    """Mean size (bytes) of what is kept, having compared the samples made of it with the data set's own."""
    original, sizes = _shallow(base), []
    for row in rows:
        _seed(base, row)
        expected, after = original[row], States.now(generators)
        _seed(base, row)
        header, payload = encode(split.begin(row), f"sample {row}")
        sizes.append(len(header) + len(payload))
        sample = split.finish(decode(header, payload))
        if States.now(generators) != after or fingerprint(sample) != fingerprint(expected):
            raise Unfit(f"sample {row} comes out differently when its random transforms are applied afterwards")
    return sum(sizes) // len(sizes)


def _seed(dataset: Any, row: int) -> None:
    key = fold(0, SAMPLE, 0, row)
    seed_all(key)
    for generator in generators_of(dataset):
        reseed(generator, key)


def named_files(base: Any, row: int) -> list[str]:
    """Files that a sample comes from, by the data set's own account: `file_of(index)`, or torchvision's attributes."""
    told = file_of(base, row)
    if told is None:
        return []
    for name in (told, told.rpartition(", ")[0]):  # "adult.csv, row 31000"
        for root in ("", str(getattr(base, "root", None) or "")):
            path = os.path.abspath(os.path.join(root, name))
            if name and os.path.isfile(path):
                return [path]
    return []


def _nameless(base: Any, row: int) -> UserError:
    return UserError(
        f"cannot tell which files sample {row} of {type(base).__name__} is read from",
        why="code in C reads them, or they were opened before: the cache would not notice that they change",
        remedy="give the data set a method file_of(index) that returns the path; or leave out cache=",
    )
