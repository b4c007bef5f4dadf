"""The cache gives the same samples as the data set, decodes each once, and notices whatever changes."""

import contextlib
import errno
import importlib
import multiprocessing
import os
import pickle
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from stoker.data import reads
from stoker.data.caching import Cached, cached, default_folder
from stoker.data.fingerprint import fingerprint
from stoker.data.reader import Reader
from stoker.data.seeding import draws, isolated
from stoker.errors import UserError

N = 24
WHERE: list[Literal["memory", "disk"]] = ["memory", "disk"]
fork = multiprocessing.get_context("fork")


class Compose:
    """Transforms in turn, as one: only torchvision's own are taken apart."""

    def __init__(self, *steps: Callable[[Any], Any]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            value = step(value)
        return value


def double(value: torch.Tensor) -> torch.Tensor:
    """Draw nothing."""
    return value * 2


def noise(value: torch.Tensor) -> torch.Tensor:
    """Draw from every global generator."""
    return value + torch.rand(()) + random.random() + float(np.random.rand())


class Double(nn.Module):
    """Draw nothing."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Double."""
        return double(value)


class Noise(nn.Module):
    """Draw."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Add noise."""
        return value + noise(torch.zeros(())) * self.scale


class Files(Dataset[Any]):
    """One file a sample; what is read is logged."""

    def __init__(self, root: Path, transform: Callable[[Any], Any] | None = None) -> None:
        self.root, self.transform = root, transform

    def __len__(self) -> int:
        return N

    def decode(self, index: int) -> torch.Tensor:
        """Read a file."""
        with open(self.root / "log", "a") as log:
            log.write(f"{index}\n")
        return torch.frombuffer(bytearray((self.root / f"{index}.bin").read_bytes()), dtype=torch.uint8).float()

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < N:
            raise IndexError(index)
        value = self.decode(index)
        return (self.transform(value) if self.transform else value), index


class AsDict(Files):
    """A dict a sample."""

    def __getitem__(self, index: int) -> Any:
        value, label = super().__getitem__(index)
        return {"label": label, "image": value}


class Sample(NamedTuple):
    """A named tuple."""

    label: int
    image: Any


class AsNamed(Files):
    """A named tuple a sample."""

    def __getitem__(self, index: int) -> Any:
        return Sample(*reversed(super().__getitem__(index)))


class AsOne(Files):
    """The transform's result alone."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0]


class Wrapped(Dataset[Any]):
    """The samples of another data set, backwards."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        image, label = self.dataset[len(self.dataset) - 1 - index]
        return label, image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a file of 50 bytes a sample."""
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(N):
        (folder / f"{i}.bin").write_bytes(bytes([i]) * 50)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for caches."""
    return tmp_path / "cache"


def decodes(root: Path) -> int:
    """How many samples were decoded since the last time."""
    log = root / "log"
    count = len(log.read_text().splitlines()) if log.exists() else 0
    log.unlink(missing_ok=True)
    return count


def read(dataset: Any, epoch: int = 0, order: Any = None) -> dict[int, str]:
    """Every sample as a run reads it."""
    reader = Reader(dataset, lambda samples: samples, seed=3)
    indices = list(range(len(dataset))) if order is None else list(order)
    with isolated():
        parts = [reader.batch(epoch, indices[i : i + 5]).batch for i in range(0, len(indices), 5)]
    samples = [sample for part in parts for sample in part]
    return {index: fingerprint(sample) for index, sample in zip(indices, samples, strict=True)}


def assert_same(dataset: Any, kept: Cached, epochs: int = 3) -> None:
    """Miss or hit, forwards or backwards: the samples of the data set itself."""
    for epoch in range(epochs):
        order = range(len(dataset))[:: -1 if epoch % 2 else 1]
        assert read(kept, epoch, order) == read(dataset, epoch, order)


# ------------------------------------------------------------------ what is kept

KINDS: dict[str, Callable[[Path], Any]] = {
    "plain": Files,
    "determined": lambda root: Files(root, double),
    "one function": lambda root: Files(root, noise),
    "all in one": lambda root: Files(root, Compose(double, noise, double)),
    "sequential": lambda root: Files(
        root, nn.Sequential(Double(), nn.Sequential(Double(), Noise()), Double(), Noise())
    ),
    "dict": lambda root: AsDict(root, nn.Sequential(Double(), Noise())),
    "named": lambda root: AsNamed(root, nn.Sequential(Double(), Noise())),
    "alone": lambda root: AsOne(root, nn.Sequential(Double(), Noise())),
    "subset": lambda root: Subset(Subset(Files(root, nn.Sequential(Double(), Noise())), range(20)), [3, -1, 3, 0]),
    "wrapped": lambda root: Subset(Wrapped(Files(root, nn.Sequential(Double(), Noise()))), range(4, 9)),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_same_samples_decoded_once(root: Path, folder: Path, kind: str, where: Literal["memory", "disk"]) -> None:
    dataset = KINDS[kind](root)
    before = fingerprint(dataset)
    random.seed(1)
    expected = draws()
    random.seed(1)
    kept = cached(dataset, where, folder)
    assert draws()[0] == expected[0]  # looking at samples leaves the generators alone
    assert kept.dataset is dataset
    assert len(kept) == len(dataset)
    assert_same(dataset, kept)
    decodes(root)
    assert_same(kept, kept)
    assert decodes(root) == 0
    assert fingerprint(dataset) == before


@pytest.mark.parametrize("where", WHERE)
def test_samples_belong_to_the_reader(root: Path, folder: Path, where: Literal["memory", "disk"]) -> None:
    kept = cached(Files(root), where, folder)
    for _ in range(3):
        value = kept[5][0]
        assert value.sum() == 250
        value.zero_()


def test_draws_of_the_rest_are_those_without_a_cache(root: Path, folder: Path) -> None:
    """The generators are left where the data set leaves them: what comes after draws the same."""
    dataset = Files(root, nn.Sequential(Double(), Noise()))
    kept = cached(dataset, "disk", folder)
    for source in (dataset, kept, kept):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        sample = source[7]
        after = draws()
        if source is dataset:
            expected = fingerprint(sample), after
        assert (fingerprint(sample), after) == expected


def test_generators_of_its_own(root: Path, folder: Path) -> None:
    """The Reader seeds them, so a transform that draws from one is random like any other."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.numpy, self.torch = np.random.default_rng(0), torch.Generator()
            self.python, self.legacy = random.Random(), np.random.RandomState()

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            value = value + self.numpy.random() + torch.rand((), generator=self.torch)
            return value + self.python.random() + self.legacy.rand()

    own = Own()
    assert own(torch.zeros(())) != own(torch.zeros(()))
    dataset = Files(root, nn.Sequential(Double(), own))
    kept = cached(dataset, "disk", folder)
    assert_same(dataset, kept)
    assert kept._split.rest == (own,)
    assert not kept._live


def test_other_augmentation_keeps_the_cache(root: Path, folder: Path) -> None:
    for scale in (1.0, 2.0):
        dataset = Files(root, nn.Sequential(Double(), Noise(scale)))
        kept = cached(dataset, "disk", folder)
        decodes(root)
        assert read(kept) != read(kept, 1)
        assert decodes(root) == (N if scale == 1 else 0)
        assert_same(dataset, kept)
    kept = cached(Files(root, nn.Sequential(Double(), Double(), Noise())), "disk", folder)
    decodes(root)
    assert_same(kept.dataset, kept, 1)
    assert decodes(root) == 2 * N
    assert len(list(folder.glob("*.sqlite"))) == 2


def test_splits_of_one_data_set_share(root: Path, folder: Path) -> None:
    dataset = Files(root)
    first = cached(Subset(dataset, range(16)), "disk", folder)
    read(first)
    second = cached(Subset(dataset, range(12, 20)), "disk", folder)
    decodes(root)
    read(second)
    assert decodes(root) == 4


def test_attributes_of_the_data_set(root: Path, folder: Path) -> None:
    dataset = Files(root)
    dataset.targets, dataset.other = [1, 2], 3  # type: ignore[attr-defined]
    kept = cached(dataset, "memory")
    assert kept.targets == [1, 2]
    for name in ("other", "classes", "__getitems__", "subset"):
        assert not hasattr(kept, name)


@pytest.mark.parametrize("where", WHERE)
def test_pickled(root: Path, folder: Path, where: Literal["memory", "disk"]) -> None:
    kept = cached(Files(root, nn.Sequential(Double(), Noise())), where, folder)
    expected = read(kept)
    decodes(root)
    again = pickle.loads(pickle.dumps(kept))
    assert read(again) == expected
    assert decodes(root) == (0 if where == "disk" else N)
    assert read(again) == expected
    assert decodes(root) == 0


def test_indices(root: Path, folder: Path) -> None:
    for where in WHERE:
        kept = cached(Files(root), where, folder)
        with pytest.raises(IndexError):
            kept[N]
        assert [label for _, label in kept] == list(range(N))  # type: ignore[attr-defined]
        tensors = [torch.tensor([i]) for i in range(3)]
        listed = cached(tensors, where, folder)
        assert listed[-1] == listed[2] == 2
        subset = cached(Subset(Files(root), [4, 5]), where, folder)
        assert subset[-1][1] == 5
        with pytest.raises(IndexError):
            subset[2]
        assert len(cached([], where, folder)) == 0


def test_where_it_lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path) -> None:
    monkeypatch.delenv("STOKER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "stoker" / "samples"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "stoker" / "samples"
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "own ü"))
    kept = cached(Files(root), "disk")
    assert not (tmp_path / "own ü").exists()  # until a sample is read
    read(kept)
    assert len(list((tmp_path / "own ü" / "samples").glob("*.sqlite"))) == 1
    with pytest.raises(UserError, match="cache='ram'"):
        cached(Files(root), "ram")  # type: ignore[arg-type]


# ------------------------------------------------------------------ what is random elsewhere


class DrawsItself(Files):
    """Random in __getitem__."""

    def decode(self, index: int) -> torch.Tensor:
        """Read and draw."""
        return super().decode(index) + torch.rand(())


class DrawsAfterwards(Files):
    """Random in __getitem__, after the transform."""

    def __getitem__(self, index: int) -> Any:
        value, label = super().__getitem__(index)
        return value * random.random(), label


class Twice(Files):
    """Two views of an image."""

    def __getitem__(self, index: int) -> Any:
        assert self.transform is not None
        value = self.decode(index)
        return self.transform(value), self.transform(value)


class Clock(Files):
    """Another sample each time, drawn from nothing that could be seeded."""

    def decode(self, index: int) -> torch.Tensor:
        """Read the time."""
        return super().decode(index) + time.perf_counter_ns() % 1000


class Changes(Files):
    """What the transform returned is changed afterwards."""

    def __getitem__(self, index: int) -> Any:
        value, label = super().__getitem__(index)
        return value**2, label


class ChangesInPlace(Files):
    """Likewise, but it remains the same object."""

    def __getitem__(self, index: int) -> Any:
        value, label = super().__getitem__(index)
        return value.pow_(2), label


REFUSED = [
    (DrawsItself, None, "draws random numbers in __getitem__"),
    (DrawsItself, double, "outside of its transform"),
    (DrawsItself, noise, "outside of its transform"),
    (DrawsAfterwards, noise, "outside of its transform"),
    (Twice, noise, "calls its transform 2 times"),
    (Clock, None, "comes out differently when it is read again"),
    (Clock, noise, "comes out differently when it is read again"),
    (Changes, noise, "is changed, or is not in the sample"),
    (ChangesInPlace, noise, "comes out differently when its random transforms are applied afterwards"),
]


@pytest.mark.parametrize(("kind", "transform", "words"), REFUSED)
def test_refused(root: Path, kind: Any, transform: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        cached(kind(root, transform), "memory")
    assert f"the samples of {kind.__name__} cannot be cached: " in caught.value.what
    assert words in caught.value.what
    assert "augment=" in caught.value.remedy


class Sometimes(nn.Module):
    """Random for one sample only, which is not among the first that are looked at."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Add noise to sample 2."""
        return noise(value) if value.max() == 2 else value


class OtherCall(Files):
    """For one sample, the transform is not called, or called twice."""

    def __getitem__(self, index: int) -> Any:
        assert self.transform is not None
        value = self.decode(index)
        if index in (2, 5):
            return (self.transform(self.transform(value)) if index == 2 else value), index
        return self.transform(value), index


class DrawsOnce(Files):
    """Random in __getitem__, for one sample only."""

    def decode(self, index: int) -> torch.Tensor:
        """Read and draw."""
        value = super().decode(index)
        return value + torch.rand(()) if index == 2 else value


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "build",
    [
        lambda root: Files(root, Sometimes()),
        lambda root: Files(root, nn.Sequential(Sometimes(), Noise())),
        lambda root: OtherCall(root, nn.Sequential(Double(), Noise())),
        DrawsOnce,
        lambda root: DrawsOnce(root, nn.Sequential(Double(), Noise())),
    ],
)
def test_never_a_frozen_draw(
    root: Path, folder: Path, where: Literal["memory", "disk"], build: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sample that turns out to be random later on is decoded every time, and the others are kept."""
    dataset = build(root)
    kept = cached(dataset, where, folder)
    assert_same(dataset, kept)
    assert 2 in kept._live
    assert capsys.readouterr().err.count("sample 2 is decoded every time") == 1
    decodes(root)
    first, second = read(kept, 1), read(kept, 2)
    assert decodes(root) == 2 * len(kept._live) <= 4
    assert first[2] != second[2]


@pytest.mark.parametrize("where", WHERE)
def test_what_cannot_be_kept(root: Path, folder: Path, where: Literal["memory", "disk"]) -> None:
    with pytest.raises(UserError, match=r"cannot keep sample 0\[0\]: it is a .*function"):
        cached(Files(root, lambda value: lambda: value), where, folder)
    kept = cached(Files(root, lambda value: {1} if value[0] == 2 else value), where, folder)
    with pytest.raises(UserError, match=r"cannot keep sample 2\[0\]: it is a .*set"):
        kept[2]
    assert kept[3][1] == 3


def test_a_bad_sample_is_told_when_it_is_read(root: Path, folder: Path) -> None:
    (root / "0.bin").unlink()
    kept = cached(Files(root), "disk", folder)
    assert kept[1][1] == 1
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            kept[0]
    shutil.rmtree(root)
    root.mkdir()
    with pytest.raises(FileNotFoundError):
        cached(Files(root), "disk", folder)


# ------------------------------------------------------------------ files that change


def swap(path: Path, content: bytes) -> None:
    """Other content, of the same size and with the same date."""
    found = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("settled", [True, False])
def test_changed_files(
    root: Path, folder: Path, where: Literal["memory", "disk"], settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dates tell, once they are older than the clock's tick; before, and where they changed, the contents do."""
    if settled:
        monkeypatch.setattr(reads, "_SETTLED_NS", 0)
        time.sleep(0.05)
    kept = cached(Files(root), where, folder)
    expected = read(kept)
    decodes(root)
    os.utime(root / "1.bin", (1, 1))  # touched
    (root / "2.bin").write_bytes((root / "2.bin").read_bytes())  # written again
    os.replace(shutil.copy(root / "3.bin", root / "copy"), root / "3.bin")  # replaced by the same
    assert read(kept) == expected
    assert decodes(root) == 0
    swap(root / "4.bin", bytes([77]) * 50)
    (root / "5.bin").write_bytes(bytes([5]) * 51)
    os.replace(root / "1.bin", root / "6.bin")
    for _ in range(2):
        assert kept[4][0][0] == 77
        assert len(kept[5][0]) == 51
        assert kept[6][0][0] == 1
        with pytest.raises(FileNotFoundError):
            kept[1]
    assert decodes(root) == 3 + 2
    assert kept[7][0][0] == 7
    assert decodes(root) == 0


def test_changed_in_another_process(root: Path, folder: Path) -> None:
    read(cached(Files(root), "disk", folder))
    swap(root / "4.bin", bytes([77]) * 50)

    def reading() -> Any:
        decodes(root)
        kept = cached(Files(root), "disk", folder)
        decodes(root)
        value = float(kept[4][0][0]), float(kept[5][0][0])
        return value, decodes(root)

    assert in_child(reading) == ((77, 5), 1)


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns in a forked process."""
    queue = fork.SimpleQueue()
    process = fork.Process(target=lambda: queue.put(function()))
    process.start()
    value = queue.get()
    process.join()
    return value


class Frames(Files):
    """Reads a folder, and a file that may be missing."""

    def decode(self, index: int) -> torch.Tensor:
        """Count files, and the optional one."""
        names = [entry.name for entry in os.scandir(self.root) if entry.name.endswith(".bin")]
        try:
            extra = (self.root / "extra").read_bytes()
        except FileNotFoundError:
            extra = b""
        return torch.tensor([len(names), len(os.listdir(self.root / "sub")), len(extra)])


@pytest.mark.parametrize("where", WHERE)
def test_folders_and_missing_files(root: Path, folder: Path, where: Literal["memory", "disk"]) -> None:
    (root / "sub").mkdir()
    kept = cached(Frames(root), where, folder)
    assert kept[0][0].tolist() == [N, 0, 0]
    (root / "sub" / "x").touch()
    assert kept[0][0].tolist() == [N, 1, 0]
    (root / "extra").write_text("12")
    assert kept[0][0].tolist() == [N, 1, 2]
    (root / "0.bin").unlink()
    assert kept[0][0].tolist() == [N - 1, 1, 2]


class OneFile(Files):
    """All samples in one file that is opened when the first is read, and stays open."""

    file: Any = None

    def decode(self, index: int) -> torch.Tensor:
        """Read a byte."""
        if self.file is None:
            self.file = open(self.root / "all", "rb", buffering=0)  # noqa: SIM115
        self.file.seek(index)
        return torch.tensor(list(self.file.read(1)))

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        if self.file is not None:
            self.file.close()
            self.file = None


@pytest.mark.parametrize("where", WHERE)
def test_a_file_that_stays_open(root: Path, folder: Path, where: Literal["memory", "disk"]) -> None:
    """It belongs to every sample, though one alone opens it; and it is not open before workers are forked."""
    (root / "all").write_bytes(bytes(range(N)))
    dataset = OneFile(root)
    kept = cached(dataset, where, folder)
    assert dataset.file is None
    assert kept._split.source.file is None
    assert [int(kept[i][0]) for i in range(N)] == list(range(N))
    kept._split.source.close()
    (root / "all").write_bytes(bytes(range(1, N + 1)))
    assert [int(kept[i][0]) for i in range(N)] == list(range(1, N + 1))
    kept._split.source.close()


class ByDescriptor(Files):
    """Reads in a way that Python code does not see, as libraries in C do."""

    def decode(self, index: int) -> torch.Tensor:
        """Read by cat."""
        done = subprocess.run(["cat", self.root / f"{index}.bin"], capture_output=True, check=True)
        return torch.tensor(list(done.stdout))


class Named(ByDescriptor):
    """Tells its files."""

    def file_of(self, index: int) -> str:
        """As messages have it."""
        return f"{index}.bin, row 3"


def test_files_that_nobody_sees(root: Path, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        cached(ByDescriptor(root), "memory")
    assert "cannot tell which files sample 0 of ByDescriptor is read from" in caught.value.what
    assert "file_of(index)" in caught.value.remedy
    kept = cached(Named(root), "disk", folder)
    assert kept[4][0][0] == 4
    swap(root / "4.bin", bytes([77]) * 50)
    assert kept[4][0][0] == 77


class Temporary(Files):
    """Goes by a file of its own making."""

    def decode(self, index: int) -> torch.Tensor:
        """Write and read."""
        path = self.root / f"temporary-{os.getpid()}"
        path.write_bytes(bytes(super().decode(index).byte().tolist()))
        value = torch.tensor(list(path.read_bytes()))
        path.unlink()
        return value


def test_temporary_files_are_no_dependency(root: Path, folder: Path) -> None:
    kept = cached(Temporary(root), "disk", folder)
    read(kept)
    decodes(root)
    read(kept)
    assert decodes(root) == 0


class Growing(Files):
    """Its file changes while it is read."""

    def decode(self, index: int) -> torch.Tensor:
        """Read, and let somebody else write."""
        value = super().decode(index)
        if (self.root / "grow").exists():
            os.truncate(self.root / f"{index}.bin", 30)
        return value


def test_a_file_that_changes_while_it_is_read(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = cached(Growing(root), "disk", folder)
    (root / "grow").touch()
    assert len(kept[3][0]) == 50
    assert "sample 3 is not kept: a file changed while it was read" in capsys.readouterr().err
    (root / "grow").unlink()
    assert len(kept[3][0]) == 30


# ------------------------------------------------------------------ code that changes

CODE = """
import torch
from torch.utils.data import Dataset

class Data(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.tensor(index * 10)
"""


def test_changed_code(tmp_path: Path, folder: Path) -> None:
    """Another process, with another text of the module: what the old code decoded is not served."""

    def reading() -> list[int]:
        sys.path.insert(0, str(tmp_path))
        sys.dont_write_bytecode = True
        kept = cached(importlib.import_module("changing").Data(), "disk", folder)
        return [int(kept[i]) for i in range(5)]

    for factor in (10, 20, 10):
        (tmp_path / "changing.py").write_text(CODE.replace("10", str(factor)))
        assert in_child(reading) == [i * factor for i in range(5)]
    assert len(list(folder.glob("*.sqlite"))) == 2


# ------------------------------------------------------------------ processes


@pytest.mark.parametrize("where", WHERE)
def test_four_processes_fill_at_once(root: Path, folder: Path, where: Literal["memory", "disk"]) -> None:
    dataset = Files(root, nn.Sequential(Double(), Noise()))
    expected = [read(dataset, epoch) for epoch in range(2)]
    kept = cached(dataset, where, folder)
    decodes(root)
    if where == "disk":
        assert read(kept, order=[0])  # a connection that the children inherit, and must not use
    queue = fork.SimpleQueue()

    def fill(worker: int) -> None:
        order = np.random.default_rng(worker).permutation(N).tolist()
        queue.put([read(kept, epoch, order) for epoch in range(2)])

    processes = [fork.Process(target=fill, args=(i,)) for i in range(4)]
    for process in processes:
        process.start()
    assert [queue.get() for _ in processes] == [expected] * 4
    for process in processes:
        process.join()
    assert N <= decodes(root) <= 4 * N
    assert [read(kept, epoch) for epoch in range(2)] == expected
    assert decodes(root) == 0


def wait_until(holds: Callable[[], bool]) -> None:
    """For at most a minute."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("where", WHERE)
def test_killed_while_filling(root: Path, folder: Path, where: Literal["memory", "disk"]) -> None:
    dataset = Files(root)
    expected = read(dataset)
    kept = cached(dataset, where, folder)
    for wait_s in (0.0, 0.003, 0.01, 0.02, 0.05):
        decodes(root)

        def forever() -> None:
            for value in range(10**6):
                for i in range(N):
                    (root / f"{i}.bin").write_bytes(bytes([value % 100]) * 50)
                read(kept)

        process = fork.Process(target=forever, daemon=True)
        process.start()
        wait_until((root / "log").exists)
        time.sleep(wait_s)
        process.kill()
        process.join()
        for i in range(N):
            (root / f"{i}.bin").write_bytes(bytes([i]) * 50)
        assert read(kept) == expected
    if where == "disk":
        decodes(root)
        assert read(kept) == expected
        assert decodes(root) == 0
        assert read(cached(dataset, "disk", folder)) == expected


def test_memory_that_is_too_small(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What fits is served, to all processes; the rest is decoded, which is said once by whoever finds out first."""
    dataset = Files(root)
    expected = read(dataset)
    kept = cached(dataset, "memory", limit_bytes=4096)
    assert in_child(lambda: read(kept)) == expected
    said = capfd.readouterr().err
    assert said.count("the sample cache is full: ") == 1
    fitted = int(said.split("full: ")[1].split(" of")[0])
    assert 0 < fitted < N
    assert f"{fitted} of {N} samples fit" in said
    decodes(root)
    assert read(kept) == expected
    assert decodes(root) == N - fitted
    assert capfd.readouterr().err == ""
    assert read(cached(dataset, "memory", limit_bytes=0)) == expected


# ------------------------------------------------------------------ files that are damaged


def database(folder: Path) -> Path:
    """The only cache."""
    (path,) = folder.glob("*.sqlite")
    return path


def checkpointed(root: Path, folder: Path) -> dict[int, str]:
    """Samples of a cache that is complete in one file."""
    expected = in_child(lambda: read(cached(Files(root), "disk", folder)))
    with contextlib.closing(sqlite3.connect(database(folder))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return dict(expected)


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bytes(root: Path, folder: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    expected = checkpointed(root, folder)
    content = bytearray(database(folder).read_bytes())
    chance = random.Random(seed)
    for _ in range(1 + seed * 40):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    database(folder).write_bytes(content)
    for _ in range(2):
        assert read(cached(Files(root), "disk", folder)) == expected
    decodes(root)
    capsys.readouterr()
    kept = cached(Files(root), "disk", folder)
    decodes(root)
    assert read(kept) == expected
    assert decodes(root) == 0  # mended
    assert capsys.readouterr().err == ""


def test_a_damaged_sample(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = checkpointed(root, folder)
    path = database(folder)
    content = path.read_bytes()
    place = content.find(torch.full((50,), 7.0).numpy().tobytes())
    assert place > 0
    path.write_bytes(content[: place + 9] + bytes([content[place + 9] ^ 4]) + content[place + 10 :])
    kept = cached(Files(root), "disk", folder)
    decodes(root)
    assert read(kept) == expected
    assert decodes(root) == 1
    assert f"damaged at sample 7, which is decoded again: {path}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"x", b"not a database" * 1000, None, "other", "short"])
def test_foreign_files(root: Path, folder: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = checkpointed(root, folder)
    path = database(folder)
    if content == "short":
        path.write_bytes(path.read_bytes()[: 5 * 4096])
    elif content == "other":
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE samples (row INTEGER PRIMARY KEY, payload BLOB)")
    elif content is None:
        path.unlink()  # safe at any time
    else:
        path.write_bytes(content)
    kept = cached(Files(root), "disk", folder)
    assert read(kept) == read(kept) == expected
    decodes(root)
    assert read(kept) == read(cached(Files(root), "disk", folder)) == expected
    assert decodes(root) == 4 * 16  # samples that were looked at first, again
    said = capsys.readouterr().err
    assert ("begun anew" in said) == (content not in (b"", b"x", None)), said


@pytest.mark.parametrize("when", ["before", "between"])
def test_deleted_while_in_use(root: Path, folder: Path, when: str) -> None:
    kept = cached(Files(root), "disk", folder)
    expected = read(kept)
    shutil.rmtree(folder)
    assert read(kept) == expected
    if when == "between":
        swap(root / "4.bin", bytes([77]) * 50)
        assert kept[4][0][0] == 77


def test_entries_of_another_make_are_no_program(root: Path, folder: Path) -> None:
    """A row with a right checksum and a wrong content is decoded again."""
    import zlib

    expected = checkpointed(root, folder)
    with contextlib.closing(sqlite3.connect(database(folder), isolation_level=None)) as connection:
        for row, header in enumerate(['["T","float32",[9],null,0]', '["K","os.system(x)","y"]', "{}", "[", "[[]]"]):
            text = connection.execute("SELECT reads FROM samples WHERE row = ?", (row,)).fetchone()[0]
            crc = zlib.crc32(b"", zlib.crc32(f"{row}\n{text}\n{header}".encode()))
            connection.execute(
                "UPDATE samples SET header = ?, payload = ?, crc = ? WHERE row = ?", (header, b"", crc, row)
            )
        for row, text in enumerate(["{}", "[[1]]", "x", '[["a", 1, 2]]', "null"], 5):
            header = "1"
            crc = zlib.crc32(b"", zlib.crc32(f"{row}\n{text}\n{header}".encode()))
            values = (text, header, b"", crc, row)
            connection.execute("UPDATE samples SET reads = ?, header = ?, payload = ?, crc = ? WHERE row = ?", values)
    samples = read(cached(Files(root), "disk", folder))
    assert {row for row in samples if samples[row] != expected[row]} <= {2, 5}  # "{}" is what it says


# ------------------------------------------------------------------ disks that are full or closed


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with the given options."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


@pytest.mark.parametrize("size_kib", [4, 20, 40, 60, 100, 150, 300])
def test_full_disk(
    root: Path, mounted: Callable[[str], Path], size_kib: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mounted(f"size={size_kib}k") / "cache"
    dataset = Files(root, lambda value: value.repeat(100))
    expected = read(dataset)
    kept = cached(dataset, "disk", folder)
    assert [read(kept, epoch) for epoch in range(2)] == [expected] * 2
    said = capsys.readouterr().err
    assert said.count("going on without") == said.count("\n") == 1, said
    assert str(folder) in said
    assert read(cached(dataset, "disk", folder)) == expected
    subprocess.run(["mount", "-o", "remount,size=20m", folder.parent], check=True)
    kept = cached(dataset, "disk", folder)
    read(kept)
    decodes(root)
    assert read(kept) == expected
    assert decodes(root) == 0


def test_a_disk_that_fills_up(root: Path, mounted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """What was kept before is still served."""
    folder = mounted("size=20m")
    dataset = Files(root, lambda value: value.repeat(100))
    kept = cached(dataset, "disk", folder)
    expected = read(kept, order=range(8))
    with contextlib.suppress(OSError), open(folder / "other", "wb") as other:
        while True:
            other.write(bytes(4096))
    try:
        os.truncate(folder / "other", (folder / "other").stat().st_size)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    assert set(expected.items()) < set(read(kept).items())
    decodes(root)
    assert read(kept, order=range(8)) == expected
    assert decodes(root) == 0
    assert capsys.readouterr().err.count("\n") == 1


def test_read_only(root: Path, mounted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = mounted("size=20m")
    dataset = Files(root)
    in_child(lambda: read(cached(dataset, "disk", folder)))
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for place in (folder, folder / "below", root / "1.bin", Path("/proc/stoker"), Path("/dev/null/x")):
        capsys.readouterr()
        kept = cached(dataset, "disk", place)
        assert read(kept) == read(kept) == read(dataset)
        assert capsys.readouterr().err.count("\n") <= 1


# ------------------------------------------------------------------ torchvision


@pytest.fixture(scope="session")
def flowers(shared_data: Path) -> Path:
    """Photos in class folders."""
    pytest.importorskip("torchvision")
    return shared_data / "flowers700" / "val"


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", ["pictures", "tensors", "old", "auto", "determined", "random first"])
def test_torchvision(flowers: Path, folder: Path, where: Literal["memory", "disk"], kind: str) -> None:
    from torchvision import datasets, transforms
    from torchvision.transforms import v2

    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    chosen: dict[str, tuple[Any, int | None]] = {
        "pictures": ([v2.Resize(64), v2.CenterCrop(56), v2.RandomHorizontalFlip(), v2.ToImage(), *last], 2),
        "tensors": ([v2.ToImage(), v2.Resize(64), v2.RandomCrop(56), v2.RandomErasing(), *last], 2),
        "auto": (
            [v2.ToImage(), v2.Compose([v2.Resize(48), v2.RandAugment()]), v2.RandomApply([v2.GaussianBlur(3)])],
            2,
        ),
        "determined": ([v2.ToImage(), v2.Resize(64), v2.CenterCrop(56), *last], None),
        "random first": ([v2.RandomResizedCrop(56), v2.ColorJitter(0.3), v2.ToImage(), *last], 0),
    }
    if kind == "old":
        steps = [transforms.Resize(64), transforms.RandomCrop(56), transforms.ToTensor(), transforms.RandomErasing(p=1)]
        transform, split = transforms.Compose(steps), 1
    else:
        transform, split = v2.Compose(chosen[kind][0]), chosen[kind][1]
    dataset = Subset(datasets.ImageFolder(flowers, transform=transform), range(0, 200, 10))
    kept = cached(dataset, where, folder)
    head = kept._split.head
    assert (None if head is None else len(head.steps)) == split
    assert_same(dataset, kept)
    assert not kept._live
    assert dataset.dataset.transform is dataset.dataset.transforms.transform is transform  # type: ignore[attr-defined]
    torch.manual_seed(1)
    image = dataset[3][0]
    torch.manual_seed(1)
    other = kept[3][0]
    assert (type(other), other.dtype, other.stride()) == (type(image), image.dtype, image.stride())


def test_joint_transforms(root: Path, folder: Path) -> None:
    """Image and boxes change together: torchvision's `transforms`."""
    pytest.importorskip("torchvision")
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    class Boxes(Files):
        transforms: Any = None

        def __getitem__(self, index: int) -> Any:
            image = tv_tensors.Image(self.decode(index).view(1, 5, 10))
            boxes = tv_tensors.BoundingBoxes([[1, 1, 4, 4]], format="XYXY", canvas_size=(5, 10))
            return self.transforms(image, {"boxes": boxes, "label": index})

    dataset = Boxes(root)
    dataset.transforms = v2.Compose([v2.Resize((20, 40)), v2.RandomHorizontalFlip(), v2.RandomCrop(10)])
    kept = cached(dataset, "disk", folder)
    assert_same(dataset, kept)
    assert kept._split.head is not None
    assert kept._split.keys == (0, 1)
    assert len(kept._split.rest) == 2
    assert type(kept[1][1]["boxes"]) is tv_tensors.BoundingBoxes
    assert kept[1][1]["boxes"].canvas_size == (10, 10)


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_a_photo_that_changes(flowers: Path, tmp_path: Path, folder: Path) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.io import decode_image
    from torchvision.transforms import v2

    photos = sorted(flowers.rglob("*.jpg"))[:4]
    for i, photo in enumerate(photos):
        (tmp_path / "photos" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, tmp_path / "photos" / f"class {i % 2}" / f"{i}.jpg")
    transform = v2.Compose([v2.ToImage(), v2.Resize((32, 32))])
    for loader in (None, decode_image):  # of Python's own, and of C
        options = {} if loader is None else {"loader": loader}
        dataset = ImageFolder(tmp_path / "photos", transform=transform, **options)
        kept = cached(dataset, "disk", folder)
        before = read(kept)
        path = Path(dataset.samples[0][0])
        content = path.read_bytes()
        shutil.copy(photos[3], path)
        after = read(kept)
        assert {i for i in before if before[i] != after[i]} == {0}
        assert after == read(dataset)
        path.write_bytes(content)
        assert read(kept) == before
