"""From a run's folder back to its recipe."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker.checks import refuse_changes
from stoker.errors import UserError, plain
from stoker.files import open_regular
from stoker.recipe import Recipe, local_modules
from stoker.run import Identity, RunDir
from stoker.source import Source, load_file

_DIFF_LINES = 30
_SOURCE_BYTES = 1 << 22  # no recipe is longer


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
    source = load_file(Path(identity.file or ""), identity.function or "", modules=identity.modules)
    return _called(source, identity)


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
    differences = now.differences(identity) if now is not None else []
    if now is not None and not differences:
        source = load_file(Path(identity.file or ""), identity.function, modules=identity.modules)
        return _called(source, identity)
    if differences:
        shown = "\n  ".join([*differences[:_DIFF_LINES], *(["..."] if len(differences) > _DIFF_LINES else [])])
        print(plain(f"stoker: {where} has changed since; the run's own source is used:\n  {shown}"), file=sys.stderr)
    kept = (folder.path / "recipe.py").resolve()
    source = load_file(kept, identity.function, original=where or kept, modules=identity.modules)
    recipe = _called(source, identity)
    recipe.origin = replace(recipe.origin, file=where, modules=identity.modules)
    return recipe


def source_now(identity: Identity) -> Identity | None:
    """Identity with the text that the recipe's file and its modules have now, not run; None where it is gone."""
    if identity.file is None or identity.function is None or not identity.file.endswith(".py"):
        return None  # what differs is shown: a stranger's run may name a key, a pipe, or a file without an end
    try:
        file = Path(identity.file).resolve()
        with open_regular(file) as opened:
            size = min(os.fstat(opened.fileno()).st_size, _SOURCE_BYTES)
            text = opened.read(size).decode("utf-8", errors="replace")
    except (OSError, ValueError, RuntimeError):
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return replace(identity, source=text, modules=local_modules(file, text))


def _called(source: Source, identity: Identity) -> Recipe:
    return source.recipe(source.recall(identity.arguments), identity.seed)
