"""Law 1 under preemption: a signal at any moment, to any process of a run, leaves one checkpoint and the same bits."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch._dynamo  # optimizers import it: once here instead of once in every child

import stoker
from stoker.checkpoint.store import Store
from stoker.source import load_source
from tests.laws.runs import assert_same, events, final, run, start, wait

STALLING = Path(__file__).with_name("stalling.py")
NIGHTLY = bool(os.environ.get("STOKER_NIGHTLY"))


def command(out: Path, flag: Path, *words: object) -> list[object]:
    options = ["--epochs", 3, "--log-every", 1, "--checkpoint-every", 2, "--quiet", "--device", "cpu"]
    return ["train", STALLING, f"flag={flag}", *words, *options, "--out", out]


def left(group: int) -> list[psutil.Process]:
    """Processes of a group that are not dead."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, psutil.Error):
            return False

    return [process for process in psutil.process_iter() if belongs(process)]


def awaited(path: Path, process: Any, log: Path) -> None:
    while not path.exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)


def awaited_step(out: Path, step: int, process: Any) -> None:
    """Wait until a step is logged: workers run ahead, and stall before the step before has been taken."""
    log = out / "events.jsonl"
    while f'"step": {step},' not in (log.read_text() if log.exists() else ""):
        assert process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        time.sleep(0.005)


def kill(process: Any, target: str, number: signal.Signals) -> None:
    """Send a signal to the main process, to its whole group, or to one of its children alone."""
    if target == "group":
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if target == "main" else psutil.Process(process.pid).children()[0].pid, number)


def ended(process: Any, log: Path, limit_s: float = 20) -> int:
    """Exit code of a process that has to end by itself before what stalls goes on (after a minute)."""
    until_s = time.monotonic() + limit_s
    while process.is_alive() and time.monotonic() < until_s:
        time.sleep(0.005)
    hangs = process.is_alive()
    if hangs:
        os.killpg(process.pid, signal.SIGKILL)
    code = wait(process, log)
    assert not hangs, f"it waits on: {log.read_text()}"
    return code


STALLS = [
    ("rows", 13, 0, "main", "SIGTERM"),
    ("rows", 13, 2, "worker", "SIGTERM"),
    ("rows", 13, 2, "group", "SIGUSR1"),
    ("rows", 13, 2, "group", "SIGTERM"),
    ("rows", 13, 2, "group", "SIGINT"),
    ("val", 0, 0, "main", "SIGUSR1"),
    ("val", 0, 2, "group", "SIGUSR1"),
    ("stream", 13, 0, "main", "SIGTERM"),
    ("stream", 0, 0, "main", "SIGTERM"),
    ("stream", 0, 1, "group", "SIGUSR1"),
    ("state", 13, 1, "worker", "SIGUSR1"),
    ("state", 0, 0, "main", "SIGUSR1"),
    ("shards", 13, 2, "group", "SIGUSR1"),
    ("shards", 0, 2, "worker", "SIGTERM"),
]


@pytest.mark.parametrize(("kind", "at", "workers", "target", "name"), STALLS)
def test_a_signal_ends_a_wait_for_data(
    tmp_path: Path, kind: str, at: int, workers: int, target: str, name: str
) -> None:
    flag, log, number = tmp_path / "flag", tmp_path / "log", signal.Signals[name]
    words = [f"kind={kind}", f"at={at}", "--workers", workers]
    assert run(command(tmp_path / "whole", flag, *words), log) == 0, log.read_text()
    log.write_text("")
    flag.touch()
    process = start(command(tmp_path / "stopped", flag, *words), log)
    awaited(Path(f"{flag}.hit"), process, log)
    step = {"rows": 3, "val": 6}.get(kind, 6 if at == 0 else None)
    awaited_step(tmp_path / "stopped", step or 7, process)
    time.sleep(0.1)
    kill(process, target, number)
    assert ended(process, log) == 0, log.read_text()
    assert left(process.pid) == []
    text = log.read_text()
    assert "Traceback" not in text
    assert f"{name}: saved at step" in text
    assert f"stoker resume {tmp_path / 'stopped'}" in text
    latest = Store(tmp_path / "stopped" / "checkpoints").latest()
    assert latest is not None
    assert step is None or latest.name.startswith(f"step-{step:08d}"), latest.name
    flag.unlink()
    assert run(command(tmp_path / "stopped", flag, *words), log) == 0, log.read_text()
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("slurm", "words", "expected"),
    [(True, [], 75), (True, ["--requeue-exit", 3], 3), (False, ["--requeue-exit", 99], 99), (False, [], 0)],
)
def test_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: bool, words: list[object], expected: int
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    flag, log = tmp_path / "flag", tmp_path / "log"
    flag.touch()
    process = start(command(tmp_path / "out", flag, "at=13", *words), log)
    awaited(Path(f"{flag}.hit"), process, log)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process, log) == expected, log.read_text()
    flag.unlink()
    assert run(command(tmp_path / "out", flag, "at=13", *words), log) == 0  # finished: nothing to queue again


