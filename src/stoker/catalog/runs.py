"""What runs there are below a folder, and how far each has come. Reads only, and never imports torch.

Each run costs its run.json, the record of its newest checkpoint and the last 16 kB of its events, however long it
trained: about a millisecond. What is read may be half written, damaged or hostile; it is listed as damaged then.
"""

import fcntl
import os
import stat
import struct
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stoker.catalog.runfiles import (
    DamagedRun,
    checkpoints,
    decoded,
    is_number,
    is_whole,
    metrics_of,
    newest_record,
    read_record,
    read_recorded,
    read_tail,
    require_source,
)
from stoker.errors import UserError
from stoker.files import open_regular

FINISHED, STOPPED, TRAINING, DAMAGED = "finished", "stopped", "training", "damaged"

# struct flock: type and whence come first on Linux, last on macOS and the BSDs.
_FLOCK = "hhqqi" if sys.platform == "linux" else "qqihh"


@dataclass(frozen=True)
class Listed:
    """One run, as far as its files tell.

    Attributes:
        path: its folder, below the folder that was searched.
        status: "finished", "stopped", "training" (another process is at it now) or "damaged".
        reason: why it finished, what is damaged, or what else there is to say of the status.
        step, epoch: how far it came: of its newest checkpoint, or while it is training of its last event.
        best, best_name: the best value and its name, or the last value of the main metric where nothing was judged.
        best_step: the step of the best value; None where it is a last value.
        metrics: the last value of everything it logged.
        written: when a checkpoint, an event or run.json was last written, in seconds since 1970.
        size: bytes of all its files.
    """

    path: Path
    status: str = STOPPED
    reason: str = ""
    recipe: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    step: int | None = None
    epoch: int | None = None
    best: float | None = None
    best_name: str | None = None
    best_step: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    written: float | None = None
    size: int = 0


def list_runs(folder: Path, unread: list[str] | None = None) -> list[Listed]:
    """All runs in or below a folder, ordered by path.

    Args:
        folder: where to look.
        unread: gets a line for every folder that may not be read.

    Raises:
        UserError: there is no such folder.
    """
    own = _own_files()
    return [read_run(path, own) for path in sorted(find_runs(folder, unread))]


