"""What was learnt from the training rows travels with the checkpoint; splits that mean different things are refused."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stoker
from stoker.infer import open_run
from tests.laws.runs import assert_same, run

RECIPE = """
import torch
from torch import nn
import stoker

class Words(nn.Module):
    def __init__(self, encode):
        super().__init__()
        self.words = nn.Embedding(len(encode.vocabulary), 4)
        self.numbers = nn.Linear(encode.num_numbers, 4)
        self.out = nn.Linear(4, encode.num_classes)

    def forward(self, numbers, tokens, mask):
        return self.out(self.numbers(numbers) + (self.words(tokens) * mask[:, :, None]).sum(1))

def recipe(folder: str = ".", tokenizer: str = "word") -> stoker.Recipe:
    rows = stoker.data.table(f"{folder}/train.csv", target="good", types={"text": "text"})
    train, val = stoker.data.split(rows, val=0.25, stratify="good")
    encode = train.fit(tokenizer=tokenizer)
    test = stoker.data.table(f"{folder}/test.csv", target="good", types={"text": "text"})
    return stoker.Recipe(
        model=lambda: Words(encode),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        train=stoker.Loader(encode(train), 8, shuffle=True, lengths=True),
        val=stoker.Loader(encode(val)),
        test=stoker.Loader(encode(test)),
    )
"""


def write(path: Path, rows: int, offset: float = 0.0) -> None:
    words = ["fine", "good", "poor", "bad", "film", "plot"]
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["stars", "text", "good"])
        for i in range(rows):
            text = " ".join(words[(i * k) % 6] for k in range(1, 3 + i % 4))
            out.writerow([i % 5 + offset, text, "yes" if i % 3 else "no"])


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a trained run of a recipe on a small table of texts; the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(RECIPE)
    write(Path("train.csv"), 80)
    write(Path("test.csv"), 24)
    assert run(["train", "task.py", "--epochs", 2, "--out", "run"], Path("log")) == 0, Path("log").read_text()
    return tmp_path


@pytest.mark.parametrize("gone", [True, False])
def test_a_run_is_opened_without_its_training_rows_or_with_others(task: Path, gone: bool) -> None:
    before = open_run("run").evaluate("test")
    if gone:
        os.remove("train.csv")
    else:
        write(Path("train.csv"), 200, offset=1000.0)  # other means, same columns
    assert open_run("run").evaluate("test") == before
    model = stoker.load("run")
    assert sum(p.numel() for p in model.parameters()) == 8 * 4 + 2 * 4 + 4 * 2 + 2  # 6 words, padding, unknown


def test_other_training_rows_do_not_go_on_silently(task: Path) -> None:
    write(Path("train.csv"), 80, offset=1.0)
    log = Path("again")
    assert run(["resume", "run", "--epochs", 3, "--force"], log) == 1
    said = log.read_text()
    assert "the training data are not those that the run began with" in said and "then" in said and "now" in said


def test_the_rows_that_came_back_go_on_as_if_nothing_had_been(task: Path) -> None:
    assert run(["train", "task.py", "--epochs", 4, "--out", "whole"], Path("log")) == 0
    os.rename("train.csv", "aside.csv")
    assert run(["resume", "run", "--epochs", 4, "--force"], Path("log")) == 1
    os.rename("aside.csv", "train.csv")
    assert run(["resume", "run", "--epochs", 4, "--force"], Path("log")) == 0, Path("log").read_text()
    assert_same(Path("run"), Path("whole"))


class Folder(torch.utils.data.Dataset[Any]):
    """A data set that tells its classes."""

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(i)), i % 2


def fit(out: Path, train: Any, val: Any) -> stoker.Run:
    recipe = stoker.Recipe(
        model=nn.Linear(2, 3),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=stoker.Loader(train, 4),
        val=stoker.Loader(val, 4),
    )
    return stoker.fit(recipe, steps=1, out=out, quiet=True)


def test_labels_that_mean_different_classes(tmp_path: Path) -> None:
    with pytest.raises(stoker.UserError, match="label 1 is 'dog' in the train data and 'fish' in the val data"):
        fit(tmp_path / "run", Folder(["cat", "dog", "fish"]), Folder(["cat", "fish"]))
    fit(tmp_path / "run", Folder(["cat", "dog"]), Folder(["cat", "dog"]))


def test_rows_in_two_splits_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.randn(40, 2), torch.zeros(40, dtype=torch.int64)
    fit(tmp_path / "run", (x, y), (torch.cat([x[5:8], torch.randn(5, 2)]), y[:8]))
    assert "3 of 8 val rows are also in train" in capsys.readouterr().err
    fit(tmp_path / "other", (x, y), (torch.randn(8, 2), y[:8]))
    assert "also in train" not in capsys.readouterr().err


def test_parts_that_are_trained_in_eval_mode_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `from_pretrained` returns an encoder; frozen ones, and those without such layers, are as they should be."""
    model = nn.ModuleDict(
        {
            "trained": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval(),
            "frozen": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval().requires_grad_(False),
            "plain": nn.Linear(2, 2).eval(),
            "head": nn.Linear(2, 2),
        }
    )
    recipe = stoker.Recipe(
        model=model,
        step=lambda model, batch: model["head"](model["trained"](batch[0])).mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=stoker.Loader((torch.randn(8, 2), torch.zeros(8)), 4),
    )
    stoker.fit(recipe, steps=1, out=tmp_path / "run", quiet=True)
    said = capsys.readouterr().err
    assert "trained is trained in eval mode" in said
    assert said.count("eval mode") == 1
