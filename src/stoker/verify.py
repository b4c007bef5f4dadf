"""Whether a run's files are what was written."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from stoker.budget import spelled
from stoker.checkpoint.store import Damaged, verify
from stoker.errors import UserError, plain
from stoker.files import open_regular
from stoker.recall import require_identity
from stoker.run import RunDir

_EVENT_BYTES = 1 << 20  # no line of the events is longer


@dataclass(frozen=True)
class Finding:
    """What was found out about one part of a run."""

    name: str
    good: bool
    words: str


def verify_run(path: Path) -> list[Finding]:
    """Read every byte of a run's checkpoints, or of one checkpoint, and its records; change nothing.

    Raises:
        UserError: there is no run.
    """
    if (path / "checkpoint.json").is_file():
        return [_checkpoint(path.resolve())]
    folder = RunDir(path)
    if not os.path.lexists(path / "run.json") and not folder.store.all():
        require_identity(folder)
    found = [_checkpoint(checkpoint) for checkpoint in folder.store.all()]
    return [*found, *_links(folder), _records(folder), _events(path / "events.jsonl")]


def _checkpoint(path: Path) -> Finding:
    try:
        size = sum(entry["bytes"] for entry in verify(path)["files"].values())
    except Damaged as error:
        return Finding(path.name, False, str(error))
    return Finding(path.name, True, spelled(size))


def _links(folder: RunDir) -> list[Finding]:
    names = {path.name for path in folder.store.all()}
    found = []
    for name in ("latest", "best"):
        link = folder.store.folder / name
        if link.is_symlink() or link.exists():
            target = str(link.readlink()) if link.is_symlink() else "no link"
            good = target in names
            found.append(Finding(name, good, target if good else f"{target!r} is not a checkpoint of the run"))
    return found


def _records(folder: RunDir) -> Finding:
    try:
        identity = require_identity(folder)
    except UserError as error:
        return Finding("run.json", False, f"{error.what}: {error.why}".rstrip(": "))
    return Finding("run.json", True, f"with recipe.py and {len(identity.modules)} modules")


def _events(path: Path) -> Finding:
    count, last = 0, b""
    try:
        with open_regular(path) as lines:
            while line := lines.readline(_EVENT_BYTES):
                last = line
                if line.endswith(b"\n"):
                    event = json.loads(line)
                    if not {"step", "epoch", "name", "value"} <= event.keys():
                        raise ValueError("it is not an event")
                    count += 1
                elif len(line) == _EVENT_BYTES:
                    raise ValueError("it is too long for an event")
        cut = ", and one that was cut off: a resume writes it again" if last and not last.endswith(b"\n") else ""
    except FileNotFoundError:
        return Finding(path.name, True, "none yet")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return Finding(path.name, False, f"line {count + 1}: {error}")
    return Finding(path.name, True, f"{count} events{cut}")


def shown(findings: list[Finding]) -> list[str]:
    """A line for each finding."""
    rows = [(plain(f.name, ""), "good   " if f.good else "DAMAGED", plain(f.words, "")) for f in findings]
    width = max(len(name) for name, _, _ in rows)
    return [f"{name:{width}}  {good}  {words}" for name, good, words in rows]
