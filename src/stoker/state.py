"""TrainState: everything that a step changes, as one tree keyed by parameter name."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from stoker.data.kept import explain_fitted, states_of
from stoker.errors import UserError
from stoker.naming import names
from stoker.naming.match import RESUMED, compare, explain
from stoker.recipe import Objective, Recipe, num_required

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Progress:
    """How far a run has come. All counts are of things completed."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # in the current epoch
    skipped_steps: int = 0  # by the fp16 loss scaler
    skipped_samples: int = 0  # that could not be read,
    skipped_first: list[str] = field(default_factory=list)  # and what the first of them were
    evaluated_step: int = -1  # the last step whose evaluation is complete
    best: list[tuple[float, int]] = field(default_factory=list)  # (value, step), best first
    stop_best: float | None = None  # early stopping: the value to beat,
    stop_waited: int = 0  # and the evaluations since it was set
    window_sum: dict[str, float] = field(default_factory=dict)  # since the last log line, by logged name
    window_count: dict[str, float] = field(default_factory=dict)
    finished: str | None = None  # why the run is complete

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "Progress":
        """Progress from a checkpoint.

        Raises:
            TypeError, ValueError: it is not what a run writes.
        """
        found = cls(**{**tree, "best": [(float(value), int(step)) for value, step in tree["best"]]})
        counts = found.step, found.epoch, found.batch, found.skipped_steps, found.skipped_samples, found.stop_waited
        if any(type(count) is not int or count < 0 for count in counts) or type(found.evaluated_step) is not int:
            raise ValueError(f"a count of its progress is none: {dict(tree)}")
        windows = [*found.window_sum.values(), *found.window_count.values()]
        if not all(type(value) in (int, float) for value in windows) or type(found.skipped_first) is not list:
            raise ValueError("its log window holds no numbers")
        if found.window_sum.keys() != found.window_count.keys() or max([*counts, found.evaluated_step]) >= 1 << 62:
            raise ValueError("a count of its log window is missing, or one of its progress is absurd")
        if not isinstance(found.finished, str | None) or not isinstance(found.stop_best, int | float | None):
            raise ValueError(f"it is finished for {found.finished!r}, to beat {found.stop_best!r}")
        return found


@dataclass
class Live:
    """An objective with its optimizer and schedule."""

    name: str
    spec: Objective
    optimizer: torch.optim.Optimizer
    parameters: list[torch.Tensor]
    scheduler: Any
    needs_closure: bool
    takes_carry: bool
    prefix: str  # of its logged names
    log_name: str
    carry: Any = None  # what the step before carried over,
    carried: Any = None  # and what this one does

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])


