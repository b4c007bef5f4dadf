"""Bad data, through the command line: told by file, row or index, what was found and what was expected."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  (optimizers import it: once here instead of once in every child)
import torchvision.transforms.v2  # noqa: F401

from tests.laws.runs import run

TABLE = """
import torch
from torch import nn
import stoker

def recipe(train: str = "train.csv", test: str = "test.csv", batch_size: int = 200, outputs: int = 2) -> stoker.Recipe:
    known = stoker.data.table(train, target="rich", types={"rich": "category"})
    encode = known.fit(one_hot=True)
    return stoker.Recipe(
        model=lambda: nn.Linear(encode.num_features, outputs),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=stoker.Loader(encode(known), batch_size, shuffle=True),
        val=stoker.Loader(encode(stoker.data.table(test, target="rich", types={"rich": "category"}))),
    )
"""

IMAGES = """
import torch
from torch import nn
from torchvision.transforms import v2
import stoker

def recipe(train: str = "flowers/train", on_error: str = "raise") -> stoker.Recipe:
    transform = v2.Compose([v2.RandomCrop(32), v2.ToDtype(torch.float32, scale=True)])
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
        train=stoker.Loader(stoker.data.images(train, transform), 4, shuffle=True, on_error=on_error),
    )
"""

TEXTS = """
import torch
from torch import nn
import stoker

class Bag(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.table = nn.Embedding(size, 4)

    def forward(self, tokens, mask):
        return (self.table(tokens) * mask[:, :, None]).sum(1)

class Lists(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return list(range(0 if i == 21 else 1 + i % 7)), i % 4

def recipe(kind: str = "table") -> stoker.Recipe:
    if kind == "table":
        rows = stoker.data.table("texts.tsv", target="label", types={"text": "text", "label": "category"})
        encode = rows.fit()
        data, size = encode(rows), len(encode.vocabulary)
    else:
        data, size = Lists(), 10
    return stoker.Recipe(
        model=lambda: Bag(size),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=stoker.Loader(data, 4, shuffle=True, collate=None if kind == "table" else stoker.data.pad()),
    )
"""


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Train in an own folder, expect a refusal, return what was said on stderr."""
    monkeypatch.chdir(tmp_path)

    def train(source: str, *arguments: object, workers: int = 0) -> str:
        Path("faulty.py").write_text(source)
        log = tmp_path / "log"
        words = ["train", "faulty.py", *arguments, "--epochs", 1, "--out", "out", "--workers", workers]
        code = run(words, log)
        said = log.read_text()
        assert code == 1, said
        assert "Traceback" not in said and "remedy:" in said, said
        return said

    return train


def people(path: str, rows: int = 200, change: tuple[int, list[str]] | None = None) -> None:
    """A table of `rows` people; `change` replaces one, by its line in an editor."""
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["age", "job", "rich"])
        for line in range(2, rows + 2):
            row = [str(20 + line % 50), ("baker", "broker")[line % 2], ("no", "yes")[line % 3 == 0]]
            out.writerow(change[1] if change and change[0] == line else row)


def test_a_ragged_row(refused: Callable[..., str]) -> None:
    people("train.csv", change=(150, ["30", "baker"]))
    people("test.csv")
    said = refused(TABLE)
    assert "train.csv, row 150" in said and "2 fields" in said and "3" in said


def test_a_wrong_type_far_down(refused: Callable[..., str]) -> None:
    people("train.csv", 32_000, (31_000, ["thirty", "baker", "no"]))
    people("test.csv")
    said = refused(TABLE)
    assert "train.csv, row 31000" in said and "'age'" in said and "'thirty'" in said and "number" in said


def test_an_unknown_category_at_test_time(refused: Callable[..., str]) -> None:
    people("train.csv")
    people("test.csv", change=(77, ["30", "bakker", "no"]))
    said = refused(TABLE)
    assert "test.csv, row 77" in said and "'bakker'" in said and "baker" in said and "broker" in said


def test_text_in_another_encoding(refused: Callable[..., str]) -> None:
    people("train.csv")
    people("test.csv")
    path = Path("train.csv")
    lines = path.read_bytes().split(b"\r\n")
    lines[99] = "30,bäcker,no".encode("latin-1")
    path.write_bytes(b"\r\n".join(lines))
    said = refused(TABLE)
    assert "train.csv" in said and "100" in said and "utf-8" in said.lower() and "encoding=" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_out_of_range(refused: Callable[..., str], workers: int) -> None:
    people("train.csv", change=(42, ["30", "baker", "zzz"]))  # a third class, for two outputs
    people("test.csv")
    said = refused(TABLE, workers=workers)
    assert "sample 40 (train.csv, row 42) of the train data has the label 2; expected 0 to 1" in said


def test_a_label_out_of_range_in_val(refused: Callable[..., str]) -> None:
    people("train.csv")
    people("test.csv")
    source = TABLE.replace(
        "val=stoker.Loader(", "val=stoker.Loader(list(zip(torch.zeros(9, encode.num_features), "
    ).replace(
        'encode(stoker.data.table(test, target="rich", types={"rich": "category"}))', "[0, 1, 0, 1, 0, 5, 0, 1, 0])), 4"
    )
    said = refused(source)
    assert "sample 5 of the val data has the label 5; expected 0 to 1" in said
    assert "saved at step 1" in said


@pytest.fixture
def flowers(shared_data: Path, tmp_path: Path) -> Path:
    """Eight photos of each of two classes."""
    for name in ("daisy", "roses"):
        folder = tmp_path / "flowers/train" / name
        folder.mkdir(parents=True)
        for photo in sorted((shared_data / "flowers700/train" / name).iterdir())[:8]:
            shutil.copy(photo, folder)
    return tmp_path / "flowers/train"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [0, 5000])
def test_a_broken_photo(refused: Callable[..., str], flowers: Path, workers: int, size: int) -> None:
    victim = sorted((flowers / "roses").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:size])
    said = refused(IMAGES, workers=workers)
    assert f"roses/{victim.name}" in said and "sample 11" in said
    assert ("empty" in said or "0 bytes" in said) if size == 0 else "truncated" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_photo_may_be_left_out(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    victim = sorted((flowers / "roses").iterdir())[3]
    victim.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    Path("faulty.py").write_text(IMAGES)
    log = tmp_path / "log"
    words = ["train", "faulty.py", "on_error=skip", "--epochs", 3, "--out", "out", "--workers", workers]
    assert run(words, log) == 0, log.read_text()
    said = log.read_text()
    assert "3 samples could not be read and were left out" in said
    assert said.count(f"sample 11 in epoch 2: flowers/train/roses/{victim.name}") == 1
    assert '"name": "train/skipped_samples", "value": 3' in Path("out/events.jsonl").read_text()


def test_a_folder_with_one_class(refused: Callable[..., str], flowers: Path) -> None:
    shutil.rmtree(flowers / "roses")
    said = refused(IMAGES)
    assert "flowers/train" in said and "one class" in said and "daisy" in said


def test_an_empty_text(refused: Callable[..., str]) -> None:
    Path("texts.tsv").write_text("text\tlabel\n" + "".join(f"word {i}\t{i % 4}\n" for i in range(30)) + '" "\t1\n')
    said = refused(TEXTS)
    assert "texts.tsv, row 32" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_an_empty_sequence(refused: Callable[..., str], workers: int) -> None:
    said = refused(TEXTS, "kind=lists", workers=workers)
    assert "sample 21" in said and "length 0" in said
