"""Room that a run's checkpoints will take, known before its first step."""

import contextlib
import errno
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stoker.checkpoint.store import Store
from stoker.data.batch import map_tree
from stoker.data.seeding import isolated
from stoker.errors import UserError
from stoker.files import own_folder, remove
from stoker.state import TrainState

_PROBED_BYTES = 1 << 30  # a file system without reservation writes them
_RECORD_BYTES = 1 << 14  # checkpoint.json, headers, block sizes


def checkpoint_bytes(state: TrainState) -> int:
    """Size of a checkpoint of this state once its optimizers have taken a step."""
    modules = [state.model, *state.losses.values(), *([state.ema] if state.ema is not None else [])]
    total = sum(t.nbytes for m in modules for t in m.state_dict().values() if isinstance(t, torch.Tensor))
    total += sum(len(text) for text in state.fitted.values())
    return total + sum(_optimizer_bytes(live.optimizer) for live in state.objectives) + _RECORD_BYTES


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state: as it is, or before the first step, as one on tiny parameters of its own shows."""
    if optimizer.state:
        return _bytes_of(list(optimizer.state.values()))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    own: int = sum(p.nbytes for p in held)
    # Not smaller where they are small anyway: an optimizer that keeps a row and a column has little beside a large one.
    tiny = {p: torch.nn.Parameter(torch.zeros([min(n, 16) or 1 for n in p.shape], dtype=p.dtype)) for p in held}
    if "history_size" in optimizer.defaults:  # LBFGS keeps that many pairs of vectors, and three besides
        history = int(optimizer.defaults["history_size"])
        return (2 * history + 3) * own
    try:
        trial = object.__new__(type(optimizer))
        trial.__dict__.update(optimizer.__dict__)
        trial.state = defaultdict(dict)
        trial.param_groups = [{**g, "params": [tiny[p] for p in g["params"]]} for g in optimizer.param_groups]
        with isolated():
            for p in tiny.values():
                p.grad = torch.zeros_like(p)
            # Of torch's own classes and without hooks: a user's step may do more than update.
            known = next(c for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim"))
            known.step.__wrapped__(trial)  # type: ignore[attr-defined]
    except Exception:  # most optimizers keep two moments
        return 2 * own
    per_parameter: list[float] = [_bytes_of(trial.state[t]) / t.nbytes for t in tiny.values()]
    return int(sum(share * p.nbytes for share, p in zip(per_parameter, held, strict=True)))


def _bytes_of(tree: Any) -> int:
    found: list[int] = []

    def add(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            found.append(leaf.nbytes)
        return leaf

    map_tree(add, tree)
    return sum(found)


def check_room(store: Store, needed: int, *, resumed: bool) -> Iterator[str]:
    """Compare what checkpoints of `needed` bytes take with what the disk and its quota have; yield what is to be said.

    Raises:
        UserError: there can be no such folder, or not even the first one fits. A run that is `resumed` may drop older
            ones instead.
    """
    folder = store.folder
    try:
        own_folder(folder)
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints to {folder}: {error.strerror or error}",
            remedy="move what is there away, or choose another --out",
        ) from None
    store.sweep()
    probe, free = folder / ".partial-room", shutil.disk_usage(folder).free
    try:
        _reserve(probe, needed, free)
    except OSError as error:
        if not resumed:
            raise UserError(
                f"cannot write checkpoints to {folder}: {error.strerror or error}",
                why=f"one takes {spelled(needed)}; {spelled(free)} are free",
                remedy="make room, or choose another --out",
            ) from None
    finally:
        remove(probe)
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    whole = (max(store.keep, 1) + store.keep_best + 1) * needed  # one goes when its successor is complete
    if free + there < whole:
        yield (
            f"checkpoints will take up to {spelled(whole)}: --keep {store.keep}, --keep-best {store.keep_best} and "
            f"the one being written, {spelled(needed)} each; {spelled(free + there)} are free or theirs"
        )


def _reserve(path: Path, size: int, free: int) -> None:
    """Reserve blocks for a file, which takes no time where the file system can do it: only so does a quota show."""
    if free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with contextlib.suppress(AttributeError):  # not on every system
            os.posix_fallocate(descriptor, 0, min(size, _PROBED_BYTES))
    finally:
        os.close(descriptor)


def spelled(size: float) -> str:
    """Spell a number of bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if round(size, 0 if unit in ("B", "KB") else 2 - len(str(int(size)))) < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "KB") else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
