"""The folder `checkpoints/` of a run: atomic writes, verified reads, two links, two retention rules.

A checkpoint is written under a hidden name, every file flushed to disk, and only then renamed, within one folder and
so within one file system: a kill or a power cut at any moment leaves it complete under its name, or absent.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stoker.checkpoint.tree import flatten, unflatten
from stoker.errors import UserError

FORMAT = 1
_REPLACED = ".replaced-"
_NAME = re.compile(r"step-(\d{8,})-epoch-(\d+)(?:-loss-[^/]+)?")


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


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says which file and how."""


def _saveable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory: tied weights are written under each of their names."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in seen and tensor.is_contiguous()
        if not alone or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        out[name] = tensor
    return out


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


class Store:
    """Checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`; made when the first checkpoint is written.
        keep: how many of the newest checkpoints to keep.
        keep_best: how many of the best ones to keep besides.
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_best: int = 1) -> None:
        self.folder, self.keep, self.keep_best = folder, keep, keep_best

    def save(
        self,
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
    ) -> Path:
        """Write a checkpoint, move the links and drop what neither rule keeps.

        `best` lists the steps of the best checkpoints, best first. An `interim` checkpoint goes with the next save.

        Raises:
            UserError: it cannot be written (disk full, no permission); those already there are untouched.
        """
        shown = f"-loss-{loss:.4f}" if loss is not None and math.isfinite(loss) else ""
        final = self.folder / f"step-{step:08d}-epoch-{epoch}{shown}"
        partial = self.folder / f".partial-{step:08d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            encoded, tensors = flatten(state)
            files = {"model.safetensors": model, "state.safetensors": tensors}
            if ema is not None:
                files["ema.safetensors"] = ema
            written = {}
            for name, content in files.items():
                save_file(_saveable(content), partial / name, metadata={"format": "pt"})
                _sync(partial / name)
                written[name] = {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
            record = {
                "format": FORMAT,
                "step": step,
                "epoch": epoch,
                "loss": loss if shown else None,
                "metrics": flatten(metrics)[0],
                "interim": interim,
                "files": written,
                "state": encoded,
            }
            record["sha256"] = _digest(record)  # the record guards the files, and itself
            (partial / "checkpoint.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
            _sync(partial / "checkpoint.json")
            _sync(partial)
            # The same step may be there from a stop before its evaluation. It goes once this one is in place.
            former = [path for path in self.all() if step_of(path) == step]
            if final in former:
                final.rename(self.folder / f"{_REPLACED}{final.name}")
            partial.rename(final)
            _sync(self.folder)
            for path in former:
                if path != final:
                    shutil.rmtree(path)
            self._link("latest", final.name)
            self._link_best(best)
            self._prune(step, best)
        except (OSError, SafetensorError) as error:
            latest = self.latest()
            resumes_at = latest.name if latest is not None else "the start"
            raise UserError(
                f"cannot write checkpoint {final}: {error}",
                why="the disk is full, its quota is used up, or it is not writable",
                remedy=f"make room, then run the same command again; it goes on from {resumes_at}",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final

    def _link(self, name: str, target: str) -> None:
        partial = self.folder / f".{name}.tmp"
        partial.unlink(missing_ok=True)  # of a save that was killed
        partial.symlink_to(target)
        partial.replace(self.folder / name)

    def _link_best(self, best: list[int]) -> None:
        by_step = {step_of(path): path for path in self.all()}
        present = [step for step in best if step in by_step]
        if present:
            self._link("best", by_step[present[0]].name)

    def _prune(self, step: int, best: list[int]) -> None:
        paths = self.all()
        upto = [path for path in paths if step_of(path) == step or (step_of(path) < step and not _is_interim(path))]
        kept = set(upto[-max(self.keep, 1) :]) | {p for p in upto if step_of(p) in best[: max(self.keep_best, 1)]}
        for path in paths:  # later steps are the past of a run that went back to this one
            if path not in kept:
                doomed = path.with_name(f".dropped-{path.name}")
                path.rename(doomed)
                shutil.rmtree(doomed)
        for kind in ("dropped", "partial", "replaced"):
            for stray in self.folder.glob(f".{kind}-*"):
                shutil.rmtree(stray)
        for link in (".latest.tmp", ".best.tmp"):  # of a save that was killed, and that no later link replaced
            (self.folder / link).unlink(missing_ok=True)

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        for replaced in self.folder.glob(f"{_REPLACED}*"):  # a kill came between two renames
            original = self.folder / replaced.name.removeprefix(_REPLACED)
            if not original.exists():
                replaced.rename(original)
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

    def newest_good(self) -> tuple[Checkpoint | None, list[str]]:
        """Read the newest checkpoint that verifies; also say what was wrong with newer ones."""
        complaints: list[str] = []
        for path in reversed(self.all()):
            try:
                return read(path), complaints
            except Damaged as error:
                complaints.append(str(error))
        return None, complaints


def step_of(path: Path) -> int:
    """Step in a checkpoint folder's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint")
    return int(match.group(1))


def _is_interim(path: Path) -> bool:
    try:
        return bool(read_record(path)["interim"])
    except Damaged:
        return False


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Verified `checkpoint.json` of a checkpoint folder.

    Raises:
        Damaged: it is missing, not what was written, or of a newer format.
    """
    try:
        record = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        if record["sha256"] != _digest(record):
            raise Damaged(f"{path.name}/checkpoint.json does not match its checksum")
        if record["format"] != FORMAT:
            raise Damaged(f"{path.name} has format {record['format']}, this stoker reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
            metrics=unflatten(record["metrics"], {}),
            model=tensors["model.safetensors"],
            ema=tensors.get("ema.safetensors"),
            state=unflatten(record["state"], tensors["state.safetensors"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path.name}/checkpoint.json does not describe a checkpoint: {error!r}") from error


def _read_tensors(path: Path, name: str, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    file = path / name
    if Path(name).name != name or file.is_symlink():
        raise Damaged(f"{path.name}/checkpoint.json names a file outside the checkpoint: {name!r}")
    try:
        if file.stat().st_size != expected["bytes"]:
            raise Damaged(f"{path.name}/{name} has {file.stat().st_size} bytes instead of {expected['bytes']}")
        if _sha256(file) != expected["sha256"]:
            raise Damaged(f"{path.name}/{name} does not match its checksum")
        # Copies begin at aligned addresses, as tensors do that were never saved: BLAS sums in an order that
        # depends on the address, and LBFGS, which works on its saved vectors in place, would differ in a bit.
        return {key: tensor.clone() for key, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path.name}/{name} cannot be read: {error}") from error
