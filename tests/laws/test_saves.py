"""Saves are of the state at their step, whole or absent, whatever happens beside them."""

import copy
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it: once here instead of once in every child
from torch import nn

import stoker
from stoker.checkpoint.store import Snapshot, Store, read
from stoker.source import load_source
from tests.laws.runs import assert_same, run, start, wait

LARGE = Path(__file__).with_name("large.py")
KILLS = 500 if os.environ.get("STOKER_NIGHTLY") else 50


def state_of(session: Any) -> dict[str, Any]:
    """Deep copies of everything that a step changes."""
    state = session.state
    return {
        "model": copy.deepcopy(dict(state.model.state_dict())),
        "ema": copy.deepcopy(dict(state.ema.state_dict())),
        "optimizer": copy.deepcopy(state.objectives[0].optimizer.state_dict()["state"]),
        "carry": copy.deepcopy(state.objectives[0].carry),
    }


def test_what_is_written_is_the_state_at_that_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write takes as long as several steps; each of these changes everything in place."""
    writing: list[int] = []
    write = Store.write

    def slowly(self: Store, saved: Snapshot) -> Path:
        writing.append(saved.step)
        assert len(writing) == 1, "two writes at once"
        time.sleep(0.03)
        try:
            return write(self, saved)
        finally:
            writing.remove(saved.step)

    monkeypatch.setattr(Store, "write", slowly)
    expected: dict[int, dict[str, Any]] = {}
    overlapped: list[int] = []
    sessions: list[Any] = []
    make = stoker.start.Session

    def keeping(*args: Any, **kwargs: Any) -> Any:
        sessions.append(make(*args, **kwargs))
        return sessions[-1]

    monkeypatch.setattr(stoker.start, "Session", keeping)

    def remember(progress: Any, metrics: Any) -> None:
        expected[progress.step] = state_of(sessions[0])
        overlapped.extend(writing)

    recipe = load_source(str(LARGE)).recipe({"numbers": 20_000, "batches": 40})
    out = tmp_path / "out"
    options = {"epochs": 1, "checkpoint_every": 3, "keep": 100, "quiet": True, "device": "cpu"}
    stoker.fit(recipe, out=out, on_step=[remember], **options)
    checkpoints = [read(path) for path in Store(out / "checkpoints").all()]
    assert [c.step for c in checkpoints] == [*range(3, 40, 3), 40]
    assert len(set(overlapped)) >= 4, "training waited for the writes"
    for found in checkpoints:
        then = expected[found.step]
        for name in ("model", "ema"):
            assert all(torch.equal(value, getattr(found, name)[key]) for key, value in then[name].items())
        (objective,) = found.state["objectives"].values()
        moments = objective["optimizer"]["state"]
        for saved, live in zip(moments.values(), then["optimizer"].values(), strict=True):
            assert all(torch.equal(saved[key], value) for key, value in live.items())
        carried = next(iter(found.state["carry"].values()))
        assert (carried is None) == (then["carry"] is None)
        assert carried is None or torch.equal(carried["seen"], then["carry"]["seen"])


class Spoils(torch.optim.SGD):
    """Its sixth step leaves a weight that is no number, behind a loss that was one."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.steps += 1
        if self.steps == 6:
            self.param_groups[0]["params"][0].data[0, 0] = float("nan")


