"""pack: what comes out is what went in, and forked workers share it."""

import datetime
import enum
import gc
import math
import os
import pickle
import signal
import sys
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from stoker import Loader
from stoker.data import pack
from stoker.data.packing import Packed
from stoker.errors import UserError

Point = namedtuple("Point", "x y")


@dataclass
class Box:
    corner: tuple[float, float]
    name: str = ""


@dataclass(frozen=True)
class Frozen:
    x: int
    doubled: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "doubled", 2 * self.x)


@dataclass(slots=True)
class Slotted:
    x: int


@dataclass
class Grown:
    x: int

    def __post_init__(self) -> None:
        self.extra = [self.x]


class Keyed(dict[str, int]):
    """A dict with a class of its own."""


class Color(enum.Enum):
    RED = 1


def same(a: Any, b: Any) -> bool:
    """Equal with equal types, all the way down; nan is nan, -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float | np.floating):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(k, m) and same(a[k], b[m]) for k, m in zip(a, b, strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if hasattr(a, "__dict__") and not isinstance(a, enum.Enum):
        return same(vars(a), vars(b))
    return bool(a == b)


def dicts(n: int) -> Iterator[dict[str, Any]]:
    for i in range(n):
        yield {"id": i, "text": f"text of sample {i:05d}", "label": i % 10, "score": i / 7}


# ------------------------------------------------------------------ what comes out


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(exclude_categories=())),  # surrogates too
    st.binary(),
)
NESTED = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner))


@given(st.lists(NESTED))
def test_anything_comes_back(records: list[Any]) -> None:
    assert same(list(pack(records)), records)


@given(st.lists(st.fixed_dictionaries({"b": SCALARS, "a": st.integers() | st.none(), "t": st.text()})))
def test_records_of_one_shape_come_back(records: list[Any]) -> None:
    assert same(list(pack(iter(records))), records)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{}],
        [()],
        [None, None],
        [True, 1, 1.0],
        [1, None, 2**63, 2**64 - 1, -(2**63)],
        [2**64 - 1, 0],
        [2**64],
        [0.0, -0.0, math.nan, math.inf],
        [1.0, 1],
        [True, None, False],
        ["\ud83d\ude00", "\ud800", "", "\0", "é\r\n\ufeff", None],
        [b"", b"\0\xff", None],
        [bytearray(b"x")],
        [{"a": 1, "b": 2}, {"b": 2, "a": 1}],
        [{"a": 1}, {"a": 1, "b": 2}, {}],
        [{True: "x"}, {1: "x"}, {1.0: "x"}],
        [{"x": 1}, {np.str_("x"): 1}],
        [{"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}] * 2,
        [{"x": [1, [2]], "y": {1, 2}, "z": None}],
        [(1, "a"), (2, "b", 3)],
        [(i,) * 300 for i in range(3)],
        [Point(1, "a"), Point(2, "b")],
        [Point(1, 2), (1, 2)],
        [Box((1.0, 2.0), "ü"), Box((0.5, -0.0))],
        [Frozen(3), Frozen(4)],
        [Slotted(1), Slotted(2)],
        [Grown(1), Grown(2)],
        [Keyed(a=1)],
        [OrderedDict(a=1)],
        [Color.RED, Color.RED],
        [datetime.date(2020, 2, 29), 1 + 2j, range(3), ...],
    ],
    ids=repr,
)
def test_values_keep_their_types(records: list[Any]) -> None:
    assert same(list(pack(records)), records)


@pytest.mark.parametrize(
    "values",
    [
        [np.arange(6, dtype=">i2").reshape(2, 3), np.ones((2, 3), dtype=">i2")],
        [np.zeros(2), np.zeros(3)],
        [np.zeros(2), np.zeros(2, dtype=np.float32)],
        [np.array(5), np.array(6)],
        [np.zeros((0, 4))],
        [np.array(["a", "bc"]), np.array(["d\0", "ef"])],
        [np.array([1, "x", None], dtype=object)],
        [np.array([(1, 2.0)], dtype=[("i", "i4"), ("f", "f8")])] * 2,
        [np.float32(0.1), np.float32(-0.0)],
        [np.float64(0.1), 0.1],
        [np.int8(1), np.int16(1)],
        [np.bool_(True), np.bool_(False)],
        [np.str_("a\0"), np.str_("bcd"), np.bytes_(b"\0")],
        [np.datetime64("2020-01-01"), np.datetime64("NaT", "D")],
        [np.asfortranarray(np.arange(6.0).reshape(2, 3))],
    ],
    ids=repr,
)
def test_numpy(values: list[Any]) -> None:
    packed = pack({"x": value} for value in values)
    got = [record["x"] for record in packed]
    assert list(map(type, got)) == list(map(type, values))
    for one, other in zip(got, values, strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int8, torch.complex64])
def test_tensors(dtype: torch.dtype) -> None:
    base = torch.arange(24).reshape(4, 6).to(dtype)
    equal, ragged = list(base), [base[0, :2], base[1:, ::2], torch.tensor(1).to(dtype), base[:0]]
    assert same(list(pack(equal)), equal)
    assert same(list(pack(ragged)), ragged)
    assert same(list(pack([{"x": [t]} for t in ragged])), [{"x": [t]} for t in ragged])


def test_a_tensor_that_is_more_than_its_numbers() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    view = torch.tensor([1 + 2j]).conj()
    (got, conj) = pack([weight, view])
    assert type(got) is torch.nn.Parameter and got.requires_grad
    assert torch.equal(conj, view)


def test_a_view_does_not_bring_its_storage_along() -> None:
    base = torch.zeros(1000, 1000)
    packed = pack([base[i, : i + 1] for i in range(100)])
    assert packed.nbytes < 100 * (200 + 4 * 50)


def test_a_record_is_the_readers_own() -> None:
    packed = pack([{"x": np.zeros(2), "t": torch.zeros(2), "l": [1]}])
    first = packed[0]
    first["x"] += 1
    first["t"] += 1
    first["l"].append(2)
    first["new"] = 1
    assert same(packed[0], {"x": np.zeros(2), "t": torch.zeros(2), "l": [1]})


def test_a_cycle_comes_back() -> None:
    ring: dict[str, Any] = {"n": 1}
    ring["self"] = ring
    (got,) = pack([ring])
    inner = got["self"]["self"]["self"]["self"]
    assert inner["n"] == 1 and inner["self"]["self"]["n"] == 1


def test_blocks_of_different_shapes() -> None:
    """The first blocks are small and the shape changes within one and between two."""
    records = [{"a": i} for i in range(5000)] + [{"a": str(i), "b": None} for i in range(5000)]
    assert same(list(pack(records)), records)
    assert pack(records)[4999:5001][1] == {"a": "0", "b": None}


# ------------------------------------------------------------------ a sequence


def test_it_is_a_sequence() -> None:
    records = list(dicts(1000))
    packed = pack(records)
    assert len(packed) == 1000
    assert packed[-1] == records[-1] == packed[np.int64(999)] == packed[torch.tensor(999)]
    assert list(reversed(packed)) == records[::-1]
    assert records[7] in packed and packed.index(records[7]) == 7
    for index in (1000, -1001):
        with pytest.raises(IndexError, match="of 1,000"):
            packed[index]
    with pytest.raises(TypeError):
        packed["id"]  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        packed[0] = {}  # type: ignore[index]


@given(st.integers(0, 200), st.slices(200), st.slices(50))
def test_slices_are_views(n: int, outer: slice, inner: slice) -> None:
    records, packed = list(range(n)), pack(range(n))
    assert isinstance(packed[outer], Packed)
    assert list(packed[outer]) == records[outer]
    assert list(packed[outer][inner]) == records[outer][inner]


def test_subsets_are_views() -> None:
    packed = pack(range(100))
    picked = packed.subset(np.array([5, 99, -1, 5]))
    assert list(picked) == [5, 99, 99, 5]
    assert list(picked.subset([-1, 1])) == [5, 99] and list(picked[1:3]) == [99, 99]
    assert list(packed[10:20:3].subset([1, -1])) == [13, 19]
    assert list(packed.subset([])) == []
    with pytest.raises(IndexError, match="record 100 of 100"):
        packed.subset([0, 100])
    with pytest.raises(TypeError):
        packed.subset([0.5])


def test_pickled_for_workers_that_are_spawned() -> None:
    records = [{**record, "x": np.arange(3), "t": torch.ones(2), "p": Point(1, None)} for record in dicts(300)]
    again = pickle.loads(pickle.dumps(pack(records)[100:]))
    assert same(list(again), records[100:])


def test_packed_again() -> None:
    packed = pack([1, 2])
    assert pack(packed) is packed


class Squares(Dataset[int]):
    """A map-style data set that raises no IndexError."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        return index**2