def find_runs(folder: Path, unread: list[str] | None = None) -> Iterator[Path]:
    """Yield the folders that hold a run.json; nothing inside a run, and no hidden folder, is looked at.

    Links are followed, each real folder is visited once, and by its own path rather than by a link's.

    Raises:
        UserError: there is no such folder.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder} is not a folder" if os.path.lexists(folder) else f"there is no folder {folder}",
            remedy="stoker runs FOLDER, with a folder that holds runs (`stoker train` makes them in runs/)",
        )
    seen: set[tuple[int, int]] = set()
    real, links = [str(folder)], list[str]()
    while real or links:
        path = real.pop() if real else links.pop()
        try:
            about = os.stat(path)
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(path) as entries:
                found = list(entries)
        except OSError as error:
            if unread is not None:
                unread.append(f"{path}: {error.strerror}")
            continue
        if any(entry.name == "run.json" for entry in found):
            yield Path(path)
            continue
        for entry in found:
            if not entry.name.startswith(".") and _leads_to_folder(entry):
                (links if entry.is_symlink() else real).append(entry.path)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def read_run(path: Path, own: Collection[tuple[int, int]] | None = None) -> Listed:
    """How a run stands; one that cannot be read is told as damaged, whatever is wrong with it.

    Args:
        path: its folder.
        own: the files that this process has open, where they are known already.
    """
    size, written = _extent(path)
    row = Listed(path, size=size, written=written)
    try:
        recorded = read_recorded(path)
        row = replace(
            row, recipe=recorded["recipe"]["name"], arguments=recorded["recipe"]["arguments"], seed=recorded["seed"]
        )
        return _progress_of(row, recorded, is_held(path, _own_files() if own is None else own))
    except DamagedRun as error:
        return replace(row, status=DAMAGED, reason=str(error))
    except (OSError, RecursionError) as error:
        return replace(row, status=DAMAGED, reason=str(error) or type(error).__name__)


def _progress_of(row: Listed, recorded: Mapping[str, Any], held: bool) -> Listed:
    record, complaints = newest_record(row.path)
    last_step, last_epoch, logged = read_tail(row.path / "events.jsonl")
    if record is None:
        if complaints and not held:
            raise DamagedRun(complaints[0])
        row = replace(row, step=last_step, epoch=last_epoch, metrics=logged, reason="no checkpoint yet")
        return _with_last_value(replace(row, status=TRAINING if held else STOPPED))
    if not held:  # whose process may be writing it
        require_source(row.path, recorded)
    progress = record["state"]["progress"]
    ahead = held and last_step > record["step"]
    row = replace(
        row,
        status=TRAINING if held else FINISHED if progress["finished"] else STOPPED,
        reason="; ".join(filter(None, ["" if held else progress["finished"], *complaints])),
        step=last_step if ahead else record["step"],
        epoch=last_epoch if ahead else record["epoch"],
        metrics={**metrics_of(record), **logged},
    )
    ranked = _ranked(progress["best"])
    if not ranked:
        return _with_last_value(row)
    value, step = ranked[0]
    return replace(row, best=value, best_step=step, best_name=_name_of_best(row.path, record, value, step))


def _with_last_value(row: Listed) -> Listed:
    """A run that judged nothing shows its main metric."""
    name = main_metric(row.metrics)
    return replace(row, best=float(row.metrics[name]), best_name=name) if name is not None else row


def main_metric(metrics: Mapping[str, Any]) -> str | None:
    """The name to follow where the recipe judges by none: a validation value, else a training loss, else any."""
    names = [n for n, value in metrics.items() if is_number(value) and not n.startswith(("time/", "system/"))]
    names = [n for n in names if n.rpartition("/")[2] != "lr"]
    for name in ("val/loss", "train/loss"):
        if name in names:
            return name
    return next((n for n in names if n.startswith("val/")), next(iter(names), None))


def _name_of_best(run: Path, newest: Mapping[str, Any], value: float, step: int) -> str:
    """The name under which the best value was logged, found by its bits: a record keeps the value alone."""
    records = [newest] if newest["step"] == step else []
    for at, path in checkpoints(run):
        if at == step and not records:
            try:
                records.append(read_record(path))
            except DamagedRun:
                continue
    names = [n for record in records for n, v in metrics_of(record).items() if is_number(v) and v == value]
    judged = [n for n in names if n.startswith("val/")] or names
    return "val/loss" if "val/loss" in judged else next(iter(judged), "best")


def _ranked(best: Any) -> list[tuple[float, int]]:
    pairs = [decoded(entry) for entry in best] if isinstance(best, list) else []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and is_number(pair[0]) and is_whole(pair[1])):
            raise DamagedRun("the newest checkpoint.json has other values than (value, step) for the best ones")
    return [(float(value), step) for value, step in pairs]


def is_held(run: Path, own: Collection[tuple[int, int]]) -> bool:
    """Whether a process trains in a run now. The lock is asked about, never taken.

    A lock of this process itself is seen from the files it has open: to open and close the file once more would let
    the lock go, as record locks do.
    """
    try:
        about = os.lstat(run / ".lock")
        if not stat.S_ISREG(about.st_mode):
            return False
        if (about.st_dev, about.st_ino) in own:
            return True
        file = open_regular(run / ".lock")
    except OSError:
        return False
    first = sys.platform == "linux"
    question = struct.pack(_FLOCK, *((fcntl.F_WRLCK, 0, 0, 0, 0) if first else (0, 0, 0, fcntl.F_WRLCK, 0)))
    with file:
        try:
            answer = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, question))
        except OSError:  # a network file system without locks
            return False
    return bool(answer[0 if first else 3] != fcntl.F_UNLCK)


def _own_files() -> set[tuple[int, int]]:
    found = set()
    for name in os.listdir("/dev/fd"):
        try:
            about = os.fstat(int(name))
        except OSError:  # the one that listed them
            continue
        if stat.S_ISREG(about.st_mode):
            found.add((about.st_dev, about.st_ino))
    return found


def _extent(run: Path) -> tuple[int, float | None]:
    """Bytes of a run's files, and when one that stoker keeps there was last written."""
    size, written, folders = 0, list[float](), [str(run)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        continue
                    about = entry.stat(follow_symlinks=False)
                    size += about.st_size
                    if entry.name in ("run.json", "events.jsonl", "checkpoint.json"):
                        written.append(about.st_mtime)
        except OSError:  # it may go while it is looked at: the run's process drops checkpoints
            continue
    return size, max(written, default=None)
