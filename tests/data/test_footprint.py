"""What forked workers copy, how much they grow, and what bounds them."""

import functools
import os
import signal
import time
from array import array
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Dataset, Subset

from stoker.data import pack
from stoker.data.footprint import Growth, growth, holders
from stoker.data.limits import machine

N = 50_000


class Records(Dataset[Any]):
    """A data set with whatever attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


def dicts(n: int = N) -> list[dict[str, Any]]:
    return [{"id": i, "text": f"text of sample {i:05d}", "label": i % 10, "score": i / 7} for i in range(n)]


def paths(dataset: Any) -> list[str]:
    return [holder.path for holder in holders(dataset)]


# ------------------------------------------------------------------ who holds objects


def test_a_list_of_dicts_is_named() -> None:
    (holder,) = holders(Records(records=dicts(), name="x", classes=["a", "b"]))
    assert holder.path == "dataset.records"
    assert holder.kind == "list of 50,000 dict"
    # A record: the dict, the id, the text, the score. Keys and labels are everybody's.
    assert holder.objects == pytest.approx(4 * N, rel=0.02)
    assert 250 * N < holder.size_bytes < 450 * N


def test_no_dict_is_larger_than_its_sample() -> None:
    rows = {f"key {i}": [float(i)] for i in range(1000)}
    (holder,) = holders(rows)
    assert holder.objects == 3000
    assert holder.kind == "dict of 1,000 list"


@pytest.mark.parametrize(
    ("dataset", "path"),
    [
        (dicts(2000), "dataset"),
        (Subset(Records(records=dicts(2000)), [1, 2]), "dataset.dataset.records"),
        (Records(index={"train": dicts(2000), "val": []}), "dataset.index['train']"),
        (Records(parts=[[], (dicts(2000),)]), "dataset.parts[1][0]"),
        (Records(box=namedtuple("Box", "inside")(dicts(2000))), "dataset.box.inside"),
        (Records(inner=Records(own={str(i) for i in range(2000)})), "dataset.inner.own"),
        (Records(texts=np.array([str(i) for i in range(2000)], dtype=object)), "dataset.texts"),
        (Records(transform=functools.partial(max, key=dicts(2000))), "dataset.transform.keywords['key']"),
        (Records(transform=functools.partial(max, dicts(2000))), "dataset.transform.args[0]"),
        (Records(read=Records(records=dicts(2000)).__getitem__), "dataset.read.__self__.records"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_path_leads_there(dataset: Any, path: str) -> None:
    assert paths(dataset) == [path]


def test_slots_and_closures() -> None:
    class Slotted:
        __slots__ = ("__hidden", "rows", "unset")

        def __init__(self) -> None:
            self.rows, self.__hidden = dicts(2000), dicts(3000)

    rows = dicts(4000)
    found = holders(Records(a=Slotted(), transform=lambda x: rows[x]))
    assert [holder.path for holder in found] == [
        "dataset.transform.<closure>.rows",
        "dataset.a.__hidden",
        "dataset.a.rows",
    ]


def test_pandas_columns_of_objects() -> None:
    pandas = pytest.importorskip("pandas")
    texts = [f"text {i}" for i in range(2000)]
    frame = pandas.DataFrame({"number": np.arange(2000), "text": pandas.Series(texts, dtype=object)})
    assert paths(Records(frame=frame)) == ["dataset.frame['text']"]
    assert paths(Records(column=frame["text"], numbers=frame["number"])) == ["dataset.column"]


def test_what_is_one_object_holds_none() -> None:
    class Loop:
        def __init__(self) -> None:
            self.itself, self.module, self.kind = self, torch, Records

    held = {
        "numbers": np.zeros(100_000),
        "tensor": torch.zeros(100_000),
        "text": "x" * 100_000,
        "blob": bytes(100_000),
        "array": array("i", range(100_000)),
        "packed": pack(range(100_000)),
        "range": range(100_000),
        "none": None,
        "empty": [[], {}, (), set()],
        "loop": Loop(),
        "model": torch.nn.Linear(100, 100),
        "function": lambda: None,
    }
    assert holders(Records(**held)) == []


def test_shared_objects_count_once() -> None:
    words = ["one", "two", "three"]
    assert holders(Records(labels=[words[i % 3] for i in range(N)])) == []
    assert holders(Records(labels=[i % 100 for i in range(N)])) == []
    (own,) = holders(Records(labels=[f"{i}" for i in range(N)]))
    assert own.objects == N


def test_nested_containers_are_estimated() -> None:
    rows = [[{"box": [i + 0.5, i + 1.5, i + 2.5]} for i in range(20)] for _ in range(1000)]
    (holder,) = holders(rows)
    assert holder.objects == pytest.approx(1000 * (1 + 20 * 5), rel=0.05)
    (arrays,) = holders([np.zeros(1000) for _ in range(2000)])
    assert arrays.objects == 2000
    assert arrays.size_bytes < 2000 * 200  # their numbers are not written to


def test_the_largest_comes_first_and_once() -> None:
    small, large = dicts(2000), dicts(4000)
    assert paths(Records(a=small, b=large, again=large)) == ["dataset.b", "dataset.a"]


def test_mixed_elements_are_named() -> None:
    (holder,) = holders([None if i % 2 else {"i": 1000 + i} for i in range(8000)])
    assert holder.kind == "list of 8,000 objects (NoneType, dict)"
    assert holder.objects == pytest.approx(8000, rel=0.1)


# ------------------------------------------------------------------ growth

linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc: Linux only")


def measured(dataset: Any, indices: Any = range(N), seconds: float = 1.0) -> Growth:
    """growth(), which must leave no process behind."""
    before = psutil.Process().children()
    found = growth(dataset, indices, seconds)
    assert psutil.Process().children() == before
    assert found is not None
    return found


@linux
def test_a_list_of_dicts_is_copied() -> None:
    found = measured(Records(records=dicts()))
    assert 1000 < found.samples <= N // 2
    assert 100 < found.copied_bytes < 1000
    assert found.added_bytes < 50
    assert found.epoch_bytes == pytest.approx(found.copied_bytes * N, rel=0.5)


@linux
def test_scattered_samples_do_not_copy_more_than_there_is() -> None:
    dataset = Records(records=dicts())
    indices = np.random.default_rng(0).permutation(N)[:400]
    found = measured(dataset, indices)
    assert found.samples == 200
    assert found.copied_bytes > 1000  # a page or two for each
    assert found.epoch_bytes <= min(found.copied_bytes * N, 1.1 * psutil.Process().memory_info().rss)


@linux
@pytest.mark.parametrize(
    "records", [pack(dicts()), np.zeros((N, 8)), torch.zeros(N, 8)], ids=["packed", "array", "tensor"]
)
def test_what_does_not_grow(records: Any) -> None:
    found = measured(Records(records=records))
    assert found.samples > 1000
    assert found.copied_bytes + found.added_bytes < 30
    assert found.error == ""


class Caching(Records):
    """Keeps every sample that it has read."""

    def __getitem__(self, index: int) -> Any:
        return self.cache.setdefault(index, np.full(1000, index, np.float64))


@linux
def test_a_cache_is_added() -> None:
    found = measured(Caching(records=range(2000), cache={}), range(2000))
    assert 7000 < found.added_bytes < 12_000
    assert found.copied_bytes < 1000
    assert found.epoch_bytes > 7000 * 2000


class Jumping(Records):
    """Allocates once, as an import or an opened file does, in the midst of being read."""

    def __getitem__(self, index: int) -> int:
        if index == self.at:
            self.kept = np.ones(10**6)
        return index


@linux
@pytest.mark.parametrize("at", [10, 6000])
def test_a_jump_is_no_growth(at: int) -> None:
    found = measured(Jumping(records=range(10_000), at=at), range(10_000))
    assert found.samples == 5000
    assert found.added_bytes < 30


class Failing(Records):
    """Fails in one way or another at sample 7."""

    def __getitem__(self, index: int) -> int:
        if index == 7:
            self.fail()
        return index


def broken() -> None:
    raise ValueError("no rose, but a thörn\nand \ud800")


@linux
@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (broken, "ValueError: no rose, but a thörn\nand \ud800; while reading sample 7"),
        (functools.partial(os._exit, 3), "exit code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal 9"),
        (lambda: time.sleep(60), "did not end within 2 s"),
    ],
    ids=["raises", "exits", "is killed", "hangs"],
)
def test_what_goes_wrong_comes_back_as_words(fail: Any, error: str) -> None:
    found = measured(Failing(records=range(10), fail=fail), range(10), 0.2)
    assert error in found.error
    assert found.samples == found.epoch_bytes == 0


@linux
def test_it_reads_nothing_here() -> None:
    dataset = Caching(records=range(100), cache={})
    opened = len(os.listdir("/proc/self/fd"))
    measured(dataset, range(100), 0.1)
    assert dataset.cache == {}
    assert len(os.listdir("/proc/self/fd")) == opened


@linux
@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_samples(n: int) -> None:
    assert measured(Records(records=range(n)), range(n)).samples == (n + 1) // 2


# ------------------------------------------------------------------ limits


def write(root: Path, **files: str) -> Path:
    """Lay down files, `__` for a slash and `_DOT_` for a dot in their names."""
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


GB = 1 << 30
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MEMINFO = "MemTotal:       32 kB\nMemFree:        1 kB\nMemAvailable:   8388608 kB\n"


def test_this_machine() -> None:
    here = machine()
    assert 1 <= here.cpus <= CPUS
    if Path("/proc/meminfo").exists():
        assert here.memory_bytes is not None and 0 < here.memory_bytes <= psutil.virtual_memory().total
    if Path("/dev/shm").is_dir():
        assert here.shm_bytes is not None and here.shm_free_bytes is not None
        assert 0 <= here.shm_free_bytes <= here.shm_bytes


def test_nothing_to_read(tmp_path: Path) -> None:
    bare = machine(tmp_path)
    assert (bare.cpus, bare.memory_bytes, bare.shm_bytes, bare.shm_free_bytes) == (CPUS, None, None, None)


def test_shared_memory(tmp_path: Path) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    found = machine(tmp_path)
    assert found.shm_bytes is not None and found.shm_free_bytes is not None
    assert 0 < found.shm_free_bytes <= found.shm_bytes


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("50000 100000\n", 1),
        ("150000 100000\n", 2),
        ("1000 100000\n", 1),
        ("max 100000\n", CPUS),
        ("99900000 100000\n", CPUS),
        ("", CPUS),
        ("garbage", CPUS),
    ],
)
def test_cpus_of_a_cgroup_2(tmp_path: Path, quota: str, cpus: int) -> None:
    root = write(tmp_path, proc__self__cgroup="0::/job\n", sys__fs__cgroup__job__cpu_DOT_max=quota)
    assert machine(root).cpus == min(cpus, CPUS)


def test_the_tightest_cgroup_above_binds(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__self__cgroup="0::/slice/job:1/step\n",
        proc__meminfo=MEMINFO,
        sys__fs__cgroup__slice__cpu_DOT_max="100000 100000",
    )
    job = root / "sys/fs/cgroup/slice/job:1"
    (job / "step").mkdir(parents=True)
    (job / "step/cpu.max").write_text("max 100000")
    (job / "step/memory.max").write_text("max\n")
    (job / "step/memory.current").write_text(f"{GB}\n")
    (job / "memory.max").write_text(f"{4 * GB}\n")
    (job / "memory.current").write_text(f"{3 * GB}\n")
    (job / "memory.stat").write_text(f"anon {2 * GB}\ninactive_file {GB // 2}\nactive_file 5\n")
    found = machine(root)
    assert found.cpus == 1
    assert found.memory_bytes == GB + GB // 2


def test_a_container_sees_its_cgroup_at_the_top(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__self__cgroup="0::/\n",
        proc__meminfo=MEMINFO,
        sys__fs__cgroup__cpu_DOT_max="100000 100000",
        sys__fs__cgroup__memory_DOT_max=str(GB),
        sys__fs__cgroup__memory_DOT_current=str(2 * GB),
    )
    assert machine(root).cpus == 1
    assert machine(root).memory_bytes == 0


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("folder", ["docker/abc", ""])
def test_cgroup_1(tmp_path: Path, mount: str, folder: str) -> None:
    """In a container the path is the host's and the limits are at the top."""
    top = tmp_path / "sys/fs/cgroup"
    cpu, memory = top / mount / folder, top / "memory" / folder
    cpu.mkdir(parents=True)
    memory.mkdir(parents=True)
    (cpu / "cpu.cfs_quota_us").write_text("100000\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    (memory / "memory.limit_in_bytes").write_text(f"{4 * GB}\n")
    (memory / "memory.usage_in_bytes").write_text(f"{3 * GB}\n")
    (memory / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {GB}\n")
    root = write(
        tmp_path,
        proc__self__cgroup=f"9:name=systemd:/\n4:memory:/docker/abc\n2:{mount}:/docker/abc\n0::/\n",
        proc__meminfo=MEMINFO,
    )
    assert machine(root).cpus == 1
    assert machine(root).memory_bytes == 2 * GB


def test_no_limits_in_cgroup_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__self__cgroup="4:memory:/\n1:cpu:/\n",
        proc__meminfo=MEMINFO,
        sys__fs__cgroup__cpu__cpu_DOT_cfs_quota_us="-1\n",
        sys__fs__cgroup__cpu__cpu_DOT_cfs_period_us="100000\n",
        sys__fs__cgroup__memory__memory_DOT_limit_in_bytes="9223372036854771712\n",
        sys__fs__cgroup__memory__memory_DOT_usage_in_bytes="1000\n",
    )
    assert machine(root).cpus == CPUS
    assert machine(root).memory_bytes == 8 * GB
