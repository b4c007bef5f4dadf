"""The folder `checkpoints/` of a run: atomic writes, verified reads, two links, two retention rules.

A checkpoint is written under a hidden name, every file flushed to disk, and only then renamed, within one folder and
so within one file system: a kill or a power cut at any moment leaves it complete under its name, or absent.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stoker.checkpoint.tree import Json, flatten, unflatten
from stoker.files import open_regular, own_folder, read_text, remove, sync

FORMAT = 1
MODEL, STATE = "model.safetensors", "state.safetensors"
_REPLACED = ".replaced-"
_NAME = re.compile(r"step-(\d{8,18})-epoch-(\d+)(?:-loss-[^/]+)?")

Files = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU."""

    path: Path
    step: int
    epoch: int
    metrics: Mapping[str, Any]
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from: values as JSON, and tensors by file and name.

    Attributes:
        best: steps of the best checkpoints, best first.
        interim: written at a stop between two that are due; goes with the next save.
        steady: names of tensors that do not change before the next step of an optimizer.
        finite: names of weights that are not written unless they are finite.
    """

    step: int
    epoch: int
    loss: float | None
    metrics: Json
    state: Json
    files: Files
    best: tuple[int, ...] = ()
    interim: bool = False
    steady: frozenset[str] = frozenset()
    finite: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        shown = f"-loss-{self.loss:.4f}" if self.loss is not None else ""
        return f"step-{self.step:08d}-epoch-{self.epoch}{shown}"


def snapshot(
    *,
    step: int,
    epoch: int,
    loss: float | None,
    metrics: Mapping[str, Any],
    model: Mapping[str, torch.Tensor],
    ema: Mapping[str, torch.Tensor] | None,
    state: Mapping[str, Any],
    best: list[int],
    interim: bool = False,
) -> Snapshot:
    """Take down the values of a state as they are now; its tensors are referred to.

    Raises:
        UserError: something in it is neither data nor a dense tensor.
    """
    encoded, tensors = flatten(state)
    files = {MODEL: model, STATE: tensors}
    if ema is not None:
        files["ema.safetensors"] = ema
    finite = loss if loss is not None and math.isfinite(loss) else None
    return Snapshot(step, epoch, finite, flatten(metrics)[0], encoded, files, tuple(best), interim)


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says which file and how."""


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """Checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`; made when the first checkpoint is written.
        keep: how many of the newest checkpoints to keep.
        keep_best: how many of the best ones to keep besides.
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_best: int = 1) -> None:
        self.folder, self.keep, self.keep_best = folder, keep, keep_best

    def write(self, saved: Snapshot) -> Path:
        """Write a checkpoint, move the links and drop what neither rule keeps.

        Args:
            saved: its tensors are contiguous and share no memory, as those that were staged.

        Raises:
            OSError: it cannot be written (disk full, no permission); those already there are untouched.
        """
        final, partial = self.folder / saved.name, self.folder / f".partial-{saved.step:08d}"
        own_folder(self.folder)  # not the run's: where that is gone, a checkpoint alone is no run
        try:
            remove(partial)
            partial.mkdir()
            written = {}
            for name, tensors in saved.files.items():
                try:
                    save_file(dict(tensors), partial / name, metadata={"format": "pt"})
                except SafetensorError as error:
                    raise _as_os_error(error) from error
                (partial / name).chmod(partial.stat().st_mode & 0o666)  # the library keeps it to its owner
                sync(partial / name)
                written[name] = {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
            record = {
                "format": FORMAT,
                "step": saved.step,
                "epoch": saved.epoch,
                "loss": saved.loss,
                "metrics": saved.metrics,
                "interim": saved.interim,
                "files": written,
                "state": saved.state,
            }
            record["sha256"] = _digest(record)  # the record guards the files, and itself
            (partial / "checkpoint.json").write_text(_spelled(record), encoding="utf-8")
            sync(partial / "checkpoint.json")
            sync(partial)
            self._put_in_place(partial, final, saved.step)
        finally:
            remove(partial)
        self._link("latest", final.name)
        self._link_best(saved.best)
        self._prune(saved)
        return final

    def _put_in_place(self, partial: Path, final: Path, step: int) -> None:
        # The same step may be there from a stop before its evaluation. It goes once this one is in place.
        former = [path for path in self.all() if step_of(path) == step]
        if final in former:
            final.rename(self.folder / f"{_REPLACED}{final.name}")
        partial.rename(final)
        sync(self.folder)
        for path in former:
            if path != final:
                remove(path)

    def _link(self, name: str, target: str) -> None:
        partial = self.folder / f".{name}.tmp"
        remove(partial)  # of a save that was killed
        partial.symlink_to(target)
        partial.replace(self.folder / name)

    def _link_best(self, best: tuple[int, ...]) -> None:
        by_step = {step_of(path): path for path in self.all()}
        present = [step for step in best if step in by_step]
        if present:
            self._link("best", by_step[present[0]].name)

    def _prune(self, saved: Snapshot) -> None:
        step, paths = saved.step, self.all()
        upto = [path for path in paths if step_of(path) == step or (step_of(path) < step and not _is_interim(path))]
        best = saved.best[: max(self.keep_best, 1)]
        kept: set[Path | None] = {*upto[-max(self.keep, 1) :], *(path for path in upto if step_of(path) in best)}
        if not any(step_of(path) in best for path in upto):
            kept.add(self.best())  # a full disk had no room for a better one
        for path in paths:  # later steps are the past of a run that went back to this one
            if path not in kept:
                self._drop(path)
        self.sweep()

    def sweep(self) -> None:
        """Remove what saves that were killed have left behind. For whoever holds the run, and nobody else."""
        self.recover()
        for kind in ("dropped", "partial", "replaced"):
            for stray in self.folder.glob(f".{kind}-*"):
                remove(stray)
        for link in (".latest.tmp", ".best.tmp"):  # of a save that was killed, and that no later link replaced
            remove(self.folder / link)

    def _drop(self, path: Path) -> None:
        doomed = path.with_name(f".dropped-{path.name}")
        path.rename(doomed)
        remove(doomed)

    def make_room(self, saved: Snapshot) -> bool:
        """Drop a checkpoint that would go anyway once `saved` is written; whether there was one.

        The newest one stays, the newest that verifies, and the best.
        """
        older = [path for path in self.all() if step_of(path) < saved.step]
        kept = {*older[-max(self.keep - 1, 1) :], self.best(), next(filter(_is_good, reversed(older)), None)}
        for path in older:
            if path not in kept and step_of(path) not in saved.best[: max(self.keep_best, 1)]:
                self._drop(path)
                return True
        return False

    def recover(self) -> None:
        """Put a checkpoint back whose replacement a kill prevented. For whoever holds the run, and nobody else."""
        for replaced in self.folder.glob(f"{_REPLACED}*"):
            original = self.folder / replaced.name.removeprefix(_REPLACED)
            if not original.exists():
                replaced.rename(original)

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
        return sorted(found, key=step_of)

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        found = self.all()
        return found[-1] if found else None

    def best(self) -> Path | None:
        """The checkpoint that the link `best` names, if it names one of this folder's."""
        link = self.folder / "best"
        target = self.folder / os.readlink(link) if link.is_symlink() else None
        return target if target in self.all() else None

    def good(self, complaints: list[str]) -> Iterator[Checkpoint]:
        """Read checkpoints that verify, newest first, adding to `complaints` what is wrong with others."""
        for path in reversed(self.all()):
            try:
                yield read(path)
            except Damaged as error:
                complaints.append(str(error))

    def newest_good(self) -> tuple[Checkpoint | None, list[str]]:
        """Read the newest checkpoint that verifies; also say what was wrong with newer ones."""
        complaints: list[str] = []
        return next(self.good(complaints), None), complaints