class TrainState:
    """Model, optimizers, schedules, moving average, loss scaler, carried state and progress of a run."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        *,
        total_steps: int | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        assert recipe.objectives is not None
        self.model = model
        self.progress = Progress()
        self.scaler = scaler
        losses = {name: o.loss for name, o in recipe.objectives.items() if isinstance(o.loss, nn.Module)}
        self.losses = {name: loss for name, loss in losses.items() if loss.state_dict()}
        self.names: dict[torch.Tensor, str] = {p: name for name, p in names.named_parameters(model).items()}
        for objective, loss in self.losses.items():
            self.names |= {p: f"loss/{objective}/{name}" for name, p in names.named_parameters(loss).items()}
        self.objectives = [
            self._live(name, spec, total_steps, len(recipe.objectives) == 1) for name, spec in recipe.objectives.items()
        ]
        self.parameters = list(self.names)
        self.ema = copy.deepcopy(model).requires_grad_(False) if recipe.ema is not None else None
        self.ema_decay = recipe.ema or 0.0
        self.fitted = states_of(
            [getattr(source, "dataset", None) for source in (recipe.train, recipe.val, recipe.test)]
        )
        self.stream: Any = None  # where iterable training data stand: see Feed.state

    def _live(self, name: str, spec: Objective, total_steps: int | None, single: bool) -> Live:
        default = [p for p in self.model.parameters() if p.requires_grad]
        if name in self.losses:
            default += [p for p in self.losses[name].parameters() if p.requires_grad]
        params = spec.params(self.model) if spec.params is not None else default
        params = list(params)
        if not params:
            raise UserError(
                f"objective {name!r} has no parameter to train",
                why="every parameter is frozen, or the model has none",
                remedy="set requires_grad on some, or name them with params=",
            )
        optimizer = spec.optimizer(params)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UserError(f"optimizer= gave a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        held = {p for group in optimizer.param_groups for p in group["params"]}
        owned: list[torch.Tensor] = [p for p in self.names if p in held]  # in the order in which a norm sums up
        strange = [tuple(p.shape) for p in held if p not in self.names]
        if strange:
            raise UserError(
                f"the optimizer of objective {name!r} holds {len(strange)} parameters that are not the model's",
                why=f"their shapes are {strange[:3]}; what is not in the model is not saved",
                remedy="register them in the model, or in a loss that is an nn.Module",
            )
        scheduler = None
        if spec.schedule is not None:
            if spec.takes_total_steps and total_steps is None:
                raise UserError(
                    "the schedule needs the number of steps, which iterable data does not tell",
                    remedy="add --steps N",
                )
            scheduler = spec.schedule(*((optimizer, total_steps) if spec.takes_total_steps else (optimizer,)))
        closure = num_required(type(optimizer).step) >= 2  # self and, as LBFGS has it, the closure
        if closure and self.scaler is not None:
            raise UserError(
                f"objective {name!r}: fp16 does not go with {type(optimizer).__name__}",
                why="the loss scaler unscales gradients once a step, this optimizer computes them many times",
                remedy="--precision bf16 or fp32",
            )
        prefix = "train/" if single else f"train/{name}/"
        return Live(name, spec, optimizer, owned, scheduler, closure, spec.takes_carry, prefix, prefix + "loss")

    @torch.no_grad()
    def average(self, ema: nn.Module) -> None:
        """Move the averaged weights towards the current ones; buffers are copied."""
        averaged: list[torch.Tensor] = list(ema.parameters())
        current: list[torch.Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.ema_decay)
        ours, theirs = list(ema.buffers()), list(self.model.buffers())
        if [b.shape for b in ours] != [b.shape for b in theirs]:  # a forward pass made one, or made one larger
            load_transient(ema, transient(self.model))
            ours = list(ema.buffers())
        for our, their in zip(ours, theirs, strict=True):
            our.copy_(their)

    @property
    def evaluated(self) -> nn.Module:
        """The weights that evaluations and exports use."""
        return self.model if self.ema is None else self.ema

    def tree(self) -> dict[str, Any]:
        """Everything but the model's and the average's tensors, which have files of their own."""
        content = names.state_dict(self.model)
        return {
            "progress": asdict(self.progress),
            "objectives": {
                o.name: {
                    "optimizer": self._optimizer_tree(o.optimizer),
                    "scheduler": o.scheduler.state_dict() if o.scheduler is not None else None,
                }
                for o in self.objectives
            },
            "losses": {name: names.state_dict(loss) for name, loss in self.losses.items()},
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "fitted": self.fitted,
            "stream": self.stream,
            "carry": {o.name: o.carry for o in self.objectives},
            "transient": {k: buffer for k, buffer in names.named_buffers(self.model).items() if k not in content},
            "model_extra": {k: v for k, v in content.items() if not isinstance(v, torch.Tensor)},
        }

    def _optimizer_tree(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """State by parameter name instead of by position."""
        raw = optimizer.state_dict()
        live = [p for group in optimizer.param_groups for p in group["params"]]
        ids = [i for group in raw["param_groups"] for i in group["params"]]
        name_of = {i: self.names[p] for i, p in zip(ids, live, strict=True)}
        return {
            "state": {name_of[i]: value for i, value in raw["state"].items()},
            "groups": [g | {"params": [name_of[i] for i in g["params"]]} for g in raw["param_groups"]],
        }

    def _load_optimizer(self, live: Live, tree: Mapping[str, Any]) -> None:
        raw = live.optimizer.state_dict()
        now = [[self.names[p] for p in group["params"]] for group in live.optimizer.param_groups]
        then = [list(group["params"]) for group in tree["groups"]]
        if now != then:
            _explain_names(f"optimizer {live.name!r}", set(chain(*then)), set(chain(*now)))
            raise UserError(
                f"optimizer {live.name!r}: its parameter groups are not those of the checkpoint",
                why=f"parameters per group: {[len(g) for g in then]} then, {[len(g) for g in now]} now",
            )
        id_of = {
            name: i
            for names, group in zip(now, raw["param_groups"], strict=True)
            for name, i in zip(names, group["params"], strict=True)
        }
        for group, own in zip(tree["groups"], raw["param_groups"], strict=True):
            refuse_kinds(group, own, f"{live.name}/optimizer")
        live.optimizer.load_state_dict(
            {
                "state": {id_of[name]: value for name, value in tree["state"].items()},
                "param_groups": [g | {"params": [id_of[n] for n in g["params"]]} for g in tree["groups"]],
            }
        )

    def load(self, model: Tensors, ema: Tensors | None, tree: Mapping[str, Any]) -> list[str]:
        """Take over a checkpoint's content, strictly by name; return what is worth a word.

        Raises:
            UserError: names or shapes differ from this recipe's; nothing of it is then to be trusted.
        """
        notes = []
        progress = Progress.of(tree["progress"])
        load_by_name(self.model, {**model, **tree["model_extra"]}, "model")
        load_transient(self.model, tree["transient"])
        if self.ema is not None:
            load_by_name(self.ema, {**(model if ema is None else ema), **tree["model_extra"]}, "average")
            load_transient(self.ema, tree["transient"])
            if ema is None:
                notes.append(f"the average of the weights (ema={self.ema_decay}) begins with the checkpoint's weights")
        elif ema is not None:
            notes.append("the checkpoint's average of the weights is dropped, as the recipe has no ema=")
        _explain_names("objectives", set(tree["objectives"]), {o.name for o in self.objectives})
        for live in self.objectives:
            saved = tree["objectives"][live.name]
            self._load_optimizer(live, saved["optimizer"])
            _load_scheduler(live, saved["scheduler"])
        for name, loss in self.losses.items():
            load_by_name(loss, tree["losses"][name], f"loss of {name}")
        if self.scaler is not None and tree["scaler"]:
            self.scaler.load_state_dict(tree["scaler"])
        device = next(self.model.parameters()).device
        for live in self.objectives:
            live.carry = _to(tree["carry"][live.name], device)
        explain_fitted(tree["fitted"], self.fitted)
        self.stream = tree["stream"]
        self.progress = progress
        return notes


def _load_scheduler(live: Live, saved: Mapping[str, Any] | None) -> None:
    if live.scheduler is None or saved is None:
        if live.scheduler is None and saved is None:
            return
        raise UserError(f"objective {live.name!r} had {'no' if live.scheduler else 'a'} schedule when it was saved")
    refuse_kinds(saved, live.scheduler.state_dict(), f"{live.name}/scheduler")
    for name in saved:
        if name == "optimizer" or callable(getattr(type(live.scheduler), name, None)):
            raise ValueError(f"{live.name}/scheduler has {name!r}, which would take the place of a method")
    live.scheduler.load_state_dict(saved)


_NUMBERS = (int, float, np.generic, torch.Tensor)


def refuse_kinds(saved: Any, own: Any, path: str) -> None:
    """Compare a saved tree with one of its own kind, part by part; what only one of them has is passed over.

    Raises:
        TypeError: a part is of another kind, naming it.
    """
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        for name in saved.keys() & own.keys() - {"params"}:
            refuse_kinds(saved[name], own[name], f"{path}/{name}")
    elif isinstance(own, list | tuple) and isinstance(saved, list | tuple) and len(own) == len(saved):
        for i, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
            refuse_kinds(theirs, ours, f"{path}/{i}")
    elif own is None or (isinstance(own, bool) and saved is None):  # an option that was not given, then or now
        return
    elif not (type(own) is type(saved) or (isinstance(own, _NUMBERS) and isinstance(saved, _NUMBERS))):
        raise TypeError(f"{path} is a {type(saved).__name__}, not a {type(own).__name__}")


def transient(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a module leaves out of its state dict. A step may change them, so they are part of the state."""
    kept = names.state_dict(module).keys()
    return {name: buffer for name, buffer in names.named_buffers(module).items() if name not in kept}


