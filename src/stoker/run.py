"""The run directory: identity, source, events. Its path is an argument, never a global."""

import difflib
import enum
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import random
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stoker import __version__
from stoker.catalog.runfiles import DamagedRun, read_recorded
from stoker.checkpoint.saver import FULL, Saver, tensors_of
from stoker.checkpoint.store import STATE, Snapshot, Store, snapshot
from stoker.errors import UserError
from stoker.files import own_folder, read_text, write_atomically
from stoker.plan import Plan
from stoker.recipe import Origin
from stoker.state import Progress, TrainState

_ADJECTIVES = """
amber azure brave brisk bright calm clever coral crisp dapper eager early fair fleet fresh gentle glad golden
grand happy hardy honest keen kind lively lucky mellow merry mild modest neat nimble noble plain proud quick
quiet rapid ready royal rustic sandy sharp silver simple sleek smart snowy solid steady still sunny swift tidy
tranquil true vivid warm wise witty young zesty
"""
_NOUNS = """
badger beaver bison camel condor coyote crane deer dingo dolphin eagle egret falcon ferret finch fox gazelle
gecko gopher grouse hare hawk heron horse ibex jackal jaguar kestrel koala lark lemur lion llama lynx marmot
marten moose newt ocelot oriole osprey otter owl panda parrot pelican penguin pigeon puffin puma quail rabbit
raven robin salmon seal shrew sparrow stork swan tapir tiger trout turtle vole walrus weasel whale wolf wren yak
"""


@dataclass(frozen=True)
class Identity:
    """What decides a run's result, as `run.json` keeps it."""

    recipe: str
    function: str | None
    file: str | None
    arguments: Mapping[str, Any]
    source: str
    modules: Mapping[str, str]
    seed: int
    precision: str
    epochs: int | None
    steps: int | None
    eval_every: int | None
    length_matters: bool  # the schedule is a function of the run's length
    options: Mapping[str, Any] = field(default_factory=dict)  # of `fit`, that do not change the result

    def differences(self, then: "Identity") -> list[str]:
        """Lines that say what was and what is, for every difference that changes the result."""
        lines = []
        names = sorted({*then.arguments, *self.arguments})
        for name in names:
            old, new = then.arguments.get(name, "(not given)"), self.arguments.get(name, "(not given)")
            if old != new:
                lines.append(f"argument {name}: {old} then, {new} now")
        fields = ["recipe", "function", "seed", "precision", "eval_every"]
        fields += ["epochs", "steps"] if self.length_matters or then.length_matters else []
        for name in fields:
            if getattr(then, name) != getattr(self, name):
                why = " (the schedule is a function of it)" if name in ("epochs", "steps") else ""
                lines.append(f"{name}: {getattr(then, name)} then, {getattr(self, name)} now{why}")
        old_texts, new_texts = {"recipe.py": then.source, **then.modules}, {"recipe.py": self.source, **self.modules}
        for name in sorted({*old_texts, *new_texts}):
            old_lines, new_lines = old_texts.get(name, "").splitlines(), new_texts.get(name, "").splitlines()
            lines += difflib.unified_diff(old_lines, new_lines, f"{name} then", f"{name} now", lineterm="", n=1)
        return lines


def jsonable(value: Any) -> Any:
    """Return the value if JSON keeps it, else its spelling."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if isinstance(value, Path) else f"<{type(value).__qualname__}>"  # no address: it changes


def identity_of(origin: Origin, **decided: Any) -> Identity:
    """Identity of a recipe's run."""
    return Identity(
        recipe=origin.name,
        function=origin.function,
        file=str(origin.file) if origin.file else None,
        arguments=jsonable(dict(origin.arguments)),
        source=origin.source,
        modules=origin.modules,
        **decided,
    )


def fresh_dir(recipe: str) -> Path:
    """`runs/RECIPE/NAME` with a name that is not taken. Drawn outside the seeded generators."""
    draw = random.SystemRandom()
    while True:
        path = Path("runs") / recipe / f"{draw.choice(_ADJECTIVES.split())}-{draw.choice(_NOUNS.split())}"
        if not path.exists():
            return path


def _git_commit(folder: Path) -> str | None:
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None if found.returncode == 0 else None


