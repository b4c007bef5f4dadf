"""Losses as sums and counts, so that a gradient does not depend on how its batch was split."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from stoker.data.batch import num_rows
from stoker.errors import UserError


class Terms(NamedTuple):
    """What a loss or a step returned for one (micro)batch."""

    loss: torch.Tensor  # scalar: a sum where there is a count, else a mean
    count: Any = None  # number or scalar tensor
    output: Any = None
    target: Any = None
    carry: Any = None
    logged: Mapping[str, Any] = {}


_RESERVED = ("loss", "output", "target", "carry")


def terms(result: Any) -> Terms:
    """Normalise: loss | (sum, count) | dict with "loss".

    Raises:
        UserError: something else was returned.
    """
    if isinstance(result, torch.Tensor):
        if result.dim() == 0:
            return Terms(result)
        return Terms(result.sum(), result.numel())
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], torch.Tensor):
        return Terms(*result)
    if isinstance(result, Mapping) and "loss" in result:
        inner = terms(result["loss"])
        logged = {key: value for key, value in result.items() if key not in _RESERVED}
        return Terms(inner.loss, inner.count, result.get("output"), result.get("target"), result.get("carry"), logged)
    raise UserError(
        f"the loss is a {type(result).__name__}",
        remedy='return a scalar tensor (a mean), one value per sample, (sum, count), or a dict with "loss"',
    )


def effective_count(loss: Any, target: Any, rows: int) -> tuple[str, Any]:
    """How torch's own losses reduce: ("sum", 1), or ("mean", the number, or weight, of what they averaged over)."""
    if getattr(loss, "reduction", "mean") == "sum":
        return "sum", 1
    if (
        isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)
        and isinstance(target, torch.Tensor)
        and not target.is_floating_point()
    ):
        valid = target != loss.ignore_index
        if loss.weight is not None and getattr(loss, "label_smoothing", 0.0) == 0.0:
            return "mean", loss.weight[target[valid]].sum()
        return "mean", valid.sum()
    return "mean", rows


def as_mean(value: Any) -> Any:
    """Scalar to log for a number, a scalar tensor, one value per sample, or (sum, count)."""
    if isinstance(value, tuple):
        return value[0] / value[1]
    return value.double().mean() if isinstance(value, torch.Tensor) and value.dim() else value


class Shares:
    """Turns the losses of a batch's parts into contributions that add up to the loss of the whole batch.

    Known counts (samples) divide at once. Counts that the losses themselves tell are complete only after the last
    part; until then an estimate keeps the numbers in range, and `finish` puts the gradients right.
    """

    def __init__(self, batch: Any, num_parts: int, loss: Any) -> None:
        self._rows = num_rows(batch) if num_parts > 1 else None
        self._num_parts, self._loss = num_parts, loss
        self._norm: Any = None
        self._total: Any = 0
        self.value: Any = 0.0

    def contribution(self, found: Terms, part: Any, target: Any) -> torch.Tensor:
        """Scalar to differentiate for one part."""
        loss, count = found.loss, found.count
        if self._num_parts > 1 and count is None:
            rows = num_rows(part) or 1
            reduction, count = effective_count(self._loss, target, rows)
            if reduction == "mean" and isinstance(count, int):
                loss, count = loss * (rows / (self._rows or 1)), None
            elif reduction == "mean":
                loss = torch.where(count > 0, loss, 0.0) * count  # a mean over nothing is nan: it counts nothing
            else:
                count = None
        if count is not None:
            if self._norm is None:
                self._norm = _at_least_one(count) * self._num_parts if self._num_parts > 1 else _nonzero(count)
            self._total = self._total + count
            loss = loss / self._norm
        self.value = loss.detach() if self._num_parts == 1 else self.value + loss.detach()
        return loss

    def finish(self, parameters: list[torch.Tensor]) -> Any:
        """Return the batch's loss (detached), its gradients divided by the true count."""
        if self._num_parts > 1 and self._norm is not None:
            correction = self._norm / _nonzero(self._total)
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], correction)
            self.value = self.value * correction
        return self.value


def _nonzero(count: Any) -> Any:
    """Return the count, or 1 where nothing was counted: the sum is 0 then, and so is the loss."""
    return torch.where(count == 0, 1, count) if isinstance(count, torch.Tensor) else count or 1


def _at_least_one(count: Any) -> Any:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