def _as_os_error(error: SafetensorError) -> OSError:
    """What the library makes a text of: `I/O error: No space left on device (os error 28)`."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found.group(1)), os.strerror(int(found.group(1)))) if found else OSError(str(error))


def step_of(path: Path) -> int:
    """Step in a checkpoint folder's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint")
    return int(match.group(1))


def _is_good(path: Path) -> bool:
    try:
        verify(path)
    except Damaged:
        return False
    return True


def _is_interim(path: Path) -> bool:
    try:
        return bool(read_record(path).get("interim"))
    except Damaged:
        return False


def _spelled(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, allow_nan=False)


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Verified `checkpoint.json` of a checkpoint folder.

    Raises:
        Damaged: it is missing, not what was written, or of a newer format.
    """
    try:
        text = read_text(path / "checkpoint.json")
        record = json.loads(text)
        if record["sha256"] != _digest(record) or text != _spelled(record):  # a blank that became a tab, too
            raise Damaged(f"{path.name}/checkpoint.json does not match its checksum")
        if record["format"] != FORMAT:
            raise Damaged(f"{path.name} has format {record['format']}, this stoker reads {FORMAT}")
        if (type(record["step"]), record["step"]) != (int, step_of(path)) or type(record["epoch"]) is not int:
            raise Damaged(f"{path.name}/checkpoint.json is that of step {record['step']}, epoch {record['epoch']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path.name}/checkpoint.json cannot be read: {error}") from error
    return dict(record)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte of it.

    Raises:
        Damaged: a file is missing, truncated or altered; the message names it.
    """
    record = read_record(path)
    try:
        tensors = {name: _read_tensors(path, name, entry) for name, entry in record["files"].items()}
        return Checkpoint(
            path=path,
            step=record["step"],
            epoch=record["epoch"],
            metrics=dict(unflatten(record["metrics"], {})),
            model=tensors[MODEL],
            ema=tensors.get("ema.safetensors"),
            state=dict(unflatten(record["state"], tensors[STATE])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path.name}/checkpoint.json does not describe a checkpoint: {error!r}") from error


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint without building its tensors; return its record.

    Raises:
        Damaged: a file is missing, truncated or altered; the message names it.
    """
    record = read_record(path)
    try:
        for name, entry in record["files"].items():
            _verify_file(path, name, entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path.name}/checkpoint.json does not describe a checkpoint: {error!r}") from error
    return record


def _verify_file(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    file = path / name
    try:
        if Path(name).name != name or file.is_symlink():
            raise Damaged(f"{path.name}/checkpoint.json names a file outside the checkpoint: {name!r}")
        if file.stat().st_size != expected["bytes"]:
            raise Damaged(f"{path.name}/{name} has {file.stat().st_size} bytes instead of {expected['bytes']}")
        if _sha256(file) != expected["sha256"]:
            raise Damaged(f"{path.name}/{name} does not match its checksum")
    except (OSError, ValueError) as error:  # a name with a null byte
        raise Damaged(f"{path.name}/{name} cannot be read: {error}") from error


def _read_tensors(path: Path, name: str, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    _verify_file(path, name, expected)
    try:
        # One tensor at a time, each into memory of its own: reading costs no more than the state itself. Copies begin
        # at aligned addresses, as tensors do that were never saved: BLAS sums in an order that depends on the
        # address, and LBFGS, which works on its saved vectors in place, would differ in a bit.
        with safe_open(path / name, "pt", backend="pread") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (it is not a dict)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise Damaged(f"{path.name}/{name} cannot be read: {error}") from error
