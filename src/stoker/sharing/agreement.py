"""Two finished runs, one beside the other: do they agree, and where do they part?"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from stoker.checkpoint.store import Damaged, read
from stoker.errors import UserError
from stoker.run import RunDir, read_events

_FLOOR = 1e-6  # smaller values count as this one: the relative difference of two that are nearly 0 says nothing
_ABSENT = "(not logged)"

Verdict = Literal["bits", "metrics", "differs"]


@dataclass(frozen=True)
class Difference:
    """A logged value that is not the same."""

    step: int
    name: str
    then: Any
    now: Any
    relative: float  # inf where one of them is absent, or no number

    def __str__(self) -> str:
        apart = f" (relative {self.relative:.2g})" if math.isfinite(self.relative) else ""
        return f"{self.name} at step {self.step}: {_short(self.then)} then, {_short(self.now)} now{apart}"


@dataclass(frozen=True)
class Agreement:
    """What two runs left behind, one beside the other.

    Attributes:
        tensors: number of tensors of weights, averages included.
        weights: largest absolute difference of every tensor that is not the same to the bit, by name (inf: its shape
            or type is another one, or only one of the runs has it).
        events: number of logged values that the first run has, clock and machine apart.
        first: the first value that differs.
        largest: the value that differs most.
        final: the last value of a name that differs most.
        unmatched: values that only one of the runs logged.
    """

    tensors: int
    weights: Mapping[str, float]
    events: int
    first: Difference | None
    largest: Difference | None
    final: Difference | None
    unmatched: int

    def verdict(self, tolerance: float) -> Verdict:
        """The runs agree to the bit, or as far as their metrics tell, or they do not."""
        if not self.weights and self.first is None:
            return "bits"
        if not self.weights:  # the log of a run that was extended has the mark of its first end: the last values count
            return "metrics" if self.final is None or self.final.relative <= tolerance else "differs"
        agree = not self.unmatched and (self.largest is None or self.largest.relative <= tolerance)
        return "metrics" if agree and all(map(math.isfinite, self.weights.values())) else "differs"


def agreement(then: Path, now: Path) -> Agreement:
    """Hold the weights and the events of two finished runs against each other.

    Raises:
        UserError: one of them is damaged.
    """
    weights, tensors = _compare_weights(then, now)
    old, new = _values(then), _values(now)
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        step, _, name, _ = key
        a, b = old.get(key, _ABSENT), new.get(key, _ABSENT)
        relative = 0.0 if a == b else relative_difference(a, b)
        if a != b:
            found.append(Difference(step, name, a, b, relative))
    found.sort(key=lambda difference: difference.step)  # stable: the order of the log within a step
    both = [d for d in found if _ABSENT not in (d.then, d.now)]
    last_old, last_new = ({name: (step, v) for (step, _, name, _), v in x.items()} for x in (old, new))
    final = []
    for name in {**last_old, **last_new}:
        (step, a), (_, b) = (last.get(name, (0, _ABSENT)) for last in (last_old, last_new))
        final += [Difference(step, name, a, b, relative_difference(a, b))] if a != b else []
    return Agreement(
        tensors=tensors,
        weights=weights,
        events=len(old),
        first=found[0] if found else None,
        largest=max(both, key=lambda d: d.relative, default=None),
        final=max(final, key=lambda d: d.relative, default=None),
        unmatched=len(found) - len(both),
    )


def _values(run: Path) -> dict[tuple[int, int, str, int], Any]:
    """Logged values that do not depend on the clock or the machine, by step, epoch, name and occurrence."""
    values: dict[tuple[int, int, str, int], Any] = {}
    times: Counter[tuple[int, int, str]] = Counter()
    try:
        for event in read_events(run / "events.jsonl"):
            step, epoch, name = int(event["step"]), int(event["epoch"]), str(event["name"])
            if not name.startswith(("time/", "system/")):
                place = step, epoch, name
                values[*place, times[place]] = event["value"]
                times[place] += 1
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{run}/events.jsonl cannot be read: {error!r}", why="it was damaged") from None
    return values


def relative_difference(a: Any, b: Any) -> float:
    """Difference of two logged values, relative to the larger; inf where they are not both finite numbers."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max((relative_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if a == b:
        return 0.0
    try:
        a, b = float(a), float(b)
    except (TypeError, ValueError, OverflowError):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), _FLOOR) if math.isfinite(a) and math.isfinite(b) else math.inf


def _compare_weights(then: Path, now: Path) -> tuple[dict[str, float], int]:
    tensors = [_weights(then), _weights(now)]
    names = sorted({*tensors[0], *tensors[1]})
    apart = {}
    for name in names:
        a, b = tensors[0].get(name), tensors[1].get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            apart[name] = math.inf
        elif not torch.equal(_bytes(a), _bytes(b)):
            difference = (a.to(_wide(a)) - b.to(_wide(b))).abs().max().item()
            apart[name] = difference if math.isfinite(difference) else math.inf
    return apart, len(names)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    latest = RunDir(run).store.latest()
    assert latest is not None  # of a finished run
    try:
        checkpoint = read(latest)
    except Damaged as error:
        raise UserError(f"{run}: a damaged checkpoint: {error}", remedy="pack or train the run again") from None
    averages = {f"{name} (average)": tensor for name, tensor in (checkpoint.ema or {}).items()}
    return {**checkpoint.model, **averages}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _short(value: Any) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def weights_in_words(found: Agreement) -> str:
    """Which tensors differ, by how much."""
    if not found.weights:
        return f"{found.tensors} tensors agree to the bit"
    worst = sorted(found.weights.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} by {apart:.2g}" for name, apart in worst[:3])
    more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
    return f"{len(worst)} of {found.tensors} tensors differ: {named}{more}"
