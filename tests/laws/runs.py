"""Run stoker's command line in real child processes, and compare what runs leave behind."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

import stoker.start  # noqa: F401
from stoker.cli import main

_FORK = multiprocessing.get_context("fork")


def _child(words: list[str], log: Path) -> None:
    """The command line in a forked process: torch is imported already, so a child is up in a tenth of a second."""
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # pytest's own objects were inherited
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["stoker", *map(str, words)]
    main()


def start(words: list[Any], log: Path) -> Any:
    process = _FORK.Process(target=_child, args=(words, log))
    process.start()
    return process


def run(words: list[Any], log: Path) -> int:
    process = start(words, log)
    return wait(process, log)


def wait(process: Any, log: Path) -> int:
    """Exit code; polled, since join() with a limit waits for the process's orphaned data workers as well."""
    limit_s = time.monotonic() + 240
    while process.is_alive():
        assert time.monotonic() < limit_s, log.read_text()
        time.sleep(0.005)
    return int(process.exitcode)


def run_killed(
    words: list[Any], log: Path, delay_s: float, number: int = signal.SIGKILL, after: Path | None = None
) -> int:
    """Run a command and send it a signal a while after `after` has content (or its start); return its exit code."""
    process = start(words, log)
    while after is not None and process.is_alive() and not (after.exists() and after.stat().st_size):
        time.sleep(0.01)
    time.sleep(delay_s)
    if process.is_alive():
        os.kill(process.pid, number)
    return wait(process, log)


def events(out: Path) -> list[dict[str, Any]]:
    """What a run logged, less what depends on the clock and the machine."""
    lines = (out / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if not e["name"].startswith(("time/", "system/"))]


def is_finished(out: Path) -> bool:
    """Whether the run's newest checkpoint is its last."""
    names = sorted(p.name for p in (out / "checkpoints").glob("step-*"))
    if not names:
        return False
    record = json.loads((out / "checkpoints" / names[-1] / "checkpoint.json").read_text())
    return bool(record["state"]["progress"]["finished"])


def final(out: Path) -> dict[str, Any]:
    """Everything the latest checkpoint holds, tensors as bytes."""
    folder = out / "checkpoints" / "latest"
    record = json.loads((folder / "checkpoint.json").read_text())
    state = {k: v for k, v in record["state"].items() if k != "events_bytes"}
    tensors = {
        f"{file.name}:{name}": (array.dtype.str, array.shape, array.tobytes())
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }
    metrics = {k: v for k, v in record["metrics"].items()}
    return {"name": folder.resolve().name, "state": state, "metrics": metrics, "tensors": tensors}


def assert_same(a: Path, b: Path) -> None:
    """Two runs left the same weights, optimizer state, learning rates, events and metrics, bit for bit."""
    left, right = final(a), final(b)
    assert left["name"] == right["name"]
    assert left["tensors"].keys() == right["tensors"].keys()
    differing = [name for name, value in left["tensors"].items() if value != right["tensors"][name]]
    assert not differing
    assert left["state"] == right["state"]
    assert left["metrics"] == right["metrics"]
    assert events(a) == events(b)
