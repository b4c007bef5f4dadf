"""The files that a run keeps, read without torch: `checkpoint/store.py` reads the same, and the tensors too.

What is read may be half written, damaged or hostile: every type is checked, and `DamagedRun` is all that is raised.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoker.files import open_regular

_CHECKPOINT = re.compile(r"step-(\d{8,18})-epoch-(\d+)(?:-loss-[^/]+)?")  # as checkpoint/store.py names them
_REPLACED = ".replaced-"
_FORMAT = 1
_TAIL_BYTES = 16384
_MAX_BYTES = 256 * 2**20  # of a JSON file: more than any model's record, less than what would fill the memory
_MAX_DEPTH = 100


class DamagedRun(Exception):
    """A run whose files are not what was written; the message says which and how."""


def is_number(value: Any) -> bool:
    """Whether a value is a float, or an int that fits into one; not a bool, which Python counts among them."""
    return isinstance(value, float) or (isinstance(value, int) and type(value) is not bool and abs(value) < 2**1023)


def is_whole(value: Any) -> bool:
    """Whether a value is an int, as steps are; and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def read_recorded(run: Path) -> dict[str, Any]:
    """A run's run.json, its types checked.

    Raises:
        DamagedRun: it is missing, broken, or not what stoker writes.
    """
    recorded = read_json(run / "run.json")
    if not isinstance(recorded, dict):
        raise DamagedRun("run.json is not an object")
    _check(recorded, "run.json", recipe=dict, seed=int, plan=dict, limits=dict, options=dict, modules=list)
    if not -(1 << 63) <= recorded["seed"] < 1 << 64:
        raise DamagedRun("run.json: seed is no seed")
    _check(recorded["recipe"], "run.json: recipe", name=str, arguments=dict)
    _check(recorded["plan"], "run.json: plan", precision=str)
    for part, names, kind in (
        (recorded["recipe"], ("file", "function"), str),
        (recorded["limits"], ("epochs", "steps", "eval_every"), int),
    ):
        for name in names:
            if part.get(name) is not None:
                _check(part, "run.json", **{name: kind})
    for name in recorded["modules"]:
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in Path(name).parts or "\0" in name:
            raise DamagedRun("run.json: modules names a file outside the run")
    return recorded


def _check(values: Mapping[str, Any], where: str, **kinds: type) -> None:
    for name, kind in kinds.items():
        if name not in values:
            raise DamagedRun(f"{where} lacks {name}")
        if not isinstance(values[name], kind) or (kind is int and isinstance(values[name], bool)):
            raise DamagedRun(f"{where}: {name} is a {type(values[name]).__name__}, not a {kind.__name__}")


def require_source(run: Path, recorded: Mapping[str, Any]) -> None:
    """See that a run has the source that it began with.

    Raises:
        DamagedRun: naming the file that is missing, or that was changed.
    """
    digest = hashlib.sha256(read_bytes(run / "recipe.py")).hexdigest()
    if recorded.get("source_sha256", digest) != digest:
        raise DamagedRun("recipe.py is not the source that the run began with")
    for name in recorded["modules"]:
        if not (run / "source" / name).is_file():
            raise DamagedRun(f"source/{name} is missing")


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Step and folder of every complete checkpoint, oldest first.

    Raises:
        DamagedRun: `checkpoints` is no folder that can be read.
    """
    found: dict[str, Path] = {}
    if (run / "checkpoints").is_symlink():
        raise DamagedRun("checkpoints is a link: the run's own folder may be one, those inside it may not")
    try:
        with os.scandir(run / "checkpoints") as entries:
            for entry in sorted(entries, key=lambda e: e.name):  # ".replaced-" sorts before "step-", which wins
                name = entry.name.removeprefix(_REPLACED)  # a kill came between two renames
                if _CHECKPOINT.fullmatch(name) and entry.is_dir(follow_symlinks=False):
                    found[name] = Path(entry.path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DamagedRun(f"checkpoints cannot be read: {error.strerror}") from None
    steps = [(step_of(name), path) for name, path in found.items()]
    return sorted(steps)


def step_of(name: str) -> int:
    """Step in the name of a checkpoint's folder."""
    return int(name.removeprefix(_REPLACED).split("-")[1])


