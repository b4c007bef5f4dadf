"""Law 3: whoever watches, logs, evaluates or saves, the weights and the optimizer's state are the same bits."""

import multiprocessing
import os
import pty
import random
import select
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import stoker
from tests.laws.runs import final

SEED, EPOCHS, N, BATCH = 4, 4, 22, 4
STEPS = EPOCHS * 6


class Noisy(Dataset[Any]):
    """Draws from all three generators: whoever else drew would show in the weights."""

    def __init__(self) -> None:
        self.x = torch.randn(N, 5, generator=torch.Generator().manual_seed(6))

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index] + torch.randn(5) + np.random.normal() + random.random(), index % 3


def watched_recipe(ema: float | None = None, val: bool = True) -> stoker.Recipe:
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        schedule=stoker.cosine(warmup_steps=3),
        train=stoker.Loader(Noisy(), BATCH, shuffle=True),
        val=stoker.Loader(Noisy()) if val else None,
        metrics={"accuracy": lambda output, target: (output.argmax(1) == target).float()},
        clip_norm=1.0,
        ema=ema,
    )


def train(out: Path, recipe: stoker.Recipe | None = None, **options: Any) -> stoker.Run:
    given = {"epochs": EPOCHS, "seed": SEED, "quiet": True, "device": "cpu", **options}
    return stoker.fit(recipe or watched_recipe(), out=out, **given)


def weights(out: Path, *, optimizer: bool = True) -> dict[str, Any]:
    files = ("model.safetensors:", "state.safetensors:") if optimizer else ("model.safetensors:",)
    found = {name: value for name, value in final(out)["tensors"].items() if name.startswith(files)}
    assert len(found) > 5
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("reference") / "run"
    train(out)
    torch.set_num_threads(before)
    return weights(out)


def test_another_seed_gives_other_weights(tmp_path: Path, reference: dict[str, Any]) -> None:
    """Else all that follows would say nothing."""
    train(tmp_path / "run", seed=SEED + 1)
    assert weights(tmp_path / "run") != reference


@pytest.mark.parametrize(
    "options",
    [
        {"log_every": 1},
        {"log_every": 1000},
        {"checkpoint_every": 1},
        {"checkpoint_every": 1, "keep": 1, "keep_best": 5},
        {"checkpoint_every": 1000},
        {"eval_every": 1},
        {"eval_every": 5},
        {"eval_every": 1000},
        {"log_every": 1, "eval_every": 1, "checkpoint_every": 1},
    ],
    ids=str,
)
def test_logging_saving_and_evaluating(tmp_path: Path, reference: dict[str, Any], options: dict[str, Any]) -> None:
    train(tmp_path / "run", **options)
    assert weights(tmp_path / "run") == reference


def test_no_evaluation_at_all(tmp_path: Path, reference: dict[str, Any]) -> None:
    train(tmp_path / "run", watched_recipe(val=False))
    assert weights(tmp_path / "run") == reference


@pytest.mark.parametrize("ema", [0.5, 0.999])
def test_average_of_the_weights(tmp_path: Path, reference: dict[str, Any], ema: float) -> None:
    train(tmp_path / "run", watched_recipe(ema=ema), log_every=1)
    own = weights(tmp_path / "run")
    assert own == reference
    averaged = {k.split(":")[1]: v for k, v in final(tmp_path / "run")["tensors"].items() if k.startswith("ema")}
    assert averaged["0.weight"] != own["model.safetensors:0.weight"]


def test_lines_in_a_pipe(tmp_path: Path, reference: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", quiet=False)
    assert weights(tmp_path / "run") == reference
    assert "next: " in capsys.readouterr().out


def test_callbacks_that_draw_and_change_the_generators(tmp_path: Path, reference: dict[str, Any]) -> None:
    calls: list[tuple[int, float]] = []

    def draw(progress: Any, metrics: Any) -> None:
        calls.append((progress.step, torch.rand(()).item() + np.random.rand() + random.random()))

    def reseed(progress: Any, metrics: Any) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)

    train(tmp_path / "run", on_step=[draw, reseed, draw])
    assert weights(tmp_path / "run") == reference
    assert [step for step, _ in calls] == [step for step in range(1, STEPS + 1) for _ in range(2)]


def test_the_callers_generators_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = (torch.rand(3).tolist(), np.random.rand(), random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    train(tmp_path / "run", workers=2)
    assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == expected


def _on_terminal(terminal: int, out: Path) -> None:
    os.setsid()
    for descriptor in (0, 1, 2):
        os.dup2(terminal, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # pytest's own objects were inherited
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ |= {"TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
    os.environ.pop("NO_COLOR", None)
    # Slow enough for the thread that repaints, four times a second, to come by while the loop is at work.
    train(out, quiet=False, on_step=[lambda progress, metrics: time.sleep(0.04)], log_every=1)


def test_a_live_terminal(tmp_path: Path, reference: dict[str, Any]) -> None:
    ours, theirs = pty.openpty()
    out = tmp_path / "run"
    process = multiprocessing.get_context("fork").Process(target=_on_terminal, args=(theirs, out))
    process.start()
    os.close(theirs)
    shown = b""
    while True:
        if not select.select([ours], [], [], 120)[0]:
            process.kill()
            break
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    process.join(60)
    os.close(ours)
    text = shown.decode(errors="replace")
    assert process.exitcode == 0, text
    assert weights(out) == reference
    assert "\x1b[" in text
    assert f"/{STEPS}" in text
    assert text.count("steps/s") > 2  # it was repainted
