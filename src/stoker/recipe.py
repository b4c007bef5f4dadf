"""Recipe: what is trained. A plain function of its hyperparameters returns one."""

import ast
import dis
import inspect
import linecache
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn

from stoker.errors import UserError, nearest

Step = Callable[..., Any]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
MakeSchedule = Callable[..., Any]


@dataclass(frozen=True)
class EarlyStop:
    """Stop once `metric` has not improved by more than `min_delta` for `patience` evaluations in a row."""

    metric: str = "val/loss"
    patience: int = 3
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class Objective:
    """A loss, the parameters it moves, and the optimizer that moves them. See `Recipe` for the fields."""

    _: KW_ONLY
    optimizer: MakeOptimizer
    loss: Callable[[Any, Any], Any] | None = None
    step: Step | None = None
    params: Callable[[Any], Iterable[Any]] | None = None
    schedule: MakeSchedule | None = None
    clip_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.step is None):
            raise UserError(
                "give exactly one of loss= and step=",
                why="loss(output, target) is for batches of (*inputs, target), step(model, batch) for everything else",
                remedy="step=lambda model, batch: model(**batch).loss, for example",
            )

    @property
    def takes_carry(self) -> bool:
        """Whether `step` takes, as its third argument, what it carried over from the batch before."""
        return self.step is not None and num_required(self.step) >= 3

    @property
    def takes_total_steps(self) -> bool:
        """Whether `schedule` is a function of the run's length."""
        return self.schedule is not None and num_required(self.schedule) >= 2


def num_required(function: Callable[..., Any]) -> int:
    """Count the positional parameters that a callable cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return 0
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


@dataclass(frozen=True)
class Origin:
    """Where a recipe came from: enough to build it again, if `function` is known."""

    file: Path | None = None
    function: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)  # text of the modules it imports from its own folder

    @property
    def name(self) -> str:
        """Short name: the file's stem, followed by the function where it is not called `recipe`."""
        stem = self.file.stem if self.file else "notebook"
        if self.file and stem == "recipe":
            stem = self.file.resolve().parent.name
        return stem if self.function in (None, "recipe") else f"{stem}-{self.function}"


@dataclass
class Recipe:
    """Everything that decides what a run computes.

    Args:
        model: a module, or a callable that builds one (called after python, numpy and torch are seeded).
        train: a Loader; or any other object, which is then the one batch of every step (full-batch data).
        optimizer: parameters -> torch Optimizer (also one that needs a closure, such as LBFGS).
        loss: (output, target) -> mean, or one value per sample. Batches are (*inputs, target); a dict batch is
            passed as model(**inputs), its target being the entry "target", "labels", "label" or "y".
        step: (model, batch) -> loss | (sum, count) | {"loss": one of these, "output": ..., "target": ..., and
            further scalars to log}, instead of `loss`. With a third parameter it gets the value it returned as
            "carry" for the batch before (None at an epoch's start): truncated back-propagation through time.
        params: model -> parameters or parameter groups for `optimizer` (default: all that require gradients).
        schedule: (optimizer) or (optimizer, total_steps) -> torch LRScheduler, stepped once per optimizer step.
        val, test: like `train`; evaluated exactly, every sample once.
        metrics: name -> torchmetrics Metric, or callable (output, target) -> value per sample | (sum, count) | mean.
        objectives: name -> Objective, run in order on every batch, instead of loss, step, optimizer, params,
            schedule and clipping here.
        clip_norm, clip_value: bounds on the gradient's total norm and on each of its elements.
        ema: decay of an exponential moving average of the weights; evaluations and exports then use the average.
        best: name of the value that the link `checkpoints/best` follows; `best_mode` is "min" or "max".
        early_stop: when to stop before the last epoch.

    Raises:
        UserError: fields that contradict one another.
    """

    _: KW_ONLY
    model: nn.Module | Callable[[], nn.Module]
    train: Any
    optimizer: MakeOptimizer | None = None
    loss: Callable[[Any, Any], Any] | None = None
    step: Step | None = None
    params: Callable[[Any], Iterable[Any]] | None = None
    schedule: MakeSchedule | None = None
    val: Any = None
    test: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    objectives: Mapping[str, Objective] | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    ema: float | None = None
    best: str = "val/loss"
    best_mode: Literal["min", "max"] = "min"
    early_stop: EarlyStop | None = None
    origin: Origin = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.origin = origin_of_frame(sys._getframe(2))  # 0 is here, 1 the generated __init__
        single = {
            name: value
            for name in ("optimizer", "loss", "step", "params", "schedule", "clip_norm", "clip_value")
            if (value := getattr(self, name)) is not None
        }
        if self.objectives is None:
            if self.optimizer is None:
                raise UserError(
                    "the recipe has no optimizer", remedy="optimizer=lambda params: torch.optim.AdamW(params)"
                )
            self.objectives = {"main": Objective(**single)}
        elif single:
            raise UserError(
                f"objectives= and {', '.join(f'{name}=' for name in single)} are both given",
                remedy="move them into the Objectives",
            )
        elif not self.objectives:
            raise UserError("objectives= is empty")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema must be a decay between 0 and 1, got {self.ema}", remedy="ema=0.999, for example")
        if self.early_stop is not None and self.val is None:
            raise UserError("early_stop needs validation data", remedy="give val=stoker.Loader(...)")
        for mode in (self.best_mode, self.early_stop.mode if self.early_stop else "min"):
            if mode not in ("min", "max"):
                raise UserError(f"mode must be 'min' or 'max', got {mode!r}")

    def place_losses(self, device: torch.device) -> None:
        """Move losses that are modules (class weights, weights of their own) beside the model."""
        for objective in (self.objectives or {}).values():
            if isinstance(objective.loss, nn.Module):
                objective.loss.to(device)

    @property
    def length_matters(self) -> bool:
        """Whether a schedule is a function of the run's total number of steps."""
        assert self.objectives is not None
        return any(objective.takes_total_steps for objective in self.objectives.values())

    def build_model(self) -> nn.Module:
        """Return the module; called once, after seeding.

        Raises:
            UserError: `model` is neither a module nor a callable that returns one.
        """
        model = self.model if isinstance(self.model, nn.Module) else self.model()
        if not isinstance(model, nn.Module):
            raise UserError(f"model= gave a {type(model).__name__}, not a torch.nn.Module")
        return model


