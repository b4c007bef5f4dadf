"""Weights into a model: a run's, a checkpoint's, or those of a file that another program wrote."""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from stoker.checkpoint.architecture import architecture_differences, describe_architecture
from stoker.checkpoint.foreign import read_foreign, state_dict_in, weights_in
from stoker.checkpoint.store import Checkpoint, Damaged, read
from stoker.data.kept import restoring
from stoker.data.seeding import isolated, seed_all_plainly
from stoker.errors import UserError, plain
from stoker.files import read_text
from stoker.naming import names
from stoker.naming.match import LoadReport, compare, load_tensors, short
from stoker.recall import recall, require_identity
from stoker.recipe import Recipe
from stoker.run import Identity, RunDir, jsonable
from stoker.source import load_source
from stoker.start import Run
from stoker.state import load_by_name, load_transient

_DIFF_LINES = 30
_LISTED = 40  # tensors of a file
_PARTS = ("model_extra", "transient", "losses", "fitted")  # of a checkpoint's state, that weights are taken from


@dataclass(frozen=True)
class Origin:
    """The run that weights come from."""

    folder: RunDir
    identity: Identity
    checkpoint: Checkpoint
    architecture: Mapping[str, str] | None  # None: an early run, which did not record it


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and where they come from."""

    tensors: Mapping[str, Any]
    label: str
    notes: tuple[str, ...] = ()
    run: Origin | None = None


@dataclass(frozen=True)
class Loaded:
    """A model with weights, what was taken of them, and how the model differs from the one that had them."""

    model: nn.Module
    weights: Weights
    report: LoadReport
    differences: tuple[str, ...]


def load(
    source: Run | str | Path, into: Recipe | nn.Module | None = None, *, which: str = "best", partial: bool = False
) -> nn.Module:
    """Return a model with saved weights, in eval mode, on the CPU.

    Args:
        source: a Run, a run's folder, one of its checkpoint folders, or a file of weights (.safetensors, .pt, .pth,
            .bin, .ckpt, a folder as the Hugging Face hub has it).
        into: the recipe whose model takes them, or a model; needed for a file, and for a run whose own recipe cannot
            be called again.
        which: the run's "best" (else its latest) or "latest" checkpoint, or the path of one.
        partial: take what fits in name and shape, leave the rest as it is, and print both.

    Raises:
        UserError: nothing there, a damaged or refused file, or weights that do not fit.

    Warns:
        UserWarning: the weights fit, but the model is not the one that they were trained in.
    """
    found = load_into(source, into, which=which, partial=partial)
    if partial:
        print("\n".join([str(found.report), *found.differences]), file=sys.stderr)
    elif found.differences:
        warnings.warn(told(found), UserWarning, stacklevel=2)
    return found.model


def load_weights(
    module: nn.Module, source: Run | str | Path | Mapping[str, Any], *, partial: bool = False
) -> LoadReport:
    """Load saved weights into a module where it is; return what was taken, and what else there was.

    Args:
        module: any module, a part of a model for example.
        source: as for `load`, or a dict of tensors by name.
        partial: take what fits in name and shape, and leave the rest as it is.

    Raises:
        UserError: they do not fit, or nothing does; the module is then as it was.

    Warns:
        UserWarning: all weights fit, but the module is not the one that they were trained in.
    """
    weights = open_weights(source)
    report = load_tensors(module, weights.tensors, source=weights.label, partial=partial, notes=weights.notes)
    differences = _differences(module, None, weights)
    if differences and not partial:
        warnings.warn(told(Loaded(module, weights, report, differences)), UserWarning, stacklevel=2)
    return replace(report, notes=(*report.notes, *differences))


def told(found: Loaded) -> str:
    """The warning for weights that fit a model that computes something else."""
    lines = plain("\n  ".join(found.differences))
    return f"the weights of {found.weights.label} fit, but this model is not the one they were trained in:\n  {lines}"


def open_weights(source: Run | str | Path | Mapping[str, Any], which: str = "best") -> Weights:
    """Find the tensors that a run, a file, or a dict holds.

    Raises:
        UserError: there are none.
    """
    if isinstance(source, Mapping):
        found = state_dict_in(source, "the dict")
        return Weights(found.tensors, "the dict", found.notes)
    path = source.dir if isinstance(source, Run) else Path(source)
    if path.is_file() or (not (path / "run.json").exists() and not (path / "checkpoint.json").exists()):
        if not path.exists() and not path.suffix:
            require_identity(RunDir(path))  # says what a run is
        if path.is_dir() and weights_in(path) is None:
            require_identity(RunDir(path))
        found = read_foreign(path)
        return Weights(found.tensors, f"{path} ({found.kind})", found.notes)
    given = path if (path / "checkpoint.json").is_file() else None
    folder = RunDir(path.resolve().parent.parent if given is not None else path)
    identity = require_identity(folder)
    chosen = given or (Path(which) if which not in ("best", "latest") else None)
    checkpoint = find_checkpoint(folder, chosen, which)
    averaged = checkpoint.ema is not None
    tensors = {**(checkpoint.ema or checkpoint.model), **checkpoint.state["model_extra"]}
    label = f"{checkpoint.path.name} of {folder.path}" + (" (the average of its weights)" if averaged else "")
    return Weights(tensors, label, (), Origin(folder, identity, checkpoint, _recorded(folder)))


def _recorded(folder: RunDir) -> Mapping[str, str] | None:
    try:
        found = json.loads(read_text(folder.path / "run.json")).get("architecture")
    except (OSError, ValueError, AttributeError):
        return None
    good = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if found and good else None


def load_into(
    source: Run | str | Path, into: Recipe | nn.Module | None, *, which: str = "best", partial: bool = False
) -> Loaded:
    """What `load` does, with its report."""
    if into is not None and not isinstance(into, Recipe | nn.Module):
        hint = "call it: recipe(...)" if callable(into) else "a stoker.Recipe or a torch.nn.Module"
        raise UserError(f"weights go into a Recipe or a module, not a {type(into).__name__}", remedy=hint)
    weights = open_weights(source, which)
    if into is None and weights.run is None:
        raise UserError(
            f"which model do the weights of {weights.label} belong to?",
            why="a file of weights does not say",
            remedy=f"stoker.load({str(source)!r}, recipe()), or a torch.nn.Module in place of the recipe",
        )
    run = weights.run
    if run is None or partial or isinstance(into, nn.Module):
        model, recipe = _target(into, run)
        report = load_tensors(
            model, weights.tensors, source=weights.label, partial=partial, notes=weights.notes, prefixes=True
        )
        if run is not None:
            here = names.named_buffers(model)
            saved = run.checkpoint.state["transient"]
            load_transient(model, {n: t for n, t in saved.items() if n in here and here[n].shape == t.shape})
    else:
        with restoring(run.checkpoint.state["fitted"]):
            recipe = into or recall(run.folder, run.identity)
        model = _strictly(recipe, weights, run)
        report = replace(compare(weights.tensors, names.state_dict(model)), source=weights.label)
    return Loaded(model.cpu().eval(), weights, report, _differences(model, recipe, weights))


def _target(into: Recipe | nn.Module | None, run: Origin | None) -> tuple[nn.Module, Recipe | None]:
    if isinstance(into, nn.Module):
        return into, None
    if into is None:
        assert run is not None
        with restoring(run.checkpoint.state["fitted"]):
            into = recall(run.folder, run.identity)
    return _build(into, run.identity.seed if run is not None else 0), into


def _build(recipe: Recipe, seed: int) -> nn.Module:
    with isolated():
        seed_all_plainly(seed)
        return recipe.build_model()


def _strictly(recipe: Recipe, weights: Weights, run: Origin) -> nn.Module:
    """Restore a run's model; where that fails, also say what is not as it was.

    Raises:
        UserError: the weights are not this recipe's.
    """
    try:
        return restore_model(recipe, run.checkpoint, run.identity.seed)
    except UserError as error:
        model = _build(recipe, run.identity.seed)
        changed = [*_architecture(model, weights), *_source(recipe, run.identity)]
        if not changed:
            raise
        raise UserError(
            error.what,
            why="\n          ".join([error.why, *changed]),
            remedy=f"stoker.load({str(run.folder.path)!r}) builds the run's own model; partial=True takes what fits",
        ) from error


def _architecture(model: nn.Module, weights: Weights) -> list[str]:
    if weights.run is None or weights.run.architecture is None:
        return []
    return architecture_differences(weights.run.architecture, describe_architecture(model))


def _source(recipe: Recipe, then: Identity) -> list[str]:
    """What differs between a recipe and the one that a run began with."""
    origin = recipe.origin
    now = replace(
        then,
        recipe=origin.name,
        function=origin.function,
        arguments=jsonable(dict(origin.arguments)),
        source=origin.source,
        modules=origin.modules,
    )
    lines = now.differences(then)
    return lines[:_DIFF_LINES] + ([f"and {len(lines) - _DIFF_LINES} more lines"] if len(lines) > _DIFF_LINES else [])


def _differences(model: nn.Module, recipe: Recipe | None, weights: Weights) -> tuple[str, ...]:
    """How a model that weights fit differs from the one they come from, and what changed in the source with it."""
    run = weights.run
    if run is None:
        return ()
    changed = _source(recipe, run.identity) if recipe is not None else []
    if run.architecture is None:
        unknown = "the run did not record its model's architecture, and the recipe is not the one that it began with:"
        return (unknown, *changed) if changed else ()
    lines = _architecture(model, weights)
    return (*lines, *changed) if lines else ()


def restore_model(recipe: Recipe, checkpoint: Checkpoint, seed: int) -> nn.Module:
    """Build the recipe's model, and its losses where they have weights, with a checkpoint's; in eval mode.

    Raises:
        UserError: the weights are not the recipe's.
    """
    model = _build(recipe, seed)
    try:
        _restore(model, recipe, checkpoint)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise _unfit(checkpoint, error) from error
    return model.eval()


def _unfit(checkpoint: Checkpoint, error: Exception) -> UserError:
    """What to say of a checkpoint whose checksums are right, and whose content is not that of a run."""
    return UserError(
        f"a damaged checkpoint: {checkpoint.path.name} does not hold the state of a run",
        why=repr(error),
        remedy="choose another one of the run by its path",
    )


def _restore(model: nn.Module, recipe: Recipe, checkpoint: Checkpoint) -> None:
    weights = checkpoint.ema if checkpoint.ema is not None else checkpoint.model
    load_by_name(model, {**weights, **checkpoint.state["model_extra"]}, "model")
    load_transient(model, checkpoint.state["transient"])
    objectives = recipe.objectives or {}
    for name, tensors in checkpoint.state["losses"].items():
        loss = objectives[name].loss if name in objectives else None
        if not isinstance(loss, nn.Module):
            raise UserError(
                f"the checkpoint has weights of the loss of objective {name!r}, the recipe has no such loss",
                remedy="give the recipe that the run began with, or model= alone: stoker.load(run, model)",
            )
        load_by_name(loss, tensors, f"loss of {name}")


def find_checkpoint(folder: RunDir, path: Path | None, which: str) -> Checkpoint:
    """Read the asked-for checkpoint of a run, verified.

    Raises:
        UserError: there is none, or it is damaged.
    """
    chosen = (
        path.resolve()
        if path is not None
        else (folder.store.best() if which == "best" else None) or folder.store.latest()
    )
    if chosen is None:
        raise UserError(f"{folder.path} has no checkpoint yet", remedy=f"stoker resume {folder.path}")
    try:
        checkpoint = read(chosen)
        wrong = [name for name in _PARTS if not isinstance(checkpoint.state.get(name), Mapping)]
        fitted = {} if wrong else checkpoint.state["fitted"]
        if wrong or not all(isinstance(text, str) for pair in fitted.items() for text in pair):
            raise Damaged(f"{chosen.name}/checkpoint.json lacks {(wrong or ['fitted'])[0]}")
        return checkpoint
    except Damaged as error:
        raise UserError(f"a damaged checkpoint: {error}", remedy="choose another one of the run by its path") from error


def describe_load(source: str, file: str | None, arguments: Sequence[str], which: str, partial: bool) -> str:
    """What `stoker load` prints: the model and what went into it, or what a file of weights holds.

    Raises:
        UserError: as `load` does.
    """
    if file is None:
        weights = open_weights(source, which)
        if weights.run is None:
            return _listing(weights)
    into, given = None, ""
    if file is not None:
        recipe = load_source(file)
        into = recipe.recipe(recipe.arguments(arguments))
        values = ", ".join(f"{k}={v!r}" for k, v in recipe.arguments(arguments).items())
        given = f", {recipe.function_name}({values})"
    found = load_into(source, into, which=which, partial=partial)
    count = sum(p.numel() for p in found.model.parameters())
    given += f", which={which!r}" if which != "best" and found.weights.run is not None else ""
    given += ", partial=True" if partial else ""
    lines = [f"{type(names.unwrapped(found.model)).__name__} with {count:,} parameters", str(found.report)]
    if found.differences:
        lines += ["the model is not the one that the weights were trained in:", *found.differences]
    return "\n".join([*lines, f"in Python: model = stoker.load({source!r}{given})"])


def _listing(weights: Weights) -> str:
    tensors = weights.tensors
    width = max((len(name) for name in list(tensors)[:_LISTED]), default=0)
    rows = [f"  {n:{width}}  {tuple(t.shape)!s:18} {short(t.dtype)}" for n, t in list(tensors.items())[:_LISTED]]
    more = [f"  and {len(tensors) - _LISTED} more"] if len(tensors) > _LISTED else []
    values = sum(t.numel() for t in tensors.values())
    head = f"{weights.label}: {len(tensors)} tensors, {values:,} values"
    return "\n".join([head, *weights.notes, *rows, *more, "a recipe after it loads them: stoker load FILE RECIPE.py"])