def load_transient(module: nn.Module, buffers: Tensors) -> None:
    """Put such buffers back, also those that only a forward pass makes, or makes larger."""
    device = next(module.parameters()).device
    for name, tensor in buffers.items():
        owner, leaf = names.owner_of_buffer(module, name)
        owner.register_buffer(leaf, tensor.to(device, copy=True), persistent=False)


def _to(tree: Any, device: torch.device) -> Any:
    from stoker.data.batch import map_tree

    return map_tree(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def _explain_names(what: str, saved: set[str], here: set[str]) -> None:
    missing, unexpected = sorted(here - saved), sorted(saved - here)
    if not missing and not unexpected:
        return
    then, now = dict.fromkeys(sorted(saved)), dict.fromkeys(sorted(here))
    raise _not_the_recipes(f"{what}: the checkpoint's names are not the recipe's", then, now)


def _not_the_recipes(what: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> UserError:
    lines = explain(compare(saved, here, exact=True), saved, here, RESUMED)
    return UserError(
        what,
        why="\n          ".join(lines),
        remedy="resume with the source and arguments that the run began with (recipe.py and run.json in the run)",
    )


def load_by_name(module: nn.Module, tensors: Mapping[str, Any], what: str) -> None:
    """Load a state dict strictly, saying which names or shapes do not fit.

    Raises:
        UserError: a name is missing or unknown, or a shape differs.
    """
    here = names.state_dict(module)
    report = compare(tensors, here, exact=True)
    if report.missing or report.unexpected:
        raise _not_the_recipes(f"{what}: the checkpoint's names are not the recipe's", tensors, here)
    wrong = [*report.reshaped, *report.retyped]
    if wrong:
        raise _not_the_recipes(f"{what}: {len(wrong)} shapes or types differ", tensors, here)
    names.load_state_dict(module, tensors)