@pytest.mark.parametrize("slow", ["c", "compile"])
def test_grace_ends_a_step_that_lasts(tmp_path: Path, slow: str) -> None:
    """Computing in C, where Python runs no signal handler, and inside a compiler that does not come back."""
    flag, log, out = tmp_path / "flag", tmp_path / "log", tmp_path / "out"
    words = [f"slow={slow}", "--grace", 0.5, "--requeue-exit", 9]
    if slow == "compile":
        flag.touch()
    process = start(command(out, flag, *words), log)
    awaited(Path(f"{flag}.hit"), process, log)
    before = [path.name for path in Store(out / "checkpoints").all()]
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process, log) == 9, log.read_text()
    assert not Path(f"{flag}.done").exists(), "the step was waited for"
    assert "the grace of 0.5 s is over" in log.read_text()
    assert left(process.pid) == []
    checkpoint, complaints = Store(out / "checkpoints").newest_good()
    assert complaints == []
    if slow == "c":
        assert before[0].startswith("step-00000002")
        assert checkpoint is not None
        assert checkpoint.step in (2, 4)  # the one of step 4 may have been in writing
        for folder in (out, tmp_path / "whole"):
            assert run(command(folder, flag, *words), log) == 0, log.read_text()
        assert_same(tmp_path / "whole", out)


def test_grace_leaves_a_run_alone_that_saves_in_time(tmp_path: Path) -> None:
    flag, log = tmp_path / "flag", tmp_path / "log"
    flag.touch()
    process = start(command(tmp_path / "out", flag, "at=13", "--grace", 50, "--requeue-exit", 9), log)
    awaited(Path(f"{flag}.hit"), process, log)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process, log) == 9, log.read_text()
    assert "saved at step 3" in log.read_text()
    assert "the grace" not in log.read_text()


# ------------------------------------------------------------------ every moment


class Tracer:
    """Raises a signal at the given one of the lines that stoker's own loop, feeds and saver execute."""

    FILES = ("train.py", "stream.py", "feeds.py", "pool.py", "evaluate.py", "interrupts.py", "saver.py", "run.py")

    def __init__(self, at: int, times: int = 1) -> None:
        self.at, self.times, self.lines, self.where = at, times, 0, ""

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if event == "call":
            return self if path.name in self.FILES and "stoker" in path.parts else None
        if event == "line" and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            self.lines += 1
            if self.at <= self.lines < self.at + self.times:
                self.where = f"{path.name}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGTERM)
        return self


def traced(tracer: Tracer, kind: str, out: Path) -> stoker.Run:
    sys.settrace(tracer)
    try:
        return fit(kind, out)
    finally:
        sys.settrace(None)


def fit(kind: str, out: Path, **options: Any) -> stoker.Run:
    recipe = load_source(str(STALLING)).recipe({"kind": kind})
    given = {"epochs": 2, "seed": 1, "quiet": True, "log_every": 1, "checkpoint_every": 5, "device": "cpu"}
    return stoker.fit(recipe, out=out, **{**given, **options})


def less_ahead(out: Path) -> dict[str, Any]:
    """What the last checkpoint holds, less what a finished run knows of an epoch that is not its own any more."""
    found = final(out)
    del found["state"]["stream"]
    return found


