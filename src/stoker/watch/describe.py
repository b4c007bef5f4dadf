"""`stoker show`: a run, or a recipe, in words."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from stoker.catalog.runfiles import DamagedRun, metrics_of, read_record, read_recorded
from stoker.data.loader import Loader, check_source, open_feed
from stoker.data.seeding import isolated, seed_all_plainly
from stoker.errors import UserError, plain
from stoker.probes.summary import summary
from stoker.recall import require_identity
from stoker.recipe import unpack
from stoker.run import RunDir
from stoker.source import describe, load_source
from stoker.watch.console import shown, terminal


def describe_run(path: Path) -> None:
    """Print recipe, arguments, plan, metrics and checkpoints of a run.

    Raises:
        UserError: there is no run, or its run.json is damaged.
    """
    folder = RunDir(path)
    identity = require_identity(folder)
    try:
        recorded = read_recorded(path)
    except DamagedRun as error:
        raise UserError(f"{path} cannot be shown", why=str(error), remedy=f"stoker verify {path}") from None
    versions, commit = recorded.get("versions"), recorded.get("git_commit")
    out = terminal()
    rows: list[tuple[str, str]] = [
        ("run", str(path)),
        ("recipe", f"{identity.recipe}  ({identity.file or 'notebook'}:{identity.function or '?'})"),
        ("arguments", pairs(identity.arguments) or "none"),
        ("seed", str(identity.seed)),
        ("plan", pairs({k: v for k, v in recorded["plan"].items() if v not in (None, [], False)})),
        (
            "length",
            pairs({k: v for k, v in recorded["limits"].items() if v is not None and k != "length_matters"}),
        ),
        (
            "versions",
            (pairs(versions) if isinstance(versions, dict) else "unknown")
            + (f"  git {str(commit)[:10]}" if commit else ""),
        ),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(plain(cell, "") for cell in row))
    out.print(table)
    checkpoints = folder.store.all()
    if not checkpoints:
        out.print(f"no checkpoint yet; go on with: stoker resume {path}")
        return
    best = folder.store.best()
    listing = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("checkpoint", "written", "MiB", "values"):
        listing.add_column(heading, justify="right" if heading == "MiB" else "left")
    for checkpoint in checkpoints:
        cells = _checkpoint_row(checkpoint, checkpoint == checkpoints[-1], checkpoint == best)
        listing.add_row(*(plain(cell, "") for cell in cells))
    out.print(listing)
    out.print(_ending(folder, path))


def _checkpoint_row(path: Path, latest: bool, best: bool) -> tuple[str, str, str, str]:
    size = sum(file.lstat().st_size for file in path.iterdir()) / 2**20
    written = datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
    label = path.name + (" (latest)" if latest else "") + (" (best)" if best else "")
    try:
        values = shown(metrics_of(read_record(path)), limit=12)
    except DamagedRun as error:
        return label, written, f"{size:.1f}", f"damaged: {error}"
    return label, written, f"{size:.1f}", "  ".join(f"{name} {value:.5g}" for name, value in values.items())


def _ending(folder: RunDir, path: Path) -> str:
    for checkpoint in reversed(folder.store.all()):
        try:
            progress = read_record(checkpoint)["state"]["progress"]
        except DamagedRun:
            continue
        if progress["finished"]:
            return f"finished: {progress['finished']}"
        return f"unfinished at step {progress['step']}; go on with: stoker resume {path}"
    return "every checkpoint is damaged"


def pairs(values: Mapping[str, Any]) -> str:
    """Spell a mapping as key=value words."""
    return "  ".join(f"{key}={value}" for key, value in values.items())


def describe_recipe(target: str, arguments: Sequence[str], depth: int | None) -> None:
    """Print a recipe's arguments and the summary of its model on its first batch."""
    source = load_source(target)
    recipe = source.recipe(source.arguments(arguments))
    out = terminal()
    out.print(describe(source) + "\n", markup=False)
    check_source(recipe.train, "train")
    with isolated():
        seed_all_plainly(0)
        model = recipe.build_model()
        size = recipe.train.batch_size if isinstance(recipe.train, Loader) else None
        batch = next(open_feed(recipe.train, 0, batch_size=size).epoch(0))[0]
    try:
        args, kwargs, _ = unpack(batch)
    except UserError:
        args, kwargs = (batch,), {}
    out.print(summary(model, kwargs or args, depth=depth))
