"""Reading samples: which were left out and where they came from, and whose random numbers they draw."""

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

import stoker
from stoker import Loader, UserError
from stoker.data.reader import Skipped, file_of
from tests.data.test_pool import forked
from tests.laws.runs import assert_same, events, final, wait

BAD = {3, 17, 18, 29}
TRUNCATED = "OSError: image file is truncated"


class Images(Dataset[Any]):
    """40 samples as torchvision's ImageFolder has them; some cannot be read. Without noise, sample i is i."""

    def __init__(self, bad: set[int] = BAD, *, noise: bool = False, attribute: str = "samples") -> None:
        self.bad, self.noise = bad, noise
        setattr(self, attribute, [(f"flowers/{i}.jpg", i % 2) for i in range(40)])

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if index in self.bad:
            raise OSError("image file is truncated")
        return (torch.randn(3) + index % 2, index % 2) if self.noise else index


class Fetching(Images):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


class Table(Images):
    def file_of(self, index: int) -> str:
        return f"adult.csv, row {index + 2}"


class Odd(list[int]):
    """Some samples of another data set; which, nobody can know."""

    dataset = Images()


def test_files_of_samples() -> None:
    images = Images()
    assert [file_of(Images(attribute=name), 7) for name in ("samples", "imgs")] == ["flowers/7.jpg"] * 2
    listings: list[Any] = [[30, 20, 10], (30, 20), range(30, 0, -10), np.array([30, 20]), torch.tensor([30, 20])]
    for rows in listings:
        assert file_of(Subset(images, rows), 1) == "flowers/20.jpg"
        assert file_of(Subset(Subset(images, rows), [1]), 0) == "flowers/20.jpg"
    assert file_of(Subset(Table(), [5]), 0) == "adult.csv, row 7"
    assert file_of(Loader(Subset(images, [9]), augment=lambda sample: sample).source, 0) == "flowers/9.jpg"
    assert file_of(Odd(range(20)), 7) is None  # no name is better than a wrong one
    assert file_of([1, 2, 3], 1) is None and file_of(images, 99) is None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Images, Fetching])
def test_a_bad_sample_is_named(kind: type[Images], workers: int) -> None:
    """Also one of many that are fetched at once."""
    feed = Loader(kind({29}), 4).feed(0, workers=workers)
    with pytest.raises((OSError, UserError)) as caught:
        list(feed.epoch(0))
    feed.close()
    text = str(caught.value) + " ".join(getattr(caught.value, "__notes__", []))
    assert "sample 29 (flowers/29.jpg)" in text and "image file is truncated" in text


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_samples_that_are_left_out(workers: int) -> None:
    loader = Loader(Subset(Fetching(), range(39, -1, -1)), 6, shuffle=True, on_error="skip")
    feed = loader.feed(2, workers=workers)
    for epoch in range(2):
        found = [batch.tolist() for batch, _ in feed.epoch(epoch)]
        whole = [[39 - i for i in batch] for batch in loader.batches(2, epoch)]
        assert found == [[i for i in batch if i not in BAD] for batch in whole]
        missing = [i for batch in whole for i in batch if i in BAD]
        assert feed.skipped == [Skipped(epoch, 39 - i, f"flowers/{i}.jpg: {TRUNCATED}") for i in missing]
        feed.skipped.clear()
    feed.close()
    feed = Loader(Images({0, 1, 2, 3, 4, 5}), 3, on_error="skip").feed(0, workers=workers)
    with pytest.raises(UserError, match=r"(?s)no sample of a batch of 3 .*sample 0 .*flowers/0.jpg.*truncated"):
        list(feed.epoch(0))
    feed.close()


def recipe() -> stoker.Recipe:
    return stoker.Recipe(
        model=lambda: nn.Linear(3, 2),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=Loader(Images(noise=True), 4, shuffle=True, on_error="skip"),
        val=Loader(Images({5, 6}, noise=True), 8, on_error="skip"),
    )


def die_at(step: int | None) -> Callable[[Any, Any], None]:
    """Be killed after that step."""
    return lambda progress, metrics: os.kill(os.getpid(), signal.SIGKILL) if progress.step == step else None