@pytest.mark.parametrize("kind", ["rows", "stream", "state", "shards"])
def test_a_signal_at_any_line(tmp_path: Path, kind: str) -> None:
    fit(kind, tmp_path / "whole")
    counter = Tracer(10**9)
    traced(counter, kind, tmp_path / "counted")
    draw = random.Random(kind)
    moments = range(1, counter.lines + 1) if NIGHTLY else draw.sample(range(1, counter.lines + 1), 16)
    for at in moments:
        out = tmp_path / f"stopped-{at}"
        tracer = Tracer(at, times=draw.choice([1, 1, 40]))
        stopped = traced(tracer, kind, out)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert stopped.reason in (None, "epochs")
        assert fit(kind, out).reason == "epochs"
        assert less_ahead(tmp_path / "whole") == less_ahead(out), tracer.where
        assert events(tmp_path / "whole") == events(out), tracer.where


@pytest.mark.parametrize("kind", ["stream", "state", "shards"])
def test_a_signal_before_a_batch_is_asked_for(tmp_path: Path, kind: str) -> None:
    """Between a step and the request for the next batch: the batch that was trained on is not trained on again."""

    class AtRequest(Tracer):
        def __call__(self, frame: Any, event: str, argument: Any) -> Any:
            if event == "call":
                return self if frame.f_code.co_name == "batches" else None
            if event == "line" and frame.f_locals.get("s") and frame.f_locals["s"].interrupts.waiting:
                self.lines += 1
                if self.lines == self.at:
                    signal.raise_signal(signal.SIGTERM)
            return self

    fit(kind, tmp_path / "whole")
    for at in range(1, 11, 3):
        traced(AtRequest(at), kind, tmp_path / str(at))
        fit(kind, tmp_path / str(at))
        assert less_ahead(tmp_path / "whole") == less_ahead(tmp_path / str(at)), at


# ------------------------------------------------------------------ from Python


def test_fit_under_a_signal_returns(tmp_path: Path) -> None:
    def stop(progress: Any, metrics: Any) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def own(number: int, frame: Any) -> None:
        raise AssertionError("not while stoker trains")

    before, of_interrupts = signal.signal(signal.SIGTERM, own), signal.getsignal(signal.SIGINT)
    try:
        stopped = fit("rows", tmp_path / "out", on_step=[stop], workers=2, grace_s=60.0)
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGINT) is of_interrupts
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (stopped.step, stopped.reason) == (4, None)
    assert psutil.Process().children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_fit_in_a_thread(tmp_path: Path, workers: int) -> None:
    found: list[stoker.Run] = []
    threads = torch.get_num_threads()
    thread = threading.Thread(target=lambda: found.append(fit("rows", tmp_path / "out", workers=workers, grace_s=9.0)))
    thread.start()
    thread.join()
    assert found[0].reason == "epochs"
    assert torch.get_num_threads() == threads
    fit("rows", tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_second_interrupt_leaves(tmp_path: Path) -> None:
    flag, log = tmp_path / "flag", tmp_path / "log"
    flag.touch()
    process = start(command(tmp_path / "out", flag, "slow=compile"), log)
    awaited(Path(f"{flag}.hit"), process, log)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
    assert ended(process, log) == 130, log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_script_of_ones_own(tmp_path: Path) -> None:
    """SIGTERM to a script that calls fit: it goes on after it, with a run that knows it is unfinished."""
    script, flag = tmp_path / "script.py", tmp_path / "flag"
    flag.touch()
    script.write_text(
        "import sys, stoker\nfrom stoker.source import load_source\n"
        f"recipe = load_source({str(STALLING)!r}).recipe({{'flag': {str(flag)!r}, 'at': 13}})\n"
        "options = {'epochs': 2, 'quiet': True, 'device': 'cpu', 'workers': 2, 'log_every': 1}\n"
        f"run = stoker.fit(recipe, out={str(tmp_path / 'out')!r}, **options)\n"
        "print('went on', run.step, run.reason)\n"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    while not Path(f"{flag}.hit").exists():
        assert process.poll() is None
        time.sleep(0.01)
    awaited_step(tmp_path / "out", 3, process)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=30)
    assert (process.returncode, text) == (0, "went on 3 None\n")