def picky(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that fails on what is no number."""
    if output.isnan().any():
        raise RuntimeError("no such thing")
    return nn.functional.cross_entropy(output, target)


@pytest.mark.parametrize("steps", [6, 20], ids=["in the last step", "on the way"])
@pytest.mark.parametrize("every", [2, 3])
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, steps: int, every: int) -> None:
    recipe = spoiled(nn.CrossEntropyLoss())
    with pytest.raises(stoker.UserError, match=r"parameter 0\.weight is not finite in step 6 "):
        stoker.fit(recipe, steps=steps, checkpoint_every=every, keep=9, out=tmp_path / "out", quiet=True)
    checkpoints = [read(path) for path in Store(tmp_path / "out" / "checkpoints").all()]
    assert [found.step for found in checkpoints] == list(range(every, 6, every))
    assert all(tensor.isfinite().all() for found in checkpoints for tensor in found.model.values())


def test_a_step_that_fails_on_them_comes_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        stoker.fit(spoiled(picky), steps=20, checkpoint_every=2, keep=9, out=tmp_path / "out", quiet=True)
    assert "parameter 0.weight was not finite before that" in capfd.readouterr().err
    assert [read(path).step for path in Store(tmp_path / "out" / "checkpoints").all()] == [2, 4]


def spoiled(loss: Any) -> stoker.Recipe:
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(3, 2)),
        loss=loss,
        optimizer=lambda params: Spoils(params, lr=0.1),
        train=stoker.Loader((torch.randn(40, 3), torch.arange(40) % 2), 4),
    )


# ------------------------------------------------------------------ SIGKILL while saving


def test_sigkill_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of 32 MB, saved every other step with TMPDIR elsewhere: no kill costs more than the save it hit."""
    if Path("/dev/shm").is_dir():
        monkeypatch.setenv("TMPDIR", "/dev/shm")
    log, every = tmp_path / "log", 2
    words = ["train", LARGE, f"batches={KILLS * 2}", "--epochs", 1, "--log-every", 1, "--quiet", "--device", "cpu"]
    words += ["--checkpoint-every", every]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run([*words[:-2], "--out", whole], log) == 0, log.read_text()
    draw = random.Random(1)
    deaths = in_writes = 0
    while deaths < KILLS:
        store = Store(killed / "checkpoints")
        began = store.latest()
        process = start([*words, "--out", killed], log)
        while process.is_alive() and store.latest() == began and not list(store.folder.glob(".partial-0*")):
            time.sleep(0.002)  # it is up, and has begun to save
        time.sleep(draw.uniform(0, 0.12))
        events = (killed / "events.jsonl").read_text().splitlines()
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        code = wait(process, log)
        if code != -signal.SIGKILL:
            assert code == 0, log.read_text()
            break
        deaths += 1
        in_writes += bool(list(store.folder.glob(".partial-0*")))
        checkpoint, complaints = store.newest_good()
        assert complaints == []
        # One event for each step at least: what the log told before the kill, less the steps whose save was under way.
        steps = max((int(line.split('"step": ')[1].split(",")[0]) for line in events if line.endswith("}")), default=0)
        assert (checkpoint.step if checkpoint is not None else 0) >= steps // every * every - every
    assert in_writes > KILLS / 4, "the kills missed the writes"
    assert run([*words, "--out", killed], log) == 0, log.read_text()
    assert "damaged" not in log.read_text()
    assert_same(whole, killed)
    assert not [path.name for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three checkpoints, stopped after the third."""
    out = tmp_path_factory.mktemp("sound") / "run"
    recipe = load_source(str(LARGE)).recipe({"numbers": 500, "batches": 8})
    options = {"checkpoint_every": 2, "keep": 9, "quiet": True, "device": "cpu", "log_every": 1}
    stoker.fit(recipe, epochs=1, out=out, **options)
    return out


def damages(folder: Path, other: Path, draw: random.Random) -> None:
    """Change something of a checkpoint."""
    file = draw.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    kind = draw.choice(["flip"] * 12 + ["truncate", "append", "remove", "swap"])
    if kind == "flip":
        where = draw.randrange(len(content))
        content[where] = draw.choice([b for b in range(256) if b != content[where]])
        file.write_bytes(content)
    elif kind == "truncate":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "append":
        file.write_bytes(content + draw.randbytes(draw.randrange(1, 9)))
    elif kind == "remove":
        file.unlink()
    else:
        theirs = (other / file.name).read_bytes()
        (other / file.name).write_bytes(content)
        file.write_bytes(theirs)


def test_every_damage_is_found(tmp_path: Path, sound: Path) -> None:
    draw = random.Random(2)
    for i in range(KILLS * 2):
        out = tmp_path / str(i)
        shutil.copytree(sound / "checkpoints", out, symlinks=True)
        store = Store(out)
        *_, before, newest = store.all()
        damages(newest, store.all()[0], draw)
        found, complaints = store.newest_good()
        assert found is not None
        assert found.path == before
        assert len(complaints) == 1
        assert newest.name in complaints[0]
        shutil.rmtree(out)


@pytest.mark.parametrize("blank", [b"\t", b"\n", b"  "])
def test_a_blank_of_the_record(tmp_path: Path, sound: Path, blank: bytes) -> None:
    out = tmp_path / "checkpoints"
    shutil.copytree(sound / "checkpoints", out, symlinks=True)
    record = Store(out).all()[-1] / "checkpoint.json"
    content = record.read_bytes()
    for at in [i for i, byte in enumerate(content) if byte in b" \n"][::37]:
        record.write_bytes(content[:at] + blank + content[at + 1 :])
        assert (len(Store(out).newest_good()[1]) == 1) == (record.read_bytes() != content)


def test_the_newest_good_one_is_taken(tmp_path: Path, sound: Path) -> None:
    """Two damaged ones: the run goes on from the third newest, says why, and ends with the same bits."""
    out = tmp_path / "run"
    shutil.copytree(sound, out, symlinks=True)
    names = [path.name for path in Store(out / "checkpoints").all()]
    for name in names[-2:]:
        tensors = out / "checkpoints" / name / "state.safetensors"
        content = bytearray(tensors.read_bytes())
        content[-3] ^= 1
        tensors.write_bytes(content)
    log = tmp_path / "log"
    assert run(["resume", out, "--quiet"], log) == 0, log.read_text()
    text = log.read_text()
    assert all(f"skipped a damaged checkpoint: {name}/state.safetensors" in text for name in names[-2:])
    assert_same(sound, out)
