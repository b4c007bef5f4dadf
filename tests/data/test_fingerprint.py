"""A fingerprint is the same in every process that holds the same, and differs with every bit of code or contents."""

import copy
import functools
import importlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stoker.data.fingerprint import fingerprint
from stoker.errors import UserError

MODULE = '''
import functools, random, re
import helper
from helper import scale
from torch.utils.data import Dataset

SIZE = 3
TABLE = {"a": 1}

def decode(x):
    return [y * SIZE for y in x if y in {1, 2, 3}]

class Base(Dataset):
    def start(self):
        return 1

class Data(Base):
    """A docstring."""
    def __init__(self, paths=("a", "b"), transform=None):
        self.paths, self.names, self.transform = list(paths), {"x", "y", "zebra", ("t", 1)}, transform
        self.pattern, self.part = re.compile("a+"), functools.partial(decode, [1])
        self.generator = random.Random()

    @property
    def kind(self):
        return TABLE["a"]

    @functools.lru_cache
    def cached(self):
        return 5

    def __getitem__(self, i):
        from deep import late
        return decode(self.paths[i]), scale(i), helper.offset(i), late(i)

def unrelated():
    return 1
'''
HELPER = "def scale(x):\n    return x * 2\n\ndef offset(x):\n    return x + 1\n"
DEEP = "def late(x):\n    return x\n"
TEXTS = {"mine": MODULE, "helper": HELPER, "deep": DEEP}
CHANGES = [
    ("mine", "return 1\n\nclass Data", "return 2\n\nclass Data"),  # of a base
    ("mine", "SIZE = 3", "SIZE = 4"),  # a global of a function that a method calls
    ("mine", "{1, 2, 3}", "{1, 2, 4}"),
    ("mine", '"a": 1', '"a": 2'),  # of a property
    ("mine", "return 5", "return 6"),  # behind a decorator
    ("mine", 'compile("a+")', 'compile("a*")'),
    ("mine", "partial(decode, [1])", "partial(decode, [2])"),
    ("mine", '"zebra"', '"zebu"'),
    ("mine", '=("a", "b")', '=("a", "c")'),
    ("helper", "x * 2", "x * 3"),
    ("helper", "x + 1", "x + 2"),
    ("deep", "return x", "return -x"),  # imported when it runs
]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Import MODULE anew, with a text exchanged in one of the three files."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def fresh(name: str = "mine", old: str = "", new: str = "") -> Any:
        assert old in TEXTS[name]
        for other, text in TEXTS.items():
            (tmp_path / f"{other}.py").write_text(text.replace(old, new, 1) if other == name else text)
            sys.modules.pop(other, None)
        importlib.invalidate_caches()
        return importlib.import_module("mine")

    yield fresh
    for name in TEXTS:
        sys.modules.pop(name, None)


def test_changed_code(load: Callable[..., Any]) -> None:
    prints = {change: fingerprint(load(*change).Data()) for change in CHANGES}
    prints[()] = fingerprint(load().Data())
    assert len(set(prints.values())) == len(CHANGES) + 1
    assert prints == {change: fingerprint(load(*change).Data()) for change in prints}


def test_code_that_it_does_not_reach(load: Callable[..., Any]) -> None:
    """What else stands in the file, a recipe's learning rate say, is none of the data set's business."""
    before = fingerprint(load().Data())
    assert fingerprint(load("mine", "class Data", "\n\n# further down\nclass Data").Data()) == before
    changed = load("mine", "():\n    return 1", "():\n    return 2")
    assert fingerprint(changed.Data()) == before
    assert fingerprint(changed.unrelated) != fingerprint(load().unrelated)
    assert fingerprint(load().Data(["a"])) != before


@pytest.mark.parametrize("lookup", ['globals()["SI" + "ZE"]', 'getattr(helper, "sc" + "ale")', 'eval("SI" "ZE")'])
def test_names_that_are_looked_up(load: Callable[..., Any], lookup: str) -> None:
    """What a name means cannot be seen: the whole text counts."""
    method = "\n    def dynamic(self):\n        return " + lookup
    edits = {"mine": ("SIZE = 3", "SIZE = 4"), "helper": ("x * 2", "x * 3")}
    name = "helper" if "helper" in lookup else "mine"
    before = TEXTS.copy()
    try:
        TEXTS["mine"] = before["mine"].replace("        return 1\n", "        return 1\n" + method + "\n", 1)
        one = fingerprint(load().Base())
        assert fingerprint(load(name, *edits[name]).Base()) != one == fingerprint(load().Base())
    finally:
        TEXTS.update(before)