def test_a_data_set_is_packed() -> None:
    assert list(pack(Squares())) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("records", [{"a": [1]}, "text", b"text", 5, None, object()], ids=lambda r: type(r).__name__)
def test_no_records(records: Any) -> None:
    with pytest.raises(UserError, match=f"pack got a {type(records).__name__}") as caught:
        pack(records)
    assert caught.value.remedy


def test_a_record_that_cannot_be_stored_is_named() -> None:
    with pytest.raises(UserError, match=r"record 1,500 cannot be packed") as caught:
        pack({"x": threading.Lock() if i == 1500 else None} for i in range(2000))
    assert "lock" in caught.value.why


def test_an_error_of_the_source_is_its_own() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("row 2")

    with pytest.raises(KeyError, match="row 2"):
        pack(broken())


# ------------------------------------------------------------------ memory


def test_bytes_a_record() -> None:
    """4 for the id, 20 + 4 for the text, 1 for the label, 8 for the score."""
    packed = pack(dicts(70_000))
    assert packed.nbytes / 70_000 < 38
    assert pack(i % 2 == 0 for i in range(1000)).nbytes == 1000
    assert pack(np.zeros((10, 4), np.float32)).nbytes == 160


class Counted:
    """A value that knows how many of its kind are alive."""

    alive = most = 0

    def __init__(self) -> None:
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return dict, ()  # stored as nothing at all