def newest_record(run: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The record of the newest checkpoint that is good, and what is wrong with newer ones."""
    complaints: list[str] = []
    for attempt in range(3):
        complaints = []
        for _, path in reversed(checkpoints(run)):
            try:
                return read_record(path), complaints
            except DamagedRun as error:
                if attempt < 2 and not path.exists():
                    break  # the run's process has dropped it for newer ones since
                complaints.append(str(error))
        else:
            break
    return None, complaints


def read_record(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's checkpoint.json, its checksum and its types checked. The tensors are not read.

    Raises:
        DamagedRun: it is missing, not what was written, or of another format.
    """
    name = f"{checkpoint.name}/checkpoint.json"
    record = read_json(checkpoint / "checkpoint.json", name)
    if not isinstance(record, dict):
        raise DamagedRun(f"{name} is not an object")
    _check(record, name, sha256=str, format=int, step=int, epoch=int, metrics=dict, files=dict, state=dict)
    try:
        text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise DamagedRun(f"{name}: {error}") from None
    if record["sha256"] != hashlib.sha256(text.encode()).hexdigest():
        raise DamagedRun(f"{name} does not match its checksum")
    if record["format"] != _FORMAT:
        raise DamagedRun(f"{name} has format {record['format']}, this stoker reads {_FORMAT}")
    if record["step"] != step_of(checkpoint.name):
        raise DamagedRun(f"{name} is that of step {record['step']}")
    _check(record["state"], f"{name}: state", progress=dict)
    progress = record["state"]["progress"]
    _check(progress, f"{name}: progress", step=int, epoch=int, best=list)
    if progress.get("finished") is not None:
        _check(progress, f"{name}: progress", finished=str)
    return {**record, "state": {**record["state"], "progress": {"finished": None, **progress}}}


def metrics_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a checkpoint's record keeps."""
    return {name: decoded(value) for name, value in record["metrics"].items()}


def decoded(node: Any) -> Any:
    """A value of a record as events spell it: tuples are lists, a nan is a float, a tensor is left out."""
    if isinstance(node, list):
        return [decoded(value) for value in node]
    if isinstance(node, dict) and len(node) == 1:
        ((tag, value),) = node.items()
        if tag == "$float":
            return revived(value)
        if tag == "$tuple" and isinstance(value, list):
            return [decoded(part) for part in value]
    return node


_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def revived(value: Any) -> Any:
    """An event's value: JSON has no nan and no infinity, so that they are kept as strings."""
    if isinstance(value, list):
        return [revived(part) for part in value]
    return _NUMBERS.get(value, value) if isinstance(value, str) else value


def event_of(line: bytes) -> tuple[int, int, str, Any] | None:
    """Step, epoch, name and value of a line of an event log; None for one that is none."""
    try:
        event = json.loads(line)
        step, epoch, name, value = event["step"], event["epoch"], event["name"], event["value"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (step, epoch, name, revived(value)) if is_whole(step) and is_whole(epoch) and isinstance(name, str) else None


def read_tail(path: Path) -> tuple[int, int, dict[str, Any]]:
    """Step and epoch of an event log's last line, and the last value of every name in its last 16 kB."""
    try:
        lines = read_bytes(path, tail=_TAIL_BYTES).split(b"\n")[:-1]  # the last one is not complete yet
    except DamagedRun:
        return 0, 0, {}
    events = [event for line in lines if (event := event_of(line)) is not None]
    last = events[-1] if events else (0, 0)
    return last[0], last[1], {name: value for _, _, name, value in events}


def read_json(path: Path, name: str = "") -> Any:
    """A JSON file.

    Raises:
        DamagedRun: it cannot be read, or is nested deeper than anything stoker writes.
    """
    name = name or path.name
    try:
        value = json.loads(read_bytes(path, name).decode())
    except RecursionError:
        raise DamagedRun(f"{name} is nested too deep") from None
    except ValueError as error:
        raise DamagedRun(f"{name} is not JSON: {error}") from None
    level, depth = [value], 0
    while level := [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]:
        depth += 1
        if depth > _MAX_DEPTH:  # what prints it, or compares it, must not run out of stack
            raise DamagedRun(f"{name} is nested too deep")
    return value


def read_bytes(path: Path, name: str = "", *, tail: int | None = None, whole: bool = False) -> bytes:
    """A regular file's bytes, or its last `tail` ones; links and pipes are not followed. `whole`: of any size.

    Raises:
        DamagedRun: there is no such file, or it is none.
    """
    name = name or path.name
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if tail is not None:
                file.seek(max(size - tail, 0))
            elif size > _MAX_BYTES and not whole:
                raise DamagedRun(f"{name} has {size} bytes, too many to be read")
            return file.read()
    except FileNotFoundError:
        raise DamagedRun(f"{name} is missing") from None
    except OSError as error:
        reason = (
            "a link" if path.is_symlink() else "not a file" if error.errno is None else f"no file: {error.strerror}"
        )
        raise DamagedRun(f"{name} is {reason}") from None


def printable(value: Any) -> str:
    """A text that is safe to send to a terminal: control characters are spelled, lines are one."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))
