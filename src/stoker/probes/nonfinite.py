"""Which module first turned numbers into nan or infinity: the step is run again under hooks, randomness and all."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stoker.data.batch import map_tree
from stoker.data.loader import Loader, open_feed, sample_ids
from stoker.data.seeding import STEP, fold, seed_all
from stoker.errors import UserError
from stoker.losses import terms
from stoker.naming import names
from stoker.recipe import unpack

if TYPE_CHECKING:
    from stoker.train import NonFinite, Session


def explain(s: "Session", error: "NonFinite") -> UserError:
    """Message that names the step, its samples and the first module whose output is not finite."""
    ids = sample_ids(s.recipe.train, s.seed, error.epoch, error.batch)
    shown = "all of the data" if ids is None else ", ".join(map(str, ids[:16])) + (", ..." if len(ids) > 16 else "")
    return UserError(
        f"{error.what} is not finite in step {error.step + 1} (epoch {error.epoch}, batch {error.batch})",
        why=f"{_cause(s, error, ids)}\n  samples: {shown}",
        remedy="the checkpoints before it are untouched; try a lower learning rate, clip_norm=1.0, or mend the samples",
    )


def _cause(s: "Session", error: "NonFinite", ids: list[int] | None) -> str:
    bad = [name for name, p in names.named_parameters(s.state.model).items() if not p.isfinite().all()]
    if bad:
        return f"the update of an earlier step left the parameter {bad[0]} not finite ({len(bad)} in all)"
    size = s.recipe.train.batch_size if isinstance(s.recipe.train, Loader) else None
    feed = open_feed(s.recipe.train, s.seed, batch_size=size)
    batch = s.strategy.place(next(feed.epoch(error.epoch, error.batch))[0])
    rows = _bad_rows(batch)
    if rows:
        known = [f"sample {ids[row]}" if ids is not None and row < len(ids) else f"row {row}" for row in rows[:8]]
        return f"the data themselves are not finite: {', '.join(known)}"
    return replay(s, batch, error.step) or "the loss function, given finite outputs"


def _finite(tree: Any) -> bool:
    found = []

    def look(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            found.append(bool(leaf.isfinite().all()))
        return leaf

    map_tree(look, tree)
    return all(found)


def _bad_rows(batch: Any) -> list[int]:
    rows: set[int] = set()

    def look(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim():
            rows.update(
                (~leaf.isfinite())
                .flatten(1 if leaf.dim() > 1 else 0)
                .reshape(len(leaf), -1)
                .any(1)
                .nonzero()[:, 0]
                .tolist()
            )
        return leaf

    map_tree(look, batch)
    return sorted(rows)


@torch.no_grad()
def replay(s: "Session", batch: Any, step: int) -> str | None:
    """Run a step's forward passes under hooks; name the first module with finite inputs and another output."""
    culprit: list[str] = []
    called = {m: name or "(the model itself)" for name, m in names.named_modules(s.state.model).items()}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not culprit and _finite([args, kwargs]) and not _finite(output):
            culprit.append(f"module {called[module]} ({type(module).__name__}) gave the first value that is not finite")

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in called]
    seed_all(fold(s.seed, STEP, step))
    try:
        for live in s.state.objectives:
            with s.strategy.autocast():
                if live.spec.step is not None:
                    carry = (live.carry,) if live.takes_carry else ()
                    terms(live.spec.step(s.state.model, batch, *carry))
                else:
                    args, kwargs, _ = unpack(batch)
                    s.state.model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return culprit[0] if culprit else None
