"""Disks that are full, fill up, become read-only or lose a folder: small file systems of the test's own."""

import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it: once here instead of once in every child
from torch import nn

import stoker
from stoker.checkpoint.store import Store, read
from tests.laws.runs import assert_same, events, start, wait

ONE = 2_412_000  # bytes of a checkpoint, about
LARGE = Path(__file__).parents[1] / "laws" / "large.py"

Actions = dict[int, Callable[[], object]]


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(200_000))
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.table[:2]


def rows(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(64, 3, generator=torch.Generator().manual_seed(number)), torch.arange(64) % 2


def recipe() -> stoker.Recipe:
    return stoker.Recipe(
        model=Wide,
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda p: torch.optim.Adam(p, 0.01),
        train=stoker.Loader(rows(1), 8, shuffle=True),
        val=stoker.Loader(rows(2), 64),
    )


def fit(out: Path, actions: Actions | None = None, **options: Any) -> stoker.Run:
    """Train for 24 steps with a save every other one, and do something at some of them."""

    def act(progress: Any, metrics: Any) -> None:
        (actions or {}).get(progress.step, bool)()

    given = {"epochs": 3, "checkpoint_every": 2, "log_every": 1, "device": "cpu", "quiet": True}
    return stoker.fit(recipe(), out=out, on_step=[act], **{**given, **options})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a tmpfs of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int, *options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", folder]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(out)
    return out


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill(folder: Path) -> Callable[[], None]:
    """Write a file until there is no room."""

    def act() -> None:
        descriptor = os.open(folder / "filler", os.O_CREAT | os.O_WRONLY)
        try:
            while os.write(descriptor, b"x" * (1 << 16)):
                pass
        except OSError:
            pass
        finally:
            os.close(descriptor)

    return act


def empty(folder: Path) -> Callable[[], None]:
    return lambda: (folder / "filler").unlink()


def all_good(out: Path) -> list[int]:
    """Steps of the checkpoints, each of which verifies."""
    return [read(path).step for path in Store(out / "checkpoints").all()]


def test_not_even_one_fits(disk: Callable[..., Path], whole: Path) -> None:
    folder = disk(ONE // 2)
    steps: Actions = {1: lambda: pytest.fail("a step was taken")}
    with pytest.raises(stoker.UserError, match=r"(?s)one takes 2\.4\d* MB; .* are free.*make room"):
        fit(folder / "run", steps)
    remount(folder, f"size={ONE * 9}")
    fit(folder / "run")
    assert_same(whole, folder / "run")


def test_less_room_than_retention_wants(
    disk: Callable[..., Path], whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Four at most (two newest, the best, the one in writing); room for three: said at the start, and enough."""
    folder = disk(int(ONE * 3.2))
    fit(folder / "run")
    text = capfd.readouterr().err
    assert "checkpoints will take up to 9.6" in text
    assert "--keep 2, --keep-best 1" in text
    assert "could not save" not in text
    assert_same(whole, folder / "run")
    assert len(all_good(folder / "run")) >= 2


def test_it_fills_up_and_room_is_made(
    disk: Callable[..., Path], whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = disk(ONE * 6)
    out = folder / "run"
    kept: list[list[int]] = []
    look = {18: lambda: kept.append(all_good(out))}
    ended = fit(out, {8: lambda: time.sleep(0.3), 9: fill(folder), **look, 19: empty(folder)})
    text = capfd.readouterr().err
    assert ended.reason == "epochs"
    assert "could not save step 1" in text
    assert "a kill now goes back to step-0000000" in text or "a kill now goes back to step-0000001" in text
    assert kept
    assert kept[0]
    assert_same(whole, out)
    assert events(whole) == events(out)


def test_it_fills_up_for_ever(disk: Callable[..., Path], whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = disk(ONE * 6)
    out, steps = folder / "run", list[int]()
    with pytest.raises(stoker.UserError, match=r"(?s)step-00000024.*make room, then run the same command"):
        fit(out, {9: fill(folder), 24: lambda: steps.append(24)})
    assert steps == [24], "training went on to its end"
    text = capfd.readouterr().err
    assert text.count("cannot write checkpoint") == 0, "the error is told twice"
    assert all_good(out)
    (folder / "filler").unlink()
    assert fit(out).reason == "epochs"
    assert_same(whole, out)


def test_what_killed_saves_left_behind_takes_no_room(disk: Callable[..., Path], whole: Path) -> None:
    """A run killed while it looked for room, and in its first save: room for one checkpoint, and more in ruins."""
    out = disk(8 * ONE) / "run"
    fit(out, steps=1, epochs=None)
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints" / ".partial-00000002").mkdir(parents=True)
    (out / "checkpoints" / ".partial-00000002" / "model.safetensors").write_bytes(bytes(6 * ONE))
    (out / "checkpoints" / ".partial-room").write_bytes(bytes(ONE))
    assert fit(out).reason == "epochs"
    assert_same(whole, out)


def test_stop(disk: Callable[..., Path], whole: Path) -> None:
    folder = disk(ONE * 6)
    out, last = folder / "run", list[int]()
    record: Actions = {step: (lambda step=step: last.append(step)) for step in range(10, 25)}
    with pytest.raises(stoker.UserError, match=r"(?s)cannot write.*make room"):
        fit(out, {9: fill(folder), **record}, on_full_disk="stop")
    assert last[-1] < 24
    assert all_good(out)
    (folder / "filler").unlink()
    fit(out)
    assert_same(whole, out)


def test_wait(disk: Callable[..., Path], whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It pauses, says so once, and goes on when there is room."""
    folder = disk(ONE * 6)
    out, steps = folder / "run", list[int]()
    paused: list[int] = []

    def make_room() -> None:
        time.sleep(1.6)
        paused.append(steps[-1])
        time.sleep(0.6)
        paused.append(steps[-1])
        (folder / "filler").unlink()

    thread = threading.Thread(target=make_room)
    record: Actions = {step: (lambda step=step: steps.append(step)) for step in range(1, 25)}
    full = fill(folder)

    def act() -> None:
        steps.append(9)
        full()
        thread.start()

    assert fit(out, {**record, 9: act}, on_full_disk="wait").reason == "epochs"
    thread.join()
    text = capfd.readouterr().err
    assert text.count("paused at step") == 1
    assert paused[0] == paused[1] < 24
    assert_same(whole, out)


def test_a_signal_ends_a_pause(disk: Callable[..., Path], tmp_path: Path) -> None:
    folder, log = disk(12_000_000), tmp_path / "log"
    words = ["train", LARGE, "numbers=200000", "batches=400", "sleep_s=0.02", "--epochs", 1, "--quiet"]
    words += ["--checkpoint-every", 1, "--on-full-disk", "wait", "--device", "cpu", "--out", folder / "run"]
    process = start(words, log)
    while not Store(folder / "run" / "checkpoints").all():
        time.sleep(0.01)
    fill(folder)()
    while "paused" not in log.read_text():
        fill(folder)()  # what retention gave up
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert wait(process, log) == 1
    text = log.read_text()
    assert "Traceback" not in text
    assert text.count("paused") == 1
    assert "it goes on from step-" in text
    assert all_good(folder / "run")


def test_retention_gives_room_and_keeps_the_best(disk: Callable[..., Path], whole: Path) -> None:
    """Room for two and a bit: the older one goes for the newer; the newest good one and the best never do."""
    folder = disk(int(ONE * 2.3))
    out, gone = folder / "run", list[int]()

    def look() -> None:
        store = Store(out / "checkpoints")
        if store.all():
            store.newest_good()
            gone.extend([1] if store.newest_good()[0] is None else [])

    fit(out, {step: look for step in range(3, 24, 4)}, keep=2, keep_best=1, eval_every=1000)
    assert gone == []
    best = Store(out / "checkpoints").best()
    assert best is not None
    assert all_good(out)[-1] == 24


def test_inodes_run_out(disk: Callable[..., Path], whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = disk(ONE * 9, "nr_inodes=60")
    out = folder / "run"

    def use_up() -> None:
        for i in range(100):
            try:
                (folder / f"f{i}").touch()
            except OSError:
                return

    def release() -> None:
        for path in folder.glob("f[0-9]*"):
            path.unlink()

    assert fit(out, {9: use_up, 17: release}).reason == "epochs"
    assert "could not save step 1" in capfd.readouterr().err
    assert_same(whole, out)


def test_files_may_not_grow(tmp_path: Path) -> None:
    """A limit like a quota's, on the size of one file."""
    log, out = tmp_path / "log", tmp_path / "run"
    words = ["train", LARGE, "numbers=200000", "--epochs", 1, "--quiet", "--device", "cpu", "--out", out]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        code = wait(start(words, log), log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert "cannot write checkpoint" in log.read_text()
    assert "Traceback" not in log.read_text()
    log.unlink()
    assert wait(start(words, log), log) == 0, log.read_text()


# ------------------------------------------------------------------ the folder itself


def test_read_only_in_the_middle(disk: Callable[..., Path], whole: Path) -> None:
    out, last = disk(ONE * 9) / "run", list[int]()
    folder = out / "checkpoints"

    def turn() -> None:
        time.sleep(0.3)  # nothing is being written
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    record: Actions = {step: (lambda step=step: last.append(step)) for step in range(13, 25)}
    try:
        with pytest.raises(stoker.UserError, match="Read-only file system"):
            fit(out, {**record, 12: turn})
    finally:
        subprocess.run(["umount", folder], check=True)
    assert len(last) < 12
    fit(out)
    assert_same(whole, out)


def test_the_checkpoints_vanish(tmp_path: Path, whole: Path) -> None:
    """Made anew by the next save."""
    out = tmp_path / "run"
    fit(out, {9: lambda: (time.sleep(0.2), shutil.rmtree(out / "checkpoints"))})
    assert_same(whole, out)


def test_the_run_vanishes(tmp_path: Path, whole: Path) -> None:
    """Named at the next save: nothing is written into a folder that is no run any more."""
    out = tmp_path / "run"
    with pytest.raises(stoker.UserError, match=r"(?s)cannot write.*run"):
        fit(out, {9: lambda: (time.sleep(0.2), shutil.rmtree(out))})
    assert not (out / "checkpoints").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(stoker.UserError, match="Permission denied"):
        fit(out, {9: lambda: (time.sleep(0.2), (out / "checkpoints").chmod(0o500))})
    (out / "checkpoints").chmod(0o700)
    assert json.loads((out / "run.json").read_text())