class RunDir:
    """One run's folder; held by one process at a time.

    Raises:
        UserError: it cannot be made or written, holds something else, or another process trains in it.
    """

    def __init__(self, path: Path, *, keep: int = 2, keep_best: int = 1, on_full_disk: str = "continue") -> None:
        self.path = path
        self.store = Store(path / "checkpoints", keep=keep, keep_best=keep_best)
        self.saver = Saver(self.store, on_full_disk)
        self._lock: FileIO | None = None
        self._events: FileIO | None = None  # unbuffered: what cannot be written is not tried again when it is closed
        self._unwritten = b""  # events that a full disk had no room for
        self._saved_at = time.monotonic()

    def hold(self) -> None:
        """Make the folder and keep other processes out of it until this one ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
            if strangers and not (self.path / "run.json").exists():
                raise UserError(
                    f"{self.path} is not a run: it has no run.json, but holds {', '.join(sorted(strangers)[:3])}",
                    remedy="choose an empty or new folder with --out",
                )
            self._lock = _open_for_writing(self.path / ".lock")
            # A record lock: unlike flock's, it does not live on in data workers that outlive a killed parent.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.store.recover()
        except BlockingIOError:
            raise UserError(
                f"another process is training in {self.path}", remedy="wait for it, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno == errno.ENOLCK:
                return  # a network file system without locks: a second process there is the user's to avoid
            raise UserError(
                f"cannot write to {self.path}: {error.strerror or error}", remedy="choose another --out"
            ) from None

    def read_identity(self) -> Identity | None:
        """Identity that the folder's run began with; None in an empty folder."""
        try:
            recorded = read_recorded(self.path) if (self.path / "run.json").exists() else None
            if recorded is None:
                raise FileNotFoundError
            source = read_text(self.path / "recipe.py")
            if recorded["source_sha256"] != _sha256(source):
                raise ValueError("recipe.py beside it is not the source that it began with")
            return Identity(
                recipe=str(recorded["recipe"]["name"]),
                function=recorded["recipe"]["function"],
                file=recorded["recipe"]["file"],
                arguments=dict(recorded["recipe"]["arguments"]),
                source=source,
                modules={name: self._module(name, recorded["modules_sha256"]) for name in recorded["modules"]},
                seed=recorded["seed"],
                precision=recorded["plan"]["precision"],
                options=_options(recorded["options"]),
                **recorded["limits"],
            )
        except FileNotFoundError:
            if not self.store.all():  # nothing yet, or killed before its source was written
                return None
            missing = [name for name in ("run.json", "recipe.py") if not (self.path / name).exists()]
            raise UserError(
                f"{self.path} lacks {' and '.join(missing) or 'a module of its source'}",
                remedy="put it back there",
            ) from None
        except (DamagedRun, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self.path}/run.json cannot be read: {error!r}",
                why="it was damaged, or written by another version of stoker",
            ) from error

    def _module(self, name: str, checksums: Mapping[str, str]) -> str:
        """Text of a module that the run keeps.

        Raises:
            ValueError: it is not inside the run, or not what the run began with.
        """
        folder, path = (self.path / "source").resolve(), (self.path / "source" / name).resolve()
        if (self.path / "source").is_symlink() or not path.is_relative_to(folder):
            raise ValueError(f"{name!r} is not a module of the run")
        text = read_text(path)
        if checksums[name] != _sha256(text):
            raise ValueError(f"source/{name} is not the source that it began with")
        return text

    def read_architecture(self) -> dict[str, str]:
        """The model as it was when the run began, module by module; empty where that is not recorded."""
        try:
            recorded = json.loads(read_text(self.path / "run.json"))["architecture"]
            return {str(name): str(words) for name, words in recorded.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}

    def write_identity(self, identity: Identity, plan: Plan, architecture: Mapping[str, str]) -> None:
        """Record what this run is and where it happens."""
        plan_ = asdict(plan)
        recorded = {
            "recipe": {
                "name": identity.recipe,
                "file": identity.file,
                "function": identity.function,
                "arguments": identity.arguments,
            },
            "seed": identity.seed,
            "plan": {**plan_, "notes": list(plan.notes)},
            "limits": {
                "epochs": identity.epochs,
                "steps": identity.steps,
                "eval_every": identity.eval_every,
                "length_matters": identity.length_matters,
            },
            "options": dict(identity.options),
            "modules": sorted(identity.modules),
            "modules_sha256": {name: _sha256(text) for name, text in sorted(identity.modules.items())},
            "source_sha256": _sha256(identity.source),
            "git_commit": _git_commit(Path(identity.file).parent) if identity.file else None,
            "versions": {
                "stoker": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "architecture": dict(architecture),
        }
        try:
            write_atomically(self.path / "run.json", json.dumps(recorded, indent=1))  # first: it marks the folder ours
            for name, text in identity.modules.items():
                folder = own_folder(self.path / "source")
                for part in Path(name).parent.parts:
                    folder = own_folder(folder / part)
                write_atomically(folder / Path(name).name, text)
            write_atomically(self.path / "recipe.py", identity.source)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror or error}", remedy="choose another --out"
            ) from None

    def open_events(self, size_bytes: int) -> None:
        """Open the event log, cut back to what the checkpoint had seen of it.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self._events = _open_for_writing(self.path / "events.jsonl")
            if os.fstat(self._events.fileno()).st_size > size_bytes:
                os.ftruncate(self._events.fileno(), size_bytes)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}/events.jsonl: {error.strerror or error}",
                remedy="move what is there away, if it is not the log; or choose another --out",
            ) from None

    def log(self, progress: Progress, values: Mapping[str, Any]) -> None:
        """Append one event per value."""
        lines = [
            json.dumps({"step": progress.step, "epoch": progress.epoch, "name": name, "value": _number(value)})
            for name, value in values.items()
        ]
        self._unwritten += ("\n".join(lines) + "\n").encode()
        try:
            self._write_events()
        except OSError as error:
            if error.errno in FULL and self.saver.on_full_disk != "stop":
                return  # they are written with the next ones, before the next checkpoint at the latest
            raise UserError(
                f"cannot write {self.path}/events.jsonl: {error.strerror}",
                remedy="make room, then run the same command again: it goes on from the last checkpoint",
            ) from error

    def _write_events(self) -> int:
        """Write what is left to write; return the log's length."""
        if self._events is None:
            self.open_events(0)
        assert self._events is not None
        if not os.fstat(self._events.fileno()).st_nlink:
            raise OSError(errno.ENOENT, f"{self.path}/events.jsonl was deleted while the run was under way")
        before = self._events.seek(0, os.SEEK_END)
        if self._unwritten:
            if self._events.write(self._unwritten) < len(self._unwritten):
                os.ftruncate(self._events.fileno(), before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            before, self._unwritten = before + len(self._unwritten), b""
        return before

    def save(self, state: TrainState, metrics: Mapping[str, Any], *, interim: bool) -> None:
        """Begin to write a checkpoint that also remembers how far the event log had come."""
        self.saver.settle()
        saved = _snapshot_of(state, metrics, interim)
        while True:
            try:
                saved.state["events_bytes"] = self._write_events()
                break
            except OSError as error:
                if not self.saver.again(saved, error):
                    return
        assert self._events is not None
        self.saver.save(saved, self._events.fileno())
        self._saved_at = time.monotonic()

    @property
    def failed(self) -> bool:
        """Whether a save has failed since it was begun."""
        return self.saver.failed

    def copied(self) -> str | None:
        """Wait until an optimizer may take its step; see `Saver.copied`."""
        return self.saver.copied()

    def settle(self, *, last: bool = False) -> None:
        """Wait for the save that is being written; see `Saver.settle`."""
        self.saver.settle(last=last)

    def save_is_cheap(self) -> bool:
        """Whether the time since the last save is at least 50 times what it cost (assumed before the first: 0.05 s)."""
        return not self.saver.busy and time.monotonic() - self._saved_at >= 50 * (self.saver.took_s or 0.05)

    def close(self) -> None:
        """Let others in, once what is being written is written."""
        self.saver.close()
        for file in (self._events, self._lock):
            if file is not None:
                file.close()
        self._events = self._lock = None


_COUNT, _FRACTION, _MAYBE = (int,), (int, float), (int, type(None))
_OPTIONS: dict[str, tuple[type, ...]] = {
    "checkpoint_every": _MAYBE,
    "log_every": _COUNT,
    "keep": _COUNT,
    "keep_best": _COUNT,
    "microbatch": _MAYBE,
    "workers": (int, str),
    "compile": (bool,),
    "on_full_disk": (str,),
    "grace_s": (*_FRACTION, type(None)),
}


def _options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `fit` as `run.json` keeps them: these and no others, which could say to write elsewhere, or by force.

    Raises:
        ValueError: one is not what stoker writes.
    """
    for name, value in recorded.items():
        if name not in _OPTIONS or type(value) not in _OPTIONS[name]:
            raise ValueError(f"{name}={value!r} is no option of a run")
        if isinstance(value, int | float) and not abs(value) < 1 << 63:
            raise ValueError(f"{name} is no number of a run")
    return dict(recorded)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _open_for_writing(path: Path) -> FileIO:
    """Open a file of the run's for appending; not through a link, which may lead out of the run."""
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "r+")