def test_a_generator_is_never_held_as_objects() -> None:
    pack({"x": Counted()} for _ in range(200_000))
    assert 1000 < Counted.most <= 65_536 + 1


def test_large_records_make_small_blocks() -> None:
    alive: list[int] = []

    class Large:
        def __init__(self) -> None:
            Counted.alive += 1
            alive.append(Counted.alive)

        __del__ = Counted.__del__

        def __reduce__(self) -> tuple[type, tuple[bytes]]:
            return bytes, (bytes(1 << 20),)

    Counted.alive = 0
    assert len(pack(Large() for _ in range(200))) == 200
    assert max(alive) <= 64


def memory(pid: int, name: str) -> int:
    """Bytes of one line of smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1]) * 1024


def child(records: Any, ready: int, go: int) -> None:
    """Read a few records and say so; when told, read all of them and say so; wait for the end."""
    gc.disable()
    for part in (range(100), range(len(records))):
        for index in part:
            list(records[index].values())
        os.write(ready, b".")
        os.read(go, 1)
    signal.pause()


def grown(records: Any, workers: int = 4) -> tuple[int, int]:
    """Bytes by which forked workers that read every record grow: proportional and private, sums over them.

    Without files: the share of a library that falls to a process changes as others on the machine come and go.
    """
    ready, go = os.pipe(), os.pipe()
    pids = []
    try:
        for _ in range(workers):
            pid = os.fork()
            if pid == 0:
                try:
                    child(records, ready[1], go[0])
                finally:
                    os._exit(1)
            pids.append(pid)
        measured = []
        for _ in range(2):
            for _ in pids:
                assert os.read(ready[0], 1) == b"."
            own = memory(os.getpid(), "Pss_Anon")
            sums = [sum(memory(pid, name) for pid in pids) for name in ("Pss_Anon", "Private_Dirty")]
            measured.append((own + sums[0], sums[1]))
            os.write(go[1], b"." * workers)
        return measured[1][0] - measured[0][0], measured[1][1] - measured[0][1]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for end in (*ready, *go):
            os.close(end)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc: Linux only")
def test_forked_workers_share_packed_records_and_copy_a_list() -> None:
    n = 300_000
    records = list(dicts(n))
    size = n * sum(map(sys.getsizeof, (records[-1], *records[-1].values())))
    assert size > n * 200  # else there is nothing to see
    packed = pack(records)
    of_list, of_packed = grown(records), grown(packed)
    assert min(of_list) > size
    assert max(of_packed) < 0.1 * size
    assert max(of_packed) < packed.nbytes


class Messages(torch.utils.data.Dataset[Any]):
    """Records of a few fields."""

    def __init__(self, n: int) -> None:
        self.records = pack({"id": i, "text": f"message number {i:08d}", "label": i % 7} for i in range(n))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, int]:
        if index % 10_000 == 0:
            gc.collect()  # as Python does by itself, sooner or later
        record = self.records[index]
        return record["label"], len(record["text"])


def anonymous_bytes(pids: list[int]) -> int:
    """Proportional memory that is no file's."""
    smaps = [Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:] for pid in pids]
    return sum(int(dict(line.split(":", 1) for line in lines)["Pss_Anon"].split()[0]) * 1024 for lines in smaps)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells proportional memory")
def test_four_workers_of_a_feed_add_next_to_nothing() -> None:
    """Neither the records' pages are copied, nor those of all that a program has imported, by garbage collections."""
    dataset = Messages(300_000)  # a list of such dicts: about 100 MB
    feed = Loader(dataset, 1000, shuffle=True).feed(0, workers=4)
    batches = feed.epoch(0)
    next(batches)
    processes = [os.getpid(), *(child.pid for child in psutil.Process().children())]
    assert len(processes) == 5
    before = anonymous_bytes(processes)
    assert sum(1 for _ in batches) == 299
    grown = anonymous_bytes(processes) - before
    feed.close()
    assert grown < 10e6