_PLAIN = (bool, int, float, str, list, tuple, dict, Path, type(None))

TARGET_NAMES = ("target", "targets", "labels", "label", "y")


def unpack(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Split a batch into the model's positional and keyword inputs and the target.

    Raises:
        UserError: the batch is neither (*inputs, target) nor a dict with a target.
    """
    if isinstance(batch, list | tuple) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    if isinstance(batch, Mapping):
        for name in TARGET_NAMES:
            if name in batch:
                return (), {key: value for key, value in batch.items() if key != name}, batch[name]
    keys = f" with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    raise UserError(
        f"loss= cannot tell inputs from target in a batch of type {type(batch).__name__}{keys}",
        why="it takes (*inputs, target), or a dict with one of " + ", ".join(TARGET_NAMES),
        remedy="write step=lambda model, batch: ... instead of loss=",
    )


def origin_of_frame(frame: FrameType) -> Origin:
    """Origin of a recipe made in `frame`.

    `function` stays None where calling it again would not give the same recipe: it is not at the top level of a file,
    it was given objects, or it has assigned to one of its parameters, whose values are no longer the arguments then.
    """
    code = frame.f_code
    file = Path(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename, frame.f_globals))
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    assigned = {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_FAST", "STORE_DEREF")}
    plain = file.exists() and all(isinstance(frame.f_locals.get(n), _PLAIN) for n in names)  # run.json can keep it
    top_level = getattr(frame.f_globals.get(code.co_name), "__code__", None) is code
    return Origin(
        file=file.resolve() if file.exists() else None,
        modules=local_modules(file.resolve(), source) if file.exists() else {},
        function=code.co_name if top_level and not assigned & set(names) and plain else None,
        arguments={name: frame.f_locals.get(name) for name in names} if top_level else {},
        source=source,
    )


def local_modules(file: Path, source: str) -> dict[str, str]:
    """Text of every module that a file imports, directly or not, from its own folder, by path relative to it."""
    found: dict[str, str] = {}
    pending = [(source, "")]
    while pending:
        for name in imported_names(*pending.pop()):
            path = file.parent / Path(*name.split("."))
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                relative = str(candidate.relative_to(file.parent))
                if relative not in found and candidate != file and candidate.is_file():
                    found[relative] = candidate.read_text(encoding="utf-8", errors="replace")
                    package = name if candidate.name == "__init__.py" else name.rpartition(".")[0]
                    pending.append((found[relative], package))
    return dict(sorted(found.items()))


def imported_names(source: str, package: str = "") -> set[str]:
    """Dotted names that a file's import statements can load, wherever in it they stand; relative ones in `package`."""
    names: set[str] = set()
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # a notebook's cell with magics
        return names
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level and package else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)} if module else set()
    return names | {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(1, len(parts))}


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the recipe function's parameters with their annotations resolved."""
    return dict(inspect.signature(function, eval_str=True).parameters)


def check_arguments(function: Callable[..., Any], names: Sequence[str], label: str) -> None:
    """Refuse unknown and missing arguments, listing the valid ones.

    Raises:
        UserError: an argument that the recipe does not take, or one without a default that is not given.
    """
    parameters = parameters_of(function)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    listing = ", ".join(str(p) for p in parameters.values()) or "none"
    for name in names:
        if name not in parameters:
            raise UserError(
                f"{label} has no parameter {name!r}{nearest(name, list(parameters))}",
                remedy=f"its parameters are: {listing}",
            )
    missing = [
        n for n, p in parameters.items() if p.default is p.empty and n not in names and p.kind is not p.VAR_POSITIONAL
    ]
    if missing:
        raise UserError(f"{label} needs a value for {', '.join(missing)}", remedy=f"add {missing[0]}=VALUE")