def _snapshot_of(state: TrainState, metrics: Mapping[str, Any], interim: bool) -> Snapshot:
    progress = state.progress
    # Of torch's own optimizers; a user's may do anything at any time.
    live = [o for o in state.objectives if not o.needs_closure]
    torchs = [o.name for o in live if type(o.optimizer).__module__.startswith("torch.optim.")]
    loss = next((metrics[n] for n in ("val/loss", "train/loss") if isinstance(metrics.get(n), float)), None)
    saved = snapshot(
        step=progress.step,
        epoch=progress.epoch,
        loss=loss,
        metrics={k: v for k, v in metrics.items() if not k.startswith(("time/", "system/"))},
        model=tensors_of(state.model),
        ema=tensors_of(state.ema) if state.ema is not None else None,
        state=state.tree(),
        best=[step for _, step in progress.best],
        interim=interim,
    )
    kept = tuple(f"objectives/{name}/optimizer/state/" for name in torchs)
    steady = frozenset(name for name in saved.files[STATE] if name.startswith(kept))
    return replace(saved, steady=steady, finite=frozenset(state.names.values()))


def _number(value: Any) -> Any:
    """JSON has no nan and no infinity: they are written as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return [_number(v) for v in value] if isinstance(value, list) else value


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete lines of an event log."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]
