"""Plan: where and how a run happens. It changes cost, not results (precision apart, which belongs to the identity)."""

from dataclasses import dataclass
from typing import Any

import torch

from stoker.data.loader import Loader
from stoker.devices.strategy import PRECISIONS, Single, Strategy, find_device
from stoker.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Device, precision and partition of a run.

    Attributes:
        device: name of the device.
        devices: number of devices.
        strategy: "single".
        precision: "fp32", "bf16" or "fp16" (autocast; fp16 with a loss scaler).
        microbatch: samples per forward pass, None for the whole batch. Gradients accumulate as sums over counts.
        workers: processes that read samples; 0 reads in this process.
        measure_workers: whether their number is chosen by measuring, before the first step.
        compile: whether the model's forward is compiled.
        notes: what the reader of the plan should know.
    """

    device: str
    devices: int = 1
    strategy: str = "single"
    precision: str = "fp32"
    microbatch: int | None = None
    workers: int = 0
    measure_workers: bool = False
    compile: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the terminal."""
        words = [f"{self.devices} x {self.device}", self.precision]
        words += [f"microbatch {self.microbatch}"] if self.microbatch else []
        words += [f"{self.workers} workers"] if self.workers else []
        words += ["compiled"] if self.compile else []
        return ", ".join(words)

    def open(self) -> Strategy:
        """Return the strategy that carries the plan out."""
        return Single(torch.device(self.device), self.precision, self.compile)


def make_plan(
    train: Any,
    *,
    device: str | None = None,
    devices: int = 1,
    strategy: str = "single",
    precision: str = "fp32",
    microbatch: int | None = None,
    workers: int | str | None = None,
    compile: bool = False,
) -> Plan:
    """Complete a plan for the data `train`.

    Raises:
        UserError: an option that this machine or this version cannot honour.
    """
    if strategy != "single" or devices != 1:
        raise UserError(
            f"strategy {strategy!r} on {devices} devices is not available",
            why="this version trains on one device",
            remedy="leave out --strategy and --devices",
        )
    if precision not in PRECISIONS:
        raise UserError(f"no precision {precision!r}", remedy=f"--precision {', '.join(PRECISIONS)}")
    if microbatch is not None and microbatch < 1:
        raise UserError(f"microbatch must be at least 1, got {microbatch}")
    count, notes = workers_for(train, workers)
    if compile:
        notes.append("compiled kernels agree with eager ones to rounding, not to the bit")
    return Plan(
        str(find_device(device)),
        precision=precision,
        microbatch=microbatch,
        workers=count or 0,
        measure_workers=count is None,
        compile=compile,
        notes=tuple(notes),
    )


def workers_for(train: Any, asked: int | str | None) -> tuple[int | None, list[str]]:
    """Number of workers that the data have use for, and what there is to say; None: it has to be measured."""
    try:
        number = None if asked == "auto" else int(asked or 0)
    except ValueError:
        raise UserError(f"workers={asked!r}", remedy="--workers N or --workers auto") from None
    if number is not None and number < 0:
        raise UserError(f"workers must not be negative, got {number}")
    if number == 0 or not isinstance(train, Loader):
        return 0, []
    if train.columns is not None:
        return 0, ["workers 0: the data are tensors in memory, fetched a batch at a time"]
    if train.iterable and (number is None or number > train.lanes):
        lanes = f"{train.lanes} lanes of a stream" if train.lanes > 1 else "a stream"
        more = "" if train.lanes > 1 else "; data in shards can be read by more: Loader(lanes=N)"
        return train.lanes, [f"workers {train.lanes}: {lanes} in the background{more}"]
    return number, []


def partition_notes(model: torch.nn.Module, plan: Plan, batch_size: int | None) -> tuple[str, ...]:
    """What a microbatch smaller than the batch changes in this model, layer kinds named."""
    if plan.microbatch is None or batch_size is None or plan.microbatch >= batch_size:
        return ()
    kinds = {type(module).__name__ for module in model.modules() if module.training}
    norms = sorted(k for k in kinds if "BatchNorm" in k)
    drops = sorted(k for k in kinds if "Drop" in k)
    notes = []
    if norms:
        notes.append(f"{', '.join(norms)} sees {plan.microbatch} samples at a time instead of {batch_size}")
    if drops:
        notes.append(f"{', '.join(drops)} draws other masks than without --microbatch (from the same distribution)")
    return tuple(notes)
