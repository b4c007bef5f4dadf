"""The random generators that a sample may draw from, and where they are in their sequences."""

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from stoker.data.fingerprint import fingerprint

_KINDS = (np.random.Generator, np.random.RandomState, torch.Generator, random.Random)
_DEPTH = 10  # how deep in a data set's attributes they are looked for,
_WIDTH = 64  # how long a list of them may be,
_VISITS = 5_000  # and how many objects are looked at


def generators_of(dataset: Any) -> list[Any]:
    """Random generators that a data set or its transforms hold of their own.

    Forked workers would all draw the same numbers from them, and no checkpoint knows how far they are: so they are
    seeded as the global ones are.
    """
    found: list[Any] = []
    seen: set[int] = set()
    pending = deque([(dataset, 0)])
    while pending and len(seen) < _VISITS:
        node, depth = pending.popleft()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, _KINDS):
            found.append(node)
        elif depth < _DEPTH:
            pending += [(part, depth + 1) for part in _parts_of(node)]
    return found


def _parts_of(node: Any) -> list[Any]:
    if isinstance(node, list | tuple):
        return list(node) if len(node) <= _WIDTH else []
    if isinstance(node, Mapping):
        return list(node.values()) if len(node) <= _WIDTH else []
    if isinstance(node, type | ModuleType | torch.Tensor | Path):
        return []
    if isinstance(node, partial):
        return [node.func, *node.args, *node.keywords.values()]
    if isinstance(node, MethodType):
        return [node.__self__]
    if isinstance(node, FunctionType):
        cells = [cell.cell_contents for cell in node.__closure__ or () if cell != CellType()]
        return [*cells, *(node.__defaults__ or ()), *vars(node).values()]
    slots = [name for kind in type(node).__mro__ for name in vars(kind).get("__slots__", ()) if isinstance(name, str)]
    held = [getattr(node, name) for name in slots if not name.startswith("__") and hasattr(node, name)]
    return [*getattr(node, "__dict__", {}).values(), *held]


def reseed(generator: Any, key: int) -> None:
    """Seed a generator with a key of 64 bits; about 10 us for numpy's, 1 to 3 for the others."""
    if isinstance(generator, np.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(key).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(key)
    else:
        generator.seed(key & 0xFFFFFFFF if isinstance(generator, np.random.RandomState) else key)


@dataclass(frozen=True, eq=False)
class States:
    """Where the global generators, and some others, are in their sequences: equal if nobody drew in between."""

    python: Any
    legacy: Any  # numpy's
    cpu: torch.Tensor
    cuda: tuple[torch.Tensor, ...]
    own: tuple[Any, ...]

    @classmethod
    def now(cls, generators: Sequence[Any]) -> "States":
        """Read them; about 40 us."""
        cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        return cls(
            random.getstate(),
            np.random.get_state(),
            torch.default_generator.get_state(),
            tuple(generator.get_state() for generator in cuda),
            tuple(map(_get, generators)),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, States):
            return NotImplemented
        return (
            self.python == other.python
            and self.legacy[2:] == other.legacy[2:]
            and bool((self.legacy[1] == other.legacy[1]).all())
            and torch.equal(self.cpu, other.cpu)
            and len(self.cuda) == len(other.cuda)
            and all(map(torch.equal, self.cuda, other.cuda))
            and (not self.own or fingerprint(self.own) == fingerprint(other.own))
        )

    __hash__ = None  # type: ignore[assignment]

    def restore(self, generators: Sequence[Any]) -> None:
        """Take the generators, the same ones, back there."""
        random.setstate(self.python)
        np.random.set_state(self.legacy)
        torch.default_generator.set_state(self.cpu)
        for generator, state in zip(torch.cuda.default_generators if self.cuda else (), self.cuda, strict=True):
            generator.set_state(state)
        for generator, state in zip(generators, self.own, strict=True):
            _set(generator, state)


@contextmanager
def untouched(generators: Sequence[Any]) -> Iterator[None]:
    """Leave the global generators, and these, as they were found."""
    states = States.now(generators)
    try:
        yield
    finally:
        states.restore(generators)


def _get(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
