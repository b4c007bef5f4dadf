"""The commands where nothing goes wrong: train, resume, show, eval, predict, lr, and what they print."""

import csv
import enum
import json
import multiprocessing
import os
import pty
import sys
import time
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
import torch
import torch._dynamo  # optimizers import it: once here instead of once in every child
from safetensors.torch import load_file

import stoker
from stoker.cli import main
from stoker.source import convert
from tests.laws.runs import run

RECIPE = '''
import torch
from torch import nn
from torch.utils.data import Dataset

import stoker


class Data(Dataset):
    def __init__(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 3, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def recipe(width: int = 8, lr: float = 0.05, batch_size: int = 16, name: str = "plain", deep: bool = False):
    """Two classes, divided by a plane.

    The second paragraph.
    """
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2)),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
        schedule=stoker.cosine(warmup_steps=2),
        train=stoker.Loader(Data(64, 0), batch_size, shuffle=True),
        val=stoker.Loader(Data(21, 1), 8, shuffle=True, drop_last=True),
        test=stoker.Loader(Data(10, 2)),
        metrics={"accuracy": lambda output, target: (output.argmax(1) == target).float()},
        ema=0.5,
    )


def needs(path: str, size: int):
    """Two that must be given."""


def bowl(curvature: float = 2.0):
    """Convex: diverges above a rate of 2 / curvature."""
    return stoker.Recipe(
        model=lambda: nn.Linear(1, 1, bias=False),
        step=lambda model, batch: 0.5 * curvature * ((model.weight - 3) ** 2).sum(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=torch.zeros(1),
    )
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "planes.py"
    path.write_text(RECIPE)
    return path


def said(*words: Any, log: Path) -> str:
    """What a command that succeeds prints."""
    log.unlink(missing_ok=True)
    code = run(list(words), log)
    assert code == 0, log.read_text()
    return log.read_text()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def trained(file: Path, log: Path) -> Path:
    out = file.parent / "run"
    said("train", file, "--epochs", 4, "--out", out, "--quiet", log=log)
    return out


def data_of(name: str) -> Any:
    """A split of the recipe, read as plain torch would."""
    space: dict[str, Any] = {}
    exec(compile(RECIPE, "planes", "exec"), space)
    n, seed = {"train": (64, 0), "val": (21, 1), "test": (10, 2)}[name]
    return space["Data"](n, seed)


def test_train_resume_show(file: Path, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = said("train", file, "width=6", "--epochs", 3, "--steps", 5, "--seed", 9, "--out", out, log=log)
    assert f"training in {out}" in first
    assert "finished at step 5" in first and f"stoker eval {out}" in first
    shown = said("show", out, log=log)
    for part in ("planes", "width=6", "seed", "9", "precision=fp32", "step-00000005", "(latest)", "(best)", "val/loss"):
        assert part in shown
    assert "finished: steps" in shown
    assert "going on at step 5" in said("resume", out, "--steps", 9, "--force", log=log)
    assert json.loads((out / "checkpoints/latest/checkpoint.json").read_text())["step"] == 9
    assert json.loads((out / "run.json").read_text())["seed"] == 9
    assert (out / "recipe.py").read_text() == RECIPE


def test_a_run_survives_its_recipes_file(file: Path, log: Path, trained: Path) -> None:
    evaluated = said("eval", trained, log=log)
    file.unlink()
    assert said("eval", trained, log=log) == evaluated
    assert "already finished" in said("resume", trained, log=log)


def test_show_a_recipe(file: Path, log: Path) -> None:
    shown = said("show", file, "width=5", log=log)
    for part in ("Two classes, divided by a plane.", "width", "default 8", "BatchNorm1d", "Linear"):
        assert part in shown


def test_help(file: Path, log: Path) -> None:
    plain = said("train", "--help", log=log)
    assert "--checkpoint-every" in plain and "width" not in plain
    for words in (["train", file, "--help"], ["train", "--help", file], ["train", file, "-h"]):
        text = said(*words, log=log)
        assert "Two classes, divided by a plane." in text and "The second paragraph." in text
        lines = {
            line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ") and line.split()
        }
        assert lines["width"] == ["int", "default", "8"]
        assert lines["lr"] == ["float", "default", "0.05"]
        assert lines["name"] == ["str", "default", "'plain'"]
        assert lines["deep"] == ["bool", "default", "False"]
    text = said("train", f"{file}:needs", "--help", log=log)
    assert text.count("required") == 2
    for command in (
        "resume",
        "show",
        "eval",
        "predict",
        "lr",
        "verify",
        "runs",
        "compare",
        "pack",
        "reproduce",
        "export",
    ):
        assert f"stoker {command}" in said(command, "--help", log=log)


def test_a_new_folder_each_time(file: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        said("train", file, "--steps", 1, "--quiet", log=log)
    runs = list((tmp_path / "runs" / "planes").iterdir())
    assert len(runs) == 2 and all((r / "run.json").is_file() for r in runs)


# ------------------------------------------------------------------ eval and predict


def values(text: str) -> dict[str, str]:
    return dict(line.split() for line in text.splitlines())


@pytest.mark.parametrize("which", ["best", "latest"])
@pytest.mark.parametrize("extra", [[], ["--batch-size", 5], ["--workers", 2]], ids=str)
def test_eval_equals_what_the_run_logged(trained: Path, log: Path, which: str, extra: list[Any]) -> None:
    link = "best" if which == "best" else "latest"
    record = json.loads((trained / "checkpoints" / link / "checkpoint.json").read_text())
    logged = {name: value for name, value in record["metrics"].items() if name.startswith("val/")}
    assert logged.keys() == {"val/loss", "val/accuracy"}
    found = values(said("eval", trained, "--checkpoint", which, *extra, log=log))
    assert found.keys() == logged.keys()
    for name, value in logged.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_eval_counts_every_sample_once(trained: Path, log: Path, split: str) -> None:
    model, data = stoker.load(trained), data_of(split)
    with torch.no_grad():
        output = model(data.x)
    found = values(said("eval", trained, "--split", split, log=log))
    assert float(found[f"{split}/accuracy"]) == pytest.approx((output.argmax(1) == data.y).float().mean().item())
    loss = torch.nn.functional.cross_entropy(output, data.y).item()
    assert float(found[f"{split}/loss"]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("suffix", [".csv", ".safetensors"])
@pytest.mark.parametrize("extra", [["--batch-size", 4], ["--workers", 2, "--batch-size", 5]], ids=str)
def test_predict_in_the_datas_own_order(trained: Path, log: Path, split: str, suffix: str, extra: list[Any]) -> None:
    model, data, out = stoker.load(trained), data_of(split), trained / f"p{suffix}"
    with torch.no_grad():
        expected = model(data.x)
    text = said("predict", trained, "--split", split, "--out", out, *extra, log=log)
    assert f"{len(data)} predictions in {out}" in text
    if suffix == ".csv":
        with out.open(newline="") as lines:
            header, *rows = csv.reader(lines)
        assert header == ["sample", "output_0", "output_1"]
        assert [int(row[0]) for row in rows] == list(range(len(data)))
        found = torch.tensor([[float(value) for value in row[1:]] for row in rows])
    else:
        found = load_file(out)["output"]
    torch.testing.assert_close(found, expected)


def test_predict_by_default(trained: Path, log: Path) -> None:
    said("predict", trained, log=log)
    assert len((trained / "predictions-val.csv").read_text().splitlines()) == 22
    again = said("train", trained.parent / "planes.py", "--epochs", 4, "--out", trained, log=log)
    assert "already finished" in again


# ------------------------------------------------------------------ lr


@pytest.mark.parametrize("curvature", [0.2, 2.0, 40.0])
def test_lr_of_a_bowl(file: Path, log: Path, curvature: float) -> None:
    """Gradient descent converges below 2 / curvature: the suggestion is below that, by less than a factor of 100."""
    out = file.parent / "range"
    words = ["lr", f"{file}:bowl", f"curvature={curvature}", "--from", 1e-5, "--to", 100, "--out", out]
    text = said(*words, log=log)
    suggestion = float(text.split("steepest fall at lr=")[1].split()[0])
    assert 0.02 / curvature < suggestion < 2 / curvature
    with open(f"{out}.csv", newline="") as lines:
        header, *rows = csv.reader(lines)
    assert header == ["lr", "loss"]
    rates, losses = zip(*[(float(a), float(b)) for a, b in rows], strict=True)
    assert rates[0] == pytest.approx(1e-5) and list(rates) == sorted(rates)
    assert min(losses) < 0.5 * losses[0]
    assert sorted(p.name for p in file.parent.iterdir() if p.suffix not in (".html", ".py")) == ["log", "range.csv"]


def test_lr_of_a_recipe(file: Path, log: Path) -> None:
    text = said("lr", file, "--steps", 40, "--out", file.parent / "range", log=log)
    assert "rates from 1e-06" in text
    assert 5 <= len((file.parent / "range.csv").read_text().splitlines()) <= 41


# ------------------------------------------------------------------ what is printed


def test_a_pipe_gets_no_progress_within_thirty_seconds(file: Path, log: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    text = said("train", file, "--epochs", 40, "--log-every", 1, "--out", tmp_path / "run", log=log)
    lines = [line for line in text.splitlines() if "steps/s" in line]
    assert len(lines) <= (time.monotonic() - began) / 30
    assert "\x1b" not in text and "\r" not in text
    assert len(text.splitlines()) < 20
    assert said("train", file, "--epochs", 2, "--out", tmp_path / "quiet", "--quiet", log=log) == ""


def _on_terminal(words: list[str], name: str) -> None:
    os.setsid()
    descriptor = os.open(name, os.O_RDWR)  # becomes the controlling terminal
    for number in (0, 1, 2):
        os.dup2(descriptor, number)
    os.environ.update(TERM="xterm", COLUMNS="150", LINES="40")
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["stoker", *map(str, words)]
    main()


def test_a_terminal_gets_a_live_line(file: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = ["train", file, "--epochs", 150, "--log-every", 1, "--out", tmp_path / "run"]
    process = multiprocessing.get_context("fork").Process(target=_on_terminal, args=(words, os.ttyname(theirs)))
    process.start()
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:  # the other side has closed
        pass
    process.join(60)
    os.close(ours)
    assert process.exitcode == 0, text.decode()
    assert b"steps/s" in text and b"ETA" in text and b"\x1b[" in text
    assert b"finished at step 600" in text
    assert text.count(b"\n") < 120, "a live line rewrites itself"


# ------------------------------------------------------------------ arguments


class Mode(enum.Enum):
    """By name."""

    FAST = 1
    EXACT = 2


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", int, 3),
        ("-3", int, -3),
        ("1e3", int, 1000),
        ("1_000", int, 1000),
        ("9007199254740993", int, 9007199254740993),
        ("-9007199254740993", int, -9007199254740993),
        ("3", float, 3.0),
        ("1e-3", float, 1e-3),
        ("inf", float, float("inf")),
        ("true", bool, True),
        ("False", bool, False),
        ("1", bool, True),
        ("off", bool, False),
        ("12", str, "12"),
        ("a=b c", str, "a=b c"),
        ("", str, ""),
        ("~/data", Path, Path("~/data")),
        ("b", Literal["a", "b"], "b"),
        ("2", Literal[1, 2], 2),
        ("none", int | None, None),
        ("None", Optional[float], None),  # noqa: UP045
        ("4", int | None, 4),
        ("4", int | str, 4),
        ("four", int | str, "four"),
        ("four", str | int, "four"),
        ("0.5", Union[int, float], 0.5),  # noqa: UP007
        ("none", str | None, None),
        ("1,2,3", list[int], [1, 2, 3]),
        ("[1, 2]", list[int], [1, 2]),
        ("", list[int], []),
        ("7", list[int], [7]),
        ("a,b", list[str], ["a", "b"]),
        ("1,a", tuple[int, str], (1, "a")),
        ("1,2,3", tuple[int, ...], (1, 2, 3)),
        ("(0.9,0.999)", tuple[float, float], (0.9, 0.999)),
        ("1,2", list, [1, 2]),
        ("1,x", tuple, (1, "x")),
        ("FAST", Mode, Mode.FAST),
        ("3", Any, 3),
        ("text", Any, "text"),
        ("[1, 'a']", Any, [1, "a"]),
        ("{'a': 1}", dict[str, int], {"a": 1}),
        ("{'a': 1}", dict, {"a": 1}),
        ("torch.float32", Any, "torch.float32"),
    ],
    ids=str,
)
def test_conversion(text: str, annotation: Any, value: Any) -> None:
    found = convert(text, annotation)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "annotation"),
    [
        ("3.5", int),
        ("x", int),
        ("", int),
        ("nan", int),
        ("inf", int),
        ("x", float),
        ("2", bool),
        ("maybe", bool),
        ("c", Literal["a", "b"]),
        ("x", int | None),
        ("1,x", list[int]),
        ("1,2,3", tuple[int, int]),
        ("1", tuple[int, int]),
        ("SLOW", Mode),
        ("[1]", dict[str, int]),
        ("abc", dict),
        ("gpu", torch.device),
    ],
    ids=str,
)
def test_conversion_refuses(text: str, annotation: Any) -> None:
    with pytest.raises((ValueError, OverflowError)):
        convert(text, annotation)


def test_arguments_without_annotations(file: Path, log: Path) -> None:
    file.write_text(
        RECIPE + "\n\ndef loose(width=8, scale=0.5, deep=False, extra=None):\n"
        "    print('got', repr(width), repr(scale), repr(deep), repr(extra))\n"
        "    return recipe(width=width)\n"
    )
    words = ["train", f"{file}:loose", "width=4", "scale=2", "deep=yes", "extra=[1, 2]", "--steps", 1]
    assert "got 4 2.0 True [1, 2]" in said(*words, "--out", file.parent / "run", log=log)


def test_a_value_may_hold_an_equals_sign(file: Path, log: Path) -> None:
    out = file.parent / "run"
    said("train", file, "name=a=b", "--steps", 1, "--out", out, "--quiet", log=log)
    assert json.loads((out / "run.json").read_text())["recipe"]["arguments"]["name"] == "a=b"
