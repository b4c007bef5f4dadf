"""Losses as sums and counts, so that a gradient does not depend on how its batch was split."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

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


def exact(number: Any) -> Any:
    """Return a tensor in float64, where its device has it; the gradient comes back in the tensor's own type."""
    return number.double() if isinstance(number, torch.Tensor) and number.device.type != "mps" else number


def effective_count(loss: Any, target: Any, rows: int) -> tuple[str, Any]:
    """How torch's own losses reduce: ("sum", 1), or ("mean", the number, or weight, of what they averaged over)."""
    if getattr(loss, "reduction", "mean") == "sum":
        return "sum", 1
    counts_targets = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or loss in (F.cross_entropy, F.nll_loss)
    if counts_targets and isinstance(target, torch.Tensor) and not target.is_floating_point():
        valid = target != getattr(loss, "ignore_index", -100)
        if getattr(loss, "weight", None) is not None:
            return "mean", exact(loss.weight[target[valid]]).sum()
        return "mean", valid.sum()
    return "mean", rows


class Mean:
    """Sum and count on the values' own device; one synchronisation, when it is read."""

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._count: Any = 0.0

    def add(self, total: Any, count: Any) -> None:
        """Add a sum over `count` samples."""
        self._sum = self._sum + exact(total.detach() if isinstance(total, torch.Tensor) else total)
        self._count = self._count + exact(count)

    def parts(self) -> tuple[Any, Any]:
        """Return sum and count, on their device."""
        return self._sum, self._count

    def value(self) -> float:
        """Return the mean; nan where nothing was counted."""
        count = float(self._count)
        return float(self._sum) / count if count else float("nan")


def add_result(mean: Mean, result: Any, rows: int) -> None:
    """Add what a metric function returned: a value per sample, (sum, count), or a mean over the batch."""
    if isinstance(result, tuple):
        mean.add(*result)
    elif isinstance(result, torch.Tensor) and result.dim():
        mean.add(result.double().sum(), result.numel())
    else:
        mean.add(result * rows, rows)


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
        self._of_means = False
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
                self._of_means = True
            else:
                count = None
        if count is not None and self._num_parts == 1:
            loss = loss / _nonzero(count)
        elif count is not None:
            count = exact(count)
            if self._norm is None:
                self._norm = _at_least_one(count) * self._num_parts
            self._total = self._total + count
            loss = exact(loss) / self._norm
        self.value = loss.detach() if self._num_parts == 1 else self.value + loss.detach()
        return loss

    def finish(self, parameters: list[torch.Tensor]) -> Any:
        """Return the batch's loss (detached), its gradients divided by the true count."""
        if self._norm is not None:
            # A whole batch's mean over nothing is nan in torch: parts of it must not hide that.
            correction = self._norm / (self._total if self._of_means else _nonzero(self._total))
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(correction)
            self.value = self.value * correction
        return self.value


def _nonzero(count: Any) -> Any:
    """Return the count, or 1 where nothing was counted: the sum is 0 then, and so is the loss."""
    return torch.where(count == 0, 1, count) if isinstance(count, torch.Tensor) else count or 1


def _at_least_one(count: Any) -> Any:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
