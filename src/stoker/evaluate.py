"""Evaluation: every sample counted exactly once, whatever the batch size; sums in float64, divided at the end."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stoker.data.batch import num_rows
from stoker.data.feeds import Feed
from stoker.data.seeding import EVALUATION, fold, seed_all
from stoker.devices.strategy import Strategy
from stoker.errors import UserError
from stoker.interrupts import Interrupted, Interrupts
from stoker.losses import Mean, Terms, add_result, effective_count, exact, terms
from stoker.recipe import Recipe, unpack

_END = object()


class Scores:
    """The losses and metrics of one evaluation."""

    def __init__(self, metrics: Mapping[str, Any], device: torch.device) -> None:
        self._metrics = {n: m.to(device) if hasattr(m, "to") else m for n, m in metrics.items()}
        self._means: dict[str, Mean] = {}
        for name, metric in self._metrics.items():
            if hasattr(metric, "update"):
                metric.reset()
            elif not callable(metric):
                raise UserError(
                    f"metric {name!r} is a {type(metric).__name__}",
                    remedy="a torchmetrics Metric or a callable",
                )

    def mean(self, name: str) -> Mean:
        """Return the running mean of that name."""
        return self._means.setdefault(name, Mean())

    def add_loss(self, name: str, found: Terms, loss: Any, target: Any, rows: int) -> None:
        """Count one batch's loss: its sum and what it was summed over."""
        reduction, count = effective_count(loss, target, rows)
        value = exact(found.loss)
        if found.count is not None:
            self.mean(name).add(value, found.count)
        elif reduction == "sum":
            self.mean(name).add(value, rows)
        elif isinstance(count, torch.Tensor):  # a mean over nothing is nan, and counts nothing
            self.mean(name).add(torch.where(count > 0, value * count, 0.0), count)
        else:
            self.mean(name).add(value * count, count)

    def update(self, output: Any, target: Any, rows: int) -> None:
        """Count one batch.

        Raises:
            UserError: a metric raises; the message names it and the shapes it was given.
        """
        for name, metric in self._metrics.items():
            try:
                if hasattr(metric, "update"):
                    metric.update(output, target)
                else:
                    add_result(self.mean(name), metric(output, target), rows)
            except Exception as error:
                raise _failed(name, error, output, target) from error

    def compute(self, prefix: str) -> dict[str, Any]:
        """All values, by name under `prefix`."""
        values: dict[str, Any] = {f"{prefix}/{name}": mean.value() for name, mean in self._means.items()}
        for name, metric in self._metrics.items():
            if not hasattr(metric, "update"):
                continue
            try:
                found = metric.compute()
            except Exception as error:
                raise _failed(name, error, None, None) from error
            for key, value in found.items() if isinstance(found, Mapping) else [("", found)]:
                full = f"{prefix}/{name}/{key}" if key else f"{prefix}/{name}"
                values[full] = value.tolist() if isinstance(value, torch.Tensor) else value
        return values


def _failed(name: str, error: Exception, output: Any, target: Any) -> UserError:
    shapes = ", ".join(
        f"{what} {tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else f"{what} of type {type(x).__name__}"
        for what, x in (("output", output), ("target", target))
        if x is not None
    )
    return UserError(
        f"metric {name!r} failed: {type(error).__name__}: {error}",
        why=f"it was given {shapes}" if shapes else "while its value was computed",
        remedy="correct metrics= in the recipe, then run the same command again: training goes on where it was",
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    recipe: Recipe,
    strategy: Strategy,
    feed: Feed,
    split: str,
    seed: int,
    interrupts: Interrupts,
) -> dict[str, Any] | None:
    """Losses and metrics of a model over a feed's whole epoch, named `split/...`; None if a signal came first."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    scores: Scores = Scores(recipe.metrics, strategy.device)
    carry: dict[str, Any] = {}
    try:
        source = enumerate(feed.epoch(0))
        while not interrupts.requested:
            interrupts.waiting = True
            number, (batch, _) = next(source, (0, (_END, False)))
            interrupts.waiting = False
            if batch is _END:
                break
            seed_all(fold(seed, EVALUATION, number))
            with strategy.autocast():
                score_batch(model, recipe, strategy.place(batch), scores, carry)
    except Interrupted:
        return None
    finally:
        interrupts.waiting = False
        for module, mode in modes:
            module.training = mode
    if interrupts.requested:
        return None
    values = scores.compute(split)
    if feed.skipped:
        values[f"{split}/skipped_samples"] = len(feed.skipped)
        feed.skipped.clear()
    return values


def score_batch(model: nn.Module, recipe: Recipe, batch: Any, scores: Scores, carry: dict[str, Any]) -> None:
    """Count one batch in losses and metrics; `carry` holds what each objective's step carries over."""
    rows = num_rows(batch) or 1
    output = target = None
    for name, spec in (recipe.objectives or {}).items():
        prefix = "" if len(recipe.objectives or {}) == 1 else f"{name}/"
        if spec.step is None:
            args, kwargs, target = unpack(batch)
            output = model(*args, **kwargs)
            found = terms(spec.loss(output, target))  # type: ignore[misc]
        else:
            found = terms(spec.step(model, batch, carry.get(name)) if spec.takes_carry else spec.step(model, batch))
        scores.add_loss(prefix + "loss", found, spec.loss, target, rows)
        for key, value in found.logged.items():
            add_result(scores.mean(prefix + key), value, rows)
        carry[name] = found.carry
        output = found.output if found.output is not None else output
        target = found.target if found.target is not None else target
    if recipe.metrics:
        if output is None:
            raise UserError(
                "metrics= needs the model's output, which step() does not return",
                remedy='return {"loss": loss, "output": output, "target": target} from step',
            )
        if target is None and isinstance(batch, list | tuple) and len(batch) == 2:
            target = batch[1]
        scores.update(output, target, rows)