def test_a_run_counts_logs_and_reports_what_it_left_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "seed": 1, "log_every": 5, "checkpoint_every": 3}
    whole, killed = tmp_path / "loud", tmp_path / "quiet"
    fit = partial(stoker.fit, recipe(), out=tmp_path / "whole", **options)
    assert wait(forked(fit, whole), whole) == 0
    for workers, step in ((2, 7), (0, 16), (1, 25), (2, None)):
        options |= {"workers": workers, "on_step": [die_at(step)], "quiet": True}
        fit = partial(stoker.fit, recipe(), out=tmp_path / "killed", **options)
        assert wait(forked(fit, killed), killed) == (-signal.SIGKILL if step else 0), killed.read_text()
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert final(tmp_path / "whole")["state"]["progress"]["skipped_samples"] == 12
    logged = {"train/skipped_samples": [0], "val/skipped_samples": []}
    for event in events(tmp_path / "whole"):
        logged.get(event["name"], []).append(event["value"])
    assert logged["train/skipped_samples"][-1] == 12 and logged["val/skipped_samples"] == [2, 2, 2]
    for text in (whole.read_text(), killed.read_text()):
        assert "12 samples could not be read and were left out" in text and "and 4 more" in text
        assert all(f"sample {i} in epoch 0: flowers/{i}.jpg: {TRUNCATED}" in text for i in BAD)


def draw(rng: Any, x: float) -> float:
    if isinstance(rng, torch.Generator):
        return x + torch.rand((), generator=rng, dtype=torch.float64).item()
    return float(x + (rng.random_sample() if isinstance(rng, np.random.RandomState) else rng.random()))


class Noise:
    """A transform with a generator of its own."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __call__(self, x: float) -> float:
        return draw(self.rng, x)


class Slotted:
    __slots__ = ("rng",)
    __init__, __call__ = Noise.__init__, Noise.__call__


class Compose:
    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, x: float) -> float:
        for transform in self.transforms:
            x = transform(x)
        return x


class Drawing(Dataset[Any]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> float:
        return float(self.transform(0.0))


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "composed": lambda rng: Compose(lambda x: x, Noise(rng)),
    "nested": lambda rng: Compose(Compose(lambda x: x, Compose(Noise(rng)))),
    "slots": Slotted,
    "partial": lambda rng: partial(draw, rng),
    "closure": lambda rng: lambda x: draw(rng, x),
    "method": lambda rng: Noise(rng).__call__,
}
GENERATORS = (
    np.random.default_rng,
    np.random.RandomState,
    lambda seed: torch.Generator().manual_seed(seed),
    random.Random,
)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("where", ["transform", "subset", "augment"])
def test_own_generators_never_repeat_and_know_no_workers(holder: str, where: str) -> None:
    """As a transform of the data set, also below Subsets as after splits, and as augment=."""

    def numbers(make: Any, workers: int) -> list[float]:
        transform = HOLDERS[holder](make(0))
        data: Any = Drawing(transform if where != "augment" else lambda x: x)
        data = Subset(Subset(data, range(24)), range(24)) if where == "subset" else data
        feed = Loader(data, 4, shuffle=True, augment=transform if where == "augment" else None).feed(0, workers=workers)
        found = torch.cat([batch for epoch in (0, 1) for batch, _ in feed.epoch(epoch)]).tolist()
        feed.close()
        return found

    for make in GENERATORS if holder == "composed" else GENERATORS[:1]:
        here = numbers(make, 0)
        assert len(set(here)) == 48
        assert numbers(make, 2) == here == numbers(make, 3)


@pytest.mark.parametrize("how", ["plain", "transform", "drawing"])
def test_hugging_face_data_sets_in_memory(how: str) -> None:
    """The samples of a batch are those that are read one by one, drawn numbers included."""
    import datasets

    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        noise = [random.random() + np.random.rand() + torch.rand(()).item() for _ in rows["x"]]
        return {"x": [x + (n if how == "drawing" else 1) for x, n in zip(rows["x"], noise, strict=True)]}

    plain = datasets.Dataset.from_dict({"x": [float(i) for i in range(30)], "text": [f"é{i}" for i in range(30)]})
    dataset = plain if how == "plain" else plain.with_transform(transform)
    one_by_one = Loader(range(30), 7, shuffle=True, augment=lambda index: dataset[index])
    found = []
    for loader, workers in (
        (one_by_one, 0),
        (Loader(dataset, 7, shuffle=True), 0),
        (Loader(dataset, 7, shuffle=True), 2),
    ):
        feed = loader.feed(4, workers=workers)
        found.append([{k: list(v) for k, v in b.items()} for epoch in (0, 1) for b, _ in feed.epoch(epoch)])
        feed.close()
    assert found[0] == found[1] == found[2] and len({str(batch) for batch in found[0]}) == 10
