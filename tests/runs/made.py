"""Runs to list and to compare: real tiny ones, and folders of the same form by the hundred."""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stoker
from stoker.source import load_source

RECIPE = """
import stoker
import torch
from torch import nn


def recipe(lr: float = 0.1, width: int = 4, bound: float = float("inf"), judged: bool = True):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=generator), torch.randint(0, 2, (64,), generator=generator)
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2)),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.Adam(params, lr=lr),
        train=stoker.Loader((x[:48], y[:48]), 8, shuffle=True),
        val=stoker.Loader((x[48:], y[48:])) if judged else None,
        metrics={"accuracy": lambda output, target: (output.argmax(1) == target).float()} if judged else {},
        best="val/accuracy" if judged else "val/loss",
        best_mode="max",
    )
"""


def train(
    out: Path, *, stop_at: int | None = None, source: str = RECIPE, seed: int = 0, on_step: Any = None, **arguments: Any
) -> Path:
    """A run of 3 epochs of 6 steps, logged every 2; `stop_at` interrupts it as a scheduler would."""

    def interrupt(progress: Any, metrics: Any) -> None:
        if progress.step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    file = out.parent / f"{out.name}-source" / "tiny.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    log_every = arguments.pop("log_every", 2)
    recipe = load_source(str(file)).recipe(arguments, seed)
    watch = [interrupt] if on_step is None else [interrupt, on_step]
    stoker.fit(recipe, epochs=3, seed=seed, out=out, quiet=True, log_every=log_every, on_step=watch)
    return out


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file; a checkpoint's record gets its checksum anew."""
    value = json.loads(file.read_text())
    changed = change(value)
    value = value if changed is None else changed
    if file.name == "checkpoint.json" and isinstance(value, dict):
        text = json.dumps({k: v for k, v in value.items() if k != "sha256"}, sort_keys=True)
        value["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(value, indent=1))


def newest(run: Path) -> Path:
    """The folder of a run's newest checkpoint."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def copy(run: Path, to: Path) -> Path:
    """A run as it is, elsewhere."""
    shutil.copytree(run, to, symlinks=True)
    return to


def light_copy(run: Path, to: Path) -> Path:
    """What `stoker runs` reads of a run, with its newest checkpoint alone."""
    last = newest(run)
    (to / "checkpoints" / last.name).mkdir(parents=True)
    for name in ("run.json", "recipe.py", "events.jsonl", f"checkpoints/{last.name}/checkpoint.json"):
        shutil.copyfile(run / name, to / name)
    return to


def edit_events(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every event of a run."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in events:
        change(event)
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
