"""`stoker doctor`, by its real command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  (optimizers import it: once here instead of once in every child)
import torchvision.transforms.v2  # noqa: F401

from tests.laws.runs import run

RECIPE = """
import time
import torch
from torch import nn
from torchvision.transforms import v2
import stoker

class Records(torch.utils.data.Dataset):
    def __init__(self, packed):
        records = ({"id": i, "text": f"message number {i}", "label": i % 3} for i in range(500_000))
        self.records = stoker.data.pack(records) if packed else list(records)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record = self.records[i]
        return torch.full((8,), float(len(record["text"]))), record["label"]

class Slowly(nn.Module):
    def forward(self, image):
        time.sleep(0.004)
        return image + torch.rand(())

class Photos(torch.utils.data.Dataset):
    def __init__(self):
        self.transform = v2.Compose([v2.RandomHorizontalFlip(), Slowly(), v2.ToDtype(torch.float32)])

    def __len__(self):
        return 300

    def __getitem__(self, i):
        if i == 299:
            time.sleep(0)
        return self.transform(torch.zeros(3, 8, 8)).flatten()[:8], i % 3

class Broken(Photos):
    def __getitem__(self, i):
        raise OSError("disk on fire")

def recipe(kind: str = "records") -> stoker.Recipe:
    data = {
        "records": lambda: Records(False),
        "packed": lambda: Records(True),
        "photos": Photos,
        "broken": Broken,
        "tensors": lambda: (torch.randn(64, 8), torch.zeros(64, dtype=torch.int64)),
        "stream": lambda: (lambda ds: ds)(type("S", (torch.utils.data.IterableDataset,), {
            "__iter__": lambda self: iter([(torch.zeros(8), 1)] * 50)})()),
    }[kind]()
    return stoker.Recipe(
        model=lambda: nn.Linear(8, 3),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params),
        train=stoker.Loader(data, 16, shuffle=kind != "stream"),
    )
"""


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the doctor says of a kind of data."""
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(RECIPE)

    def say(kind: str, code: int = 0) -> str:
        log = tmp_path / f"{kind}.log"
        assert run(["doctor", "task.py", f"kind={kind}"], log) == code, log.read_text()
        assert not Path("runs").exists()
        return log.read_text()

    return say


def test_the_attribute_whose_objects_are_copied_is_named(doctor: Callable[..., str]) -> None:
    said = doctor("records")
    assert "dataset.records is a list of 500,000 dict" in said
    assert "self.records = stoker.data.pack(self.records)" in said
    assert "bytes copied a sample by each worker" in said


def test_packed_records_are_no_matter(doctor: Callable[..., str]) -> None:
    said = doctor("packed")
    assert "memory     " not in said and "500,000 samples (Records)" in said


def test_each_transform_has_its_time_and_slow_reading_is_told(doctor: Callable[..., str]) -> None:
    said = doctor("photos")
    lines = [line.split() for line in said[said.index("each sample:") :].splitlines()[1:]]
    times = {line[-1]: float(line[0]) * {"us": 1e-6, "ms": 1e-3}[line[1]] for line in lines if len(line) == 4}
    assert list(times) == ["reading", "RandomHorizontalFlip", "Slowly", "ToDtype"]
    assert times["Slowly"] == max(times.values()) >= 0.004
    assert "reading " in said and "collate " in said and "step " in said and "samples/s" in said
    assert "mostly waiting" in said


@pytest.mark.parametrize("kind", ["tensors", "stream"])
def test_data_without_single_reads(doctor: Callable[..., str], kind: str) -> None:
    said = doctor(kind)
    assert "step " in said and "each sample" not in said
    assert ("in memory" if kind == "tensors" else "a stream") in said


def test_data_that_cannot_be_read(doctor: Callable[..., str]) -> None:
    said = doctor("broken", code=1)
    assert "Traceback" not in said and "disk on fire" in said and "sample" in said
