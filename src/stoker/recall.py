"""From a run's folder back to its recipe."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker.checks import refuse_changes
from stoker.errors import UserError
from stoker.recipe import Recipe, local_modules
from stoker.run import Identity, RunDir
from stoker.source import Source, load_source


def recorded_options(identity: Identity) -> dict[str, Any]:
    """Options of `fit` that a run began with; its device is looked for anew."""
    names = ("epochs", "steps", "eval_every", "seed", "precision")
    return {**{name: getattr(identity, name) for name in names}, **identity.options}


def require_identity(folder: RunDir) -> Identity:
    """Identity of an existing run.

    Raises:
        UserError: there is none.
    """
    identity = folder.read_identity() if folder.path.is_dir() else None
    if identity is None:
        raise UserError(
            f"{folder.path} is not a run",
            why="it has no run.json" if folder.path.is_dir() else "there is no such folder",
            remedy="give a folder that `stoker train` made, such as runs/RECIPE/NAME",
        )
    return identity


def rebuild(folder: RunDir, identity: Identity, *, force: bool = False) -> Recipe:
    """Call the run's recipe again, to go on with it: its file, or where that is gone, the source that the run keeps.

    Raises:
        UserError: the recipe was not made by a function in a file, or the file has changed (`force` takes it as it is).
    """
    now = source_now(identity)
    if now is None:
        return recall(folder, identity)
    refuse_changes(folder, now, identity, force)
    return _called(load_source(f"{identity.file}:{identity.function}"), identity)


def recall(folder: RunDir, identity: Identity) -> Recipe:
    """Call the run's recipe as the run keeps it, also where its file has changed since.

    Raises:
        UserError: the recipe was not made by a function in a file.
    """
    if identity.function is None:
        raise UserError(
            f"{folder.path}: its recipe cannot be called again from the run alone",
            why="it was not returned by a function at the top level of a file, called with the recorded arguments",
            remedy="stoker.resume(run, recipe) or stoker.load(run, recipe) with the same recipe",
        )
    where = Path(identity.file) if identity.file is not None else None
    now = source_now(identity)
    if now is not None and not now.differences(identity):
        return _called(load_source(f"{where}:{identity.function}"), identity)
    kept = (folder.path / "recipe.py").resolve()
    recipe = _called(load_source(f"{kept}:{identity.function}", original=where or kept), identity)
    recipe.origin = replace(recipe.origin, file=where, modules=identity.modules)
    return recipe


def source_now(identity: Identity) -> Identity | None:
    """Identity with the text that the recipe's file and its modules have now, not run; None where it is gone."""
    if identity.file is None or identity.function is None or not Path(identity.file).is_file():
        return None
    file = Path(identity.file).resolve()
    text = file.read_text(encoding="utf-8", errors="replace")
    return replace(identity, source=text, modules=local_modules(file, text))


def _called(source: Source, identity: Identity) -> Recipe:
    return source.recipe(source.recall(identity.arguments), identity.seed)
