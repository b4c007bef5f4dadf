"""How long reading takes, found without touching the data set or the run's generators."""

import copy
import functools
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, default_collate

from stoker.data.seeding import draws, seed_all
from stoker.data.stages import stage_times, transform_times
from stoker.errors import UserError

WAIT_S = 0.004


def burn(seconds: float) -> None:
    """Keep this thread busy for so much of its own time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def slow(x: Any) -> Any:
    time.sleep(WAIT_S)
    return x


class Slow:
    """A transform."""

    def __init__(self, waits: int = 1) -> None:
        self.waits = waits

    def __call__(self, x: Any) -> Any:
        time.sleep(self.waits * WAIT_S)
        return x


class Data(Dataset[Any]):
    """Numbers, transformed."""

    def __init__(self, transform: Any = None, **attributes: Any) -> None:
        self.transform = transform
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        x = torch.tensor([float(index)])
        return self.transform(x) if self.transform else x


def names(times: list[tuple[str, float]]) -> list[str]:
    return [name for name, _ in times]


# ------------------------------------------------------------------ stages


class Waiting(Data):
    def __getitem__(self, index: int) -> Any:
        return slow(index)


class Busy(Data):
    def __getitem__(self, index: int) -> Any:
        burn(WAIT_S)
        return index


def test_waiting_and_busy_data() -> None:
    waiting = stage_times(Waiting(), default_collate, range(16))
    busy = stage_times(Busy(), default_collate, range(16))
    assert min(waiting.decode_s, busy.decode_s) >= WAIT_S * 0.99
    assert waiting.cpu_share < 0.5
    assert busy.cpu_share > waiting.cpu_share
    assert waiting.samples == busy.samples == 16


def test_collate_gets_whole_batches() -> None:
    seen: list[list[Any]] = []

    def collate(samples: list[Any]) -> None:
        seen.append(samples)
        time.sleep(WAIT_S)

    stages = stage_times(list(range(100)), collate, np.arange(10, 42))
    assert stages.collate_s >= WAIT_S
    assert stages.decode_s < WAIT_S
    assert all(batch == list(range(10, 42)) for batch in seen) and len(seen) > 3


def test_time_is_kept_to() -> None:
    """A batch that would take too long to read is filled up with the samples that were read."""
    seen: list[list[int]] = []
    stages = stage_times(Waiting(), seen.append, list(range(100)) * 1000, seconds=0.05)
    assert 1 <= stages.samples <= 0.05 / WAIT_S + 1
    assert len(seen[0]) == 100_000 and set(seen[0]) == set(range(stages.samples))


def test_a_sample_that_is_slow_to_begin_with_warms_up() -> None:
    class Opening(Data):
        opened = False

        def __getitem__(self, index: int) -> int:
            if not self.opened:
                self.opened = True
                time.sleep(0.5)
            return index

    assert stage_times(Opening(), default_collate, [3]).decode_s < 0.1


def test_one_thread_as_in_a_worker() -> None:
    class Threads(Data):
        def __getitem__(self, index: int) -> int:
            return torch.get_num_threads()

    torch.set_num_threads(2)
    seen: list[list[int]] = []
    stage_times(Threads(), seen.append, range(3))
    assert set(seen[0]) == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "times", [lambda data: stage_times(data, default_collate, []), lambda data: transform_times(data, [])]
)
def test_no_sample(times: Any) -> None:
    with pytest.raises(UserError, match="no sample"):
        times(Data())


# ------------------------------------------------------------------ transforms


def test_each_transform_has_its_time() -> None:
    times = transform_times(Data(Slow(2)), range(5))
    assert names(times) == ["reading", "Slow"]
    assert times[1][1] >= 2 * WAIT_S


class Listing(Data):
    def __getitem__(self, index: int) -> Any:
        for transform in self.transforms:
            index = transform(index)
        return self.augment["train"](index)


def test_lists_dicts_and_functions() -> None:
    parts = [slow, functools.partial(slow), lambda x: x, Slow()]
    times = transform_times(Listing(transforms=parts, augment={"train": str, "p": 0.5}), range(3))
    line = parts[2].__code__.co_firstlineno
    assert names(times) == ["reading", "slow (1)", "slow (2)", f"<lambda> (test_stages.py:{line})", "Slow", "str"]
    assert [seconds >= WAIT_S for _, seconds in times] == [False, True, True, False, True, False]


def test_modules() -> None:
    chain = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU(), nn.Linear(1, 1)))
    assert names(transform_times(Data(chain), [0, 1])) == ["reading", "Linear (1)", "ReLU", "Linear (2)"]
    assert names(transform_times(Data(nn.ReLU()), [0, 1])) == ["reading", "ReLU"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_torchvision(version: str) -> None:
    tv = pytest.importorskip("torchvision.transforms" + (".v2" if version == "v2" else ""))
    inner = tv.Compose([tv.CenterCrop(4), Slow()])
    compose = tv.Compose([tv.Resize(8), inner, tv.RandomApply([tv.RandomHorizontalFlip()], p=1.0)])

    class Images(Data):
        def __getitem__(self, index: int) -> Any:
            return self.transform(torch.zeros(3, 16, 16))

    times = transform_times(Images(compose), range(4))
    assert names(times) == ["reading", "Resize", "CenterCrop", "Slow", "RandomApply"]
    assert times[3][1] >= WAIT_S


def test_an_image_folder(shared_data: Path) -> None:
    """It holds its transforms twice: in `transform`, which it calls, and in `transforms`."""
    datasets = pytest.importorskip("torchvision.datasets")
    tv = pytest.importorskip("torchvision.transforms.v2")
    roots = [folder for folder in shared_data.glob("flowers700/**/") if len(list(folder.glob("*/*.jpg"))) > 100]
    assert roots
    transform = tv.Compose([tv.Resize((32, 32)), tv.ToImage()])
    data = datasets.ImageFolder(str(roots[0]), transform, target_transform=float)
    times = transform_times(Subset(data, [0, 5, 9]), range(3))
    assert names(times) == ["reading", "Resize", "ToImage", "target: float"]
    assert all(seconds > 0 for _, seconds in times)


def test_wrapped_data_sets() -> None:
    class Outer(Data):
        def __getitem__(self, index: int) -> Any:
            return self.transform(self.dataset[index])

    data = Outer(torch.neg, dataset=Subset(Outer(Slow(), dataset=Data(torch.abs)), [4, 5]))
    assert names(transform_times(data, [0, 1])) == ["reading", "abs", "Slow", "neg"]


def test_clocks_read_like_the_transform() -> None:
    class Peeking(Data):
        def __getitem__(self, index: int) -> Any:
            return self.transform(index) * self.transform.waits

    assert names(transform_times(Peeking(Slow()), [0])) == ["reading", "Slow"]


def test_a_data_set_that_knows_its_transforms_type() -> None:
    """A clock will not do here: the functions are told instead."""

    class Picky(Data):
        def __getitem__(self, index: int) -> Any:
            assert isinstance(self.transform, Slow)
            return self.transform(index)

    found = transform_times(Picky(Slow()), range(3))
    assert any(name.endswith("Slow.__call__") for name in names(found))


# ------------------------------------------------------------------ functions


class Methodical(Data):
    """Has methods instead of transforms."""

    def __getitem__(self, index: int) -> Any:
        return self.sharpen(self.load(index))

    def load(self, index: int) -> Any:
        time.sleep(3 * WAIT_S)
        return torch.full((8,), float(index))

    def sharpen(self, x: Any) -> Any:
        return slow(x)


def test_functions_where_there_are_no_transforms() -> None:
    found = transform_times(Methodical(), range(4))
    assert len(found) <= 8
    own = [name for name, _ in found if name.startswith("test_stages.py:")]
    assert [name.split()[-1].split(".")[-1] for name in own] == ["__getitem__", "load", "sharpen", "slow"]
    assert names(found)[: len(own)] == own  # libraries come after
    assert any("sleep" in name for name in names(found)[len(own) :])
    seconds = dict(found)
    assert seconds[own[0]] >= 3.9 * WAIT_S
    assert seconds[own[1]] >= 2.9 * WAIT_S


def test_a_method_that_is_called_transform() -> None:
    class Own(Methodical):
        def transform(self, x: Any) -> Any:
            return x

        def __init__(self) -> None:
            pass

    assert names(transform_times(Own(), range(2)))[0].endswith("Methodical.__getitem__")


def test_at_most_eight() -> None:
    calls = "".join(f"def f{i}(x): return f{i + 1}(x)\n" for i in range(20)) + "def f20(x): return slow(x)\n"
    space: dict[str, Any] = {"slow": slow}
    exec(compile(calls, "own.py", "exec"), space)

    class Deep(Data):
        def __getitem__(self, index: int) -> Any:
            return space["f0"](index)

    assert len(transform_times(Deep(), range(2))) == 8


# ------------------------------------------------------------------ nothing is disturbed


class Drawing(Data):
    """Draws from every generator there is."""

    def __getitem__(self, index: int) -> Any:
        drawn = torch.rand(()) + random.random() + np.random.rand()
        return self.transform(drawn) if self.transform else drawn


@pytest.mark.parametrize("transform", [None, lambda x: x + torch.rand(())])
def test_generators_are_left_as_found(transform: Any) -> None:
    seed_all(5)
    expected = draws()
    seed_all(5)
    stage_times(Drawing(transform), default_collate, range(4))
    transform_times(Drawing(transform), range(4))
    assert draws() == expected


class Broken:
    def __call__(self, x: Any) -> Any:
        raise ValueError("no")


@pytest.mark.parametrize("last", [Slow(), Broken()], ids=["well", "error"])
def test_the_data_set_is_not_changed(last: Any) -> None:
    chain = nn.Sequential(nn.ReLU(), nn.Identity())
    parts = [lambda x: torch.tensor([float(x)]), chain, last]
    data = Listing(transforms=parts, augment={"train": chain}, dataset=Data(chain))
    kept = (data, data.dataset, chain)
    before = [copy.copy(vars(x)) for x in kept]
    modules, listed, held = list(chain), list(parts), dict(data.augment)
    if isinstance(last, Broken):
        with pytest.raises(ValueError, match="no"):
            transform_times(data, range(3))
    else:
        assert names(transform_times(data, range(3)))[-2:] == ["Identity", "Slow"]
    assert [vars(x) for x in kept] == before
    assert (list(chain), parts, data.augment) == (modules, listed, held)
    assert torch.get_num_threads() == 1


def test_an_error_in_a_later_sample_is_the_users_own() -> None:
    class Late(Data):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise OSError("truncated")
            return self.transform(index)

    for times in (transform_times, functools.partial(stage_times, collate=default_collate)):
        with pytest.raises(OSError, match="truncated"):
            times(dataset=Late(Slow()), indices=range(5))