def test_other_processes(load: Callable[..., Any], tmp_path: Path) -> None:
    """As a script, as a module, from byte code, with another order of sets: always the same."""
    expected = fingerprint(load().Data())
    ending = """
from stoker.data.fingerprint import fingerprint
print(fingerprint(Data()))
if __name__ == "__main__":
    import sys, mine
    del sys.modules["mine"]
    import mine
    assert mine.__cached__ and __import__("os").path.exists(mine.__cached__)
"""
    (tmp_path / "mine.py").write_text(MODULE + ending)
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run(
            [sys.executable, "mine.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert (done.stderr, done.stdout.split()) == ("", [expected] * 3)


VALUES: list[Any] = [
    *(None, 0, False, 0.0, -0.0, 0j, "", b"", (), [], {}, set(), 1, True, 1.0, "1", b"1", 10**5000, float("nan")),
    *([1], (1,), {1}, {1: 1}, [[1]], [(1,)], [{1: 1}], [1, [2]], [[1], 2], [1, 2], ["1"], [b"1"], [1.0], [True]),
    *({"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": [1]}, {"a": (1,)}, [10**5000], [(10**5000, 1)], [(10**5000 + 1, 1)]),
    *(np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.array([0, 1.0]), np.array(["a"]), np.float32(0)),
    *(np.array([{}, 1], dtype=object), np.array([{}, 2], dtype=object), np.zeros(0), np.array("2020", "datetime64")),
    *(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1, 2), torch.zeros(()), torch.ones(2)),
    *(torch.nn.Parameter(torch.zeros(2)), torch.eye(2).to_sparse(), torch.float32, torch.device("cpu")),
    *(Path("a"), Path("b"), re.compile("a"), re.compile("a", re.IGNORECASE), range(3), slice(3), ..., bytearray(b"1")),
    *(int, len, Path, np, lambda: 1, lambda: 2, lambda x: x, lambda x=1: x, lambda *, x=1: x, (lambda y: lambda: y)(1)),
    *((lambda y: lambda: y)(2), functools.partial(int, base=2), functools.partial(int, base=3), "a".join, "b".join),
    *(np.random.default_rng, frozenset({1, 2}), frozenset({1, "2"}), "\ud800", "ä", threading.Lock()),
]


def test_values_are_told_apart() -> None:
    prints = [fingerprint(value) for value in VALUES]
    alike = [(VALUES[i], VALUES[j]) for i in range(len(prints)) for j in range(i) if prints[i] == prints[j]]
    assert alike == []
    assert prints == [fingerprint(value) for value in VALUES]


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@given(nested, nested)
def test_equal_if_and_only_if_written_alike(a: Any, b: Any) -> None:
    assert fingerprint(copy.deepcopy(a)) == fingerprint(a)
    assert (fingerprint(a) == fingerprint(b)) == (repr(a) == repr(b))
    assert fingerprint([a, a]) == fingerprint([a, copy.deepcopy(a)])  # one object twice, or two that are equal


def test_cycles() -> None:
    def ring(value: int) -> list[Any]:
        outer: list[Any] = [value]
        outer.append({"back": outer})
        return outer

    assert fingerprint(ring(1)) == fingerprint(ring(1)) != fingerprint(ring(2))


class Holds:
    """Any attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Keeps(Holds):
    """Leaves its handle out."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "handle"}


def test_attributes() -> None:
    base = fingerprint(Holds(a=1, b=torch.zeros(3)))
    assert fingerprint(Holds(b=torch.zeros(3), a=1)) == base
    assert fingerprint(Holds(a=2, b=torch.zeros(3))) != base
    assert fingerprint(Holds(a=1, b=torch.tensor([0, 0, 1e-30]))) != base
    assert fingerprint(Holds(a=1, c=torch.zeros(3))) != base
    assert fingerprint(Keeps(a=1, b=torch.zeros(3))) != base


def test_generators_do_not_count() -> None:
    drawn = np.random.default_rng(1)
    before = fingerprint(Holds(generator=drawn))
    drawn.random()
    assert fingerprint(Holds(generator=drawn)) == before


def test_what_cannot_be_looked_into(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with open(tmp_path / "x") as file:
        with pytest.raises(UserError) as caught:
            fingerprint(Holds(inner=[Holds(handle=file)]), "Flowers")
        assert "Flowers.inner[0].handle" in caught.value.what
        assert "TextIOWrapper" in caught.value.what
        assert "__getstate__" in caught.value.remedy
        assert fingerprint(Keeps(handle=file, a=1)) != fingerprint(Keeps(handle=file, a=2))
    with pytest.raises(UserError, match=r"Flowers\.inner"):
        fingerprint(Holds(inner=(i for i in range(3))), "Flowers")
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="nested too deeply"):
        fingerprint(deep)


def test_a_mapped_array_counts_by_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(4))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    before = fingerprint(mapped)
    assert fingerprint(np.load(tmp_path / "a.npy", mmap_mode="r")) == before
    np.save(tmp_path / "a.npy", np.ones(4))
    assert fingerprint(np.load(tmp_path / "a.npy", mmap_mode="r")) != before


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    frames = [pandas.DataFrame({"a": ["x", y], "b": [1.0, b]}) for y in "yz" for b in (1, 2)]
    assert len({fingerprint(frame) for frame in frames}) == 4
    assert fingerprint(frames[0]) == fingerprint(frames[0].copy())
