"""From `stoker train` to the user's code is a short way: few frames of stoker's, in two files, around a short step."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import stoker
from stoker import train
from stoker.source import load_source

SOURCE = Path(stoker.__file__).parent
MAX_FRAMES, MAX_FILES, MAX_STEP_LINES = 3, 2, 30

RECIPE = '''
import os
import sys
from pathlib import Path

import torch
from torch import nn

import stoker

SOURCE = str(Path(stoker.__file__).parent) + os.sep


def note(place):
    """Append what of stoker is on the stack."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            found.append(frame.f_code.co_filename.removeprefix(SOURCE) + ":" + frame.f_code.co_name)
        frame = frame.f_back
    with open(os.environ["STOKER_TEST_STACK"], "a") as file:
        print(place, *found, file=file)


class Watched(nn.Linear):
    def forward(self, x):
        note("forward" if self.training else "evaluation")
        return super().forward(x)


class Sgd(torch.optim.SGD):
    def step(self, closure=None):
        note("optimizer.step")
        return super().step(closure)


def step(model, batch):
    note("step" if model.training else "evaluation")
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def recipe(own_step: bool = False, scheduled: bool = False, lbfgs: bool = False):
    """A probe."""
    data = torch.ones(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    how = {"step": step} if own_step else {"loss": nn.CrossEntropyLoss()}
    return stoker.Recipe(
        model=lambda: Watched(3, 2),
        optimizer=lambda parameters: torch.optim.LBFGS(parameters) if lbfgs else Sgd(parameters, lr=0.1),
        schedule=stoker.cosine() if scheduled else None,
        train=stoker.Loader(data, 2),
        val=stoker.Loader(data),
        **how,
    )
'''


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STOKER_TEST_STACK", str(tmp_path / "stacks"))
    file = tmp_path / "probe.py"
    file.write_text(RECIPE)
    return file


def stacks(tmp_path: Path) -> dict[str, set[tuple[str, ...]]]:
    """Distinct stacks by place, innermost frame first."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for line in (tmp_path / "stacks").read_text().splitlines():
        place, *frames = line.split()
        found.setdefault(place, set()).add(tuple(frames))
    return found


def assert_short(found: dict[str, set[tuple[str, ...]]], *places: str) -> None:
    for place in places:
        assert len(found[place]) == 1, "the way is always the same"
        (frames,) = found[place]
        assert 0 < len(frames) <= MAX_FRAMES, frames
        assert len({frame.split(":")[0] for frame in frames}) <= MAX_FILES, frames
        assert any(frame.startswith("train.py:") for frame in frames)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("microbatch", [None, 1])
def test_fit(tmp_path: Path, probe: Path, scheduled: bool, microbatch: int | None) -> None:
    recipe = load_source(str(probe)).recipe({"own_step": True, "scheduled": scheduled})
    stoker.fit(recipe, epochs=2, out=tmp_path / "run", quiet=True, device="cpu", microbatch=microbatch)
    found = stacks(tmp_path)
    assert found.keys() == {"forward", "step", "optimizer.step", "evaluation"}
    assert_short(found, "forward", "step", "optimizer.step")
    assert found["forward"] == found["step"]  # a step of the user's own costs no frame


def test_fit_with_a_loss(tmp_path: Path, probe: Path) -> None:
    stoker.fit(load_source(str(probe)).recipe({}), epochs=1, out=tmp_path / "run", quiet=True, device="cpu")
    found = stacks(tmp_path)
    assert_short(found, "forward", "optimizer.step")


def test_fit_with_a_closure(tmp_path: Path, probe: Path) -> None:
    recipe = load_source(str(probe)).recipe({"lbfgs": True})
    stoker.fit(recipe, epochs=1, out=tmp_path / "run", quiet=True, device="cpu")
    assert_short(stacks(tmp_path), "forward")


def test_the_optimizer_steps_beside_forward_not_around_it(tmp_path: Path, probe: Path) -> None:
    """Where no closure is needed none is given, with a schedule (which wraps `step`) as without one."""
    recipe = load_source(str(probe)).recipe({"scheduled": True})
    stoker.fit(recipe, epochs=1, out=tmp_path / "run", quiet=True, device="cpu")
    order = [line.split()[0] for line in (tmp_path / "stacks").read_text().splitlines()]
    assert order[:4] == ["forward", "optimizer.step"] * 2


@pytest.mark.parametrize(
    "program", [["-m", "stoker"], ["-c", "from stoker.cli import main; main()"]], ids=["module", "console"]
)
def test_command_line(tmp_path: Path, probe: Path, program: list[str]) -> None:
    out = tmp_path / "run"
    words = ["train", str(probe), "scheduled=true", "--epochs", "1", "--out", str(out), "--quiet", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *program, *words], capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = stacks(tmp_path)
    assert_short(found, "forward", "optimizer.step")
    (outermost,) = {frames[-1] for frames in found["forward"]}
    assert outermost.split(":")[0] in ("__main__.py", "cli/__init__.py")


def test_the_step_is_short() -> None:
    assert len(inspect.getsource(train.forward_backward).splitlines()) <= MAX_STEP_LINES
