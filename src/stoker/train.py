"""The only loop: one run, one epoch, one step. What it calls is small: see Record, Strategy and Feed."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from stoker.data.batch import num_rows, split
from stoker.data.feeds import Feed, place_of
from stoker.data.seeding import STEP, fold, seed_all
from stoker.devices.strategy import Strategy
from stoker.errors import UserError, nearest
from stoker.evaluate import evaluate
from stoker.interrupts import Interrupted, Interrupts
from stoker.losses import Mean, Shares, add_result, terms
from stoker.recipe import Recipe, unpack
from stoker.state import Live, Progress, TrainState

_WAIT_SHARE, _WAIT_S = 0.3, 5.0  # of a log window, from which on waiting for data is worth a word
_SKIPPED_NAMED = 8  # samples that could not be read, of which the end of the run tells

Observer = Callable[[Progress, Mapping[str, Any]], None]


class Record(Protocol):
    """Where a run leaves its traces."""

    def log(self, progress: Progress, values: Mapping[str, Any]) -> None:
        """Append values to the events."""

    def save(self, state: TrainState, metrics: Mapping[str, Any], *, interim: bool) -> None:
        """Begin to write a checkpoint of the state as it is now."""

    def copied(self) -> str | None:
        """Wait until the optimizers' state may change; name a weight of the last save that is not finite."""

    @property
    def failed(self) -> bool:
        """Whether a save has failed since it was begun."""

    def settle(self, *, last: bool = False) -> None:
        """Wait for the save that is being written, and say or raise what went wrong with it."""

    def save_is_cheap(self) -> bool:
        """Whether a checkpoint now would cost little beside the time trained since the last one."""


class Nowhere:
    """A record that keeps nothing."""

    def log(self, progress: Progress, values: Mapping[str, Any]) -> None:
        pass

    def save(self, state: TrainState, metrics: Mapping[str, Any], *, interim: bool) -> None:
        pass

    failed = False

    def copied(self) -> str | None:
        return None

    def settle(self, *, last: bool = False) -> None:
        pass

    def save_is_cheap(self) -> bool:
        return False


class NonFinite(Exception):
    """A loss, or the weights, stopped being a number at `step`."""

    def __init__(self, what: str, step: int, epoch: int, batch: int) -> None:
        super().__init__(f"{what} is not finite at step {step}")
        self.what, self.step, self.epoch, self.batch = what, step, epoch, batch


@dataclass
class Limits:
    """When things happen, in steps or epochs."""

    epochs: int | None
    steps: int | None
    eval_every: int | None = None
    checkpoint_every: int | None = None
    log_every: int = 50
    keep_best: int = 1


class Tally(NamedTuple):
    """A value on its way into the log window."""

    name: str
    total: Any
    count: Any
    finite: bool  # whether anything else is an error
    at: tuple[int, int, int]  # step, epoch, batch


@dataclass
class Session:
    """A run in progress: what the loop needs, made by `stoker.start`."""

    recipe: Recipe
    state: TrainState
    model: nn.Module
    strategy: Strategy
    feed: Feed
    val_feed: Feed | None
    seed: int
    microbatch: int | None
    limits: Limits
    record: Record
    interrupts: Interrupts
    observers: Sequence[Observer] = ()
    on_step: Sequence[Observer] = ()
    warn: Callable[[str], None] = print
    metrics: dict[str, Any] = field(default_factory=dict)
    saved_step: int = -1
    deferred: bool = False  # losses are read at the edges only, to let a device run ahead
    last: tuple[int, int, int] = (0, 0, 0)  # step, epoch and batch of the step that was taken last
    between_steps: bool = True  # the state is that of a completed step: whatever fails now, it can be saved
    _pending: list["Tally"] = field(default_factory=list)
    _clock: tuple[float, int] = (0.0, 0)
    _waited_s: float = 0.0  # for data, since the last log line
    _hinted: bool = False

    def tally(self, name: str, total: Any, count: Any = 1, *, finite: bool = True) -> None:
        """Add a value of this step, or a sum over `count`, to the log window.

        Raises:
            NonFinite: it has to be `finite` and is not (where `deferred`, `settle` raises it).
        """
        at = self.state.progress
        entry = Tally(name, total, count, finite, (at.step, at.epoch, at.batch))
        if self.deferred:
            self._pending.append(entry)
        else:
            self._count(entry, float(total), float(count))

    def settle(self) -> None:
        """Read the device's pending values: the one synchronisation of a log window."""
        if self._pending:
            pending, self._pending = self._pending, []
            numbers = [torch.as_tensor(x).detach().float() for entry in pending for x in (entry.total, entry.count)]
            found = torch.stack([x.to(self.strategy.device) for x in numbers]).cpu().tolist()
            for entry, total, count in zip(pending, found[::2], found[1::2], strict=True):
                self._count(entry, total, count)

    def _count(self, entry: "Tally", total: float, count: float) -> None:
        if entry.finite and not math.isfinite(total):
            scaler = self.state.scaler
            if scaler is not None and scaler.get_scale() > 1e-3:
                return  # the scaler skips this step and lowers its scale
            raise NonFinite(entry.name, *entry.at)
        window = self.state.progress
        window.window_sum[entry.name] = window.window_sum.get(entry.name, 0.0) + total
        window.window_count[entry.name] = window.window_count.get(entry.name, 0.0) + count

    def close(self) -> None:
        """Release the data's worker processes."""
        self.feed.close()
        if self.val_feed is not None:
            self.val_feed.close()


def train(s: Session) -> Session:
    """Train until the limits, an early stop or a signal; the run's state is saved at every way out but an error."""
    state, progress = s.state, s.state.progress
    s._clock = (time.perf_counter(), progress.step)
    if progress.step:
        at_edge(s)  # what an interruption left undone: an evaluation, say
    while not progress.finished and not s.interrupts.requested:
        began = progress.step
        try:
            for batch, last in batches(s):
                s.between_steps = False
                seed_all(fold(s.seed, STEP, progress.step))
                for live in state.objectives:
                    if live.needs_closure:  # LBFGS calls forward and backward as often as it likes
                        s.tally(live.log_name, live.optimizer.step(partial(forward_backward, s, live, batch)))
                    else:
                        s.tally(live.log_name, forward_backward(s, live, batch))
                        update(s, live)
                    advance(live)
                finish_step(s, last)
                if is_edge(s, last):
                    at_edge(s)
                if progress.finished or s.interrupts.requested:
                    break
        except Interrupted:
            s.feed.cut(progress.epoch, progress.batch)
        if not s.interrupts.requested:
            refuse_empty(progress, began)
    conclude(s)
    return s


def conclude(s: Session) -> None:
    """See that the state as it is now is written."""
    if s.saved_step != s.state.progress.step:
        save(s, interim=True)
    see_copied(s)
    s.record.settle(last=True)


def batches(s: Session) -> Iterator[tuple[Any, bool]]:
    """Yield what is left of the epoch, noting the time that it is waited for.

    Raises:
        Interrupted: a signal came during the wait.
    """
    source = iter(s.feed.epoch(s.state.progress.epoch, s.state.progress.batch))
    while True:
        began = time.perf_counter()
        try:
            s.interrupts.waiting = True
            fetched = None if s.interrupts.requested else next(source, None)
        finally:
            s.interrupts.waiting = False
        if fetched is None:
            return
        s._waited_s += time.perf_counter() - began
        yield fetched


def refuse_empty(progress: Progress, began: int) -> None:
    """Refuse an epoch without a batch: it would be repeated for ever."""
    if progress.step == began:
        raise UserError(
            f"the training data gave no batch in epoch {progress.epoch} from batch {progress.batch} on",
            remedy="check the sampler or the iterable dataset: has it fewer samples than before?",
        )


def forward_backward(s: Session, live: Live, batch: Any) -> Any:
    """Leave the gradient of an objective on one global batch in its parameters; return its loss (detached)."""
    state, spec = s.state, live.spec
    for parameter in state.parameters:
        parameter.grad = None
    parts = [batch] if s.microbatch is None else split(batch, s.microbatch)
    shares = Shares(batch, len(parts), spec.loss)
    extras: dict[str, Mean] = defaultdict(Mean)
    for part in parts:
        part, target = s.strategy.place(part), None
        with s.strategy.autocast():
            if spec.step is None:
                args, kwargs, target = unpack(part)
                result = spec.loss(s.model(*args, **kwargs), target)  # type: ignore[misc]
            else:
                result = spec.step(s.model, part, live.carry) if live.takes_carry else spec.step(s.model, part)
        found = terms(result)
        loss = shares.contribution(found, part, target)
        (loss if state.scaler is None else state.scaler.scale(loss)).backward()
        live.carried = found.carry
        for name, value in found.logged.items():
            add_result(extras[name], value, num_rows(part) or 1)
    for name, mean in extras.items():
        s.tally(live.prefix + name, *mean.parts(), finite=False)
    if state.scaler is not None:
        state.scaler.unscale_(live.optimizer)
    loss = shares.finish(live.parameters)
    clip(s, live)
    see_copied(s)
    return loss


def clip(s: Session, live: Live) -> None:
    """Bound the gradients as the objective asks, logging the norm that was found."""
    if live.spec.clip_norm is not None:
        norm = nn.utils.clip_grad_norm_(live.parameters, live.spec.clip_norm)
        s.tally(live.prefix + "grad_norm", norm)
    if live.spec.clip_value is not None:
        nn.utils.clip_grad_value_(live.parameters, live.spec.clip_value)


def update(s: Session, live: Live) -> None:
    """Step one optimizer; the loss scaler skips a step whose gradients overflowed."""
    if s.state.scaler is None:
        live.optimizer.step()
    else:
        s.state.scaler.step(live.optimizer)
        live.optimizer._opt_called = True  # type: ignore[attr-defined]  # also if skipped: the schedule goes on


def advance(live: Live) -> None:
    """Hand on what the step carries over, and set the next learning rate."""
    live.carry, live.carried = live.carried, None
    if live.scheduler is not None and not isinstance(live.scheduler, ReduceLROnPlateau):
        live.scheduler.step()


def finish_step(s: Session, last: bool) -> None:
    """Count the step and prepare what the next one carries over."""
    progress, state = s.state.progress, s.state
    if state.scaler is not None:
        before = state.scaler.get_scale()
        state.scaler.update()
        progress.skipped_steps += state.scaler.get_scale() < before
    if state.ema is not None:
        state.average(state.ema)
    if s.feed.skipped:
        count_skipped(s)
    s.last = progress.step, progress.epoch, progress.batch
    progress.step += 1
    progress.batch += 1
    if last:
        progress.epoch, progress.batch = progress.epoch + 1, 0
        for live in state.objectives:
            live.carry = None
    s.between_steps = True
    for function in s.on_step:
        function(progress, s.metrics)


def count_skipped(s: Session) -> None:
    """Count the samples that were left out of the batches so far, saying which the first of the run was."""
    progress, skipped = s.state.progress, s.feed.skipped
    if not progress.skipped_samples:
        s.warn(f"left out {skipped[0]}; further ones are counted")
    progress.skipped_samples += len(skipped)
    progress.skipped_first += [str(sample) for sample in skipped[: _SKIPPED_NAMED - len(progress.skipped_first)]]
    skipped.clear()


def at_limit(s: Session) -> str | None:
    """Name the limit that has been reached."""
    progress, limits = s.state.progress, s.limits
    if limits.steps is not None and progress.step >= limits.steps:
        return "steps"
    if limits.epochs is not None and progress.epoch >= limits.epochs:
        return "epochs"
    return None


def is_edge(s: Session, last: bool) -> bool:
    """Whether anything but training happens after this step."""
    step, limits = s.state.progress.step, s.limits
    return (
        last
        or step % limits.log_every == 0
        or step == limits.steps
        or (limits.eval_every is not None and step % limits.eval_every == 0)
        or (limits.checkpoint_every is not None and step % limits.checkpoint_every == 0)
        or s.interrupts.requested is not None
        or s.record.failed
    )


def at_edge(s: Session) -> None:
    """Log, evaluate, stop early, save: whichever is due at this step and not done yet."""
    progress, limits, limit = s.state.progress, s.limits, at_limit(s)
    ended_epoch = progress.batch == 0
    s.settle()
    every = limits.checkpoint_every
    if s.record.failed or (every is not None and progress.step % every == 0):
        s.record.settle()  # before this step is told of, so that what a kill costs is one interval, not two
    if ended_epoch or limit or progress.step % limits.log_every == 0:
        log_window(s)
    judged = improved = False
    if s.val_feed is not None and progress.evaluated_step != progress.step:
        due = ended_epoch if limits.eval_every is None else progress.step % limits.eval_every == 0
        if due or limit:
            values = evaluate(s.state.evaluated, s.recipe, s.strategy, s.val_feed, "val", s.seed, s.interrupts)
            if values is None:  # a signal came: the evaluation is repeated after the resume
                return
            judged, improved = True, judge(s, values)
    progress.finished = progress.finished or limit
    due = s.record.save_is_cheap() and ended_epoch if every is None else progress.step % every == 0
    if (due or improved or progress.finished) and (judged or s.saved_step != progress.step):
        save(s)


def log_window(s: Session) -> None:
    """Log the means since the last log line, learning rates, speed and memory."""
    progress = s.state.progress
    if not progress.window_count:
        return
    counts = progress.window_count
    values: dict[str, Any] = {name: total / counts[name] for name, total in progress.window_sum.items() if counts[name]}
    for live in s.state.objectives:
        values[live.prefix + "lr"] = live.learning_rate
    if progress.skipped_samples:
        values["train/skipped_samples"] = progress.skipped_samples
    if s.state.scaler is not None:
        values["train/skipped_steps"] = progress.skipped_steps
    progress.window_sum, progress.window_count = {}, {}
    then, step = s._clock
    s._clock = (time.perf_counter(), progress.step)
    if progress.step > step:
        elapsed, waited, s._waited_s = s._clock[0] - then, s._waited_s, 0.0
        values["time/steps_per_s"] = (progress.step - step) / elapsed
        values["time/data_wait_share"] = waited / elapsed
        if waited > max(_WAIT_SHARE * elapsed, _WAIT_S) and not s._hinted:
            s._hinted = True
            s.warn(
                f"{waited / elapsed:.0%} of the time goes into waiting for data: try --workers auto, or stoker doctor"
            )
    values["system/memory_bytes"] = s.strategy.memory_bytes()
    tell(s, values)


def tell(s: Session, values: Mapping[str, Any]) -> None:
    """Hand values to the record and to whoever watches."""
    s.metrics.update(values)
    s.record.log(s.state.progress, values)
    for observer in s.observers:
        observer(s.state.progress, s.metrics)


def judge(s: Session, values: Mapping[str, Any]) -> bool:
    """Log an evaluation and draw its consequences; return whether it is one of the best so far."""
    progress, recipe, stop = s.state.progress, s.recipe, s.recipe.early_stop
    value = scalar(values, recipe.best)  # both before anything is logged: they may not be there
    stop_value = scalar(values, stop.metric) if stop is not None else 0.0
    tell(s, values)
    progress.evaluated_step = progress.step
    for live in s.state.objectives:
        if isinstance(live.scheduler, ReduceLROnPlateau):
            live.scheduler.step(value)
    sign = 1 if recipe.best_mode == "min" else -1
    ranked = sorted([*progress.best, (value, progress.step)], key=lambda entry: (sign * entry[0], entry[1]))
    progress.best = [entry for entry in ranked if not math.isnan(entry[0])][: max(s.limits.keep_best, 1)]
    if stop is not None:
        sign = 1 if stop.mode == "min" else -1
        if progress.stop_best is None or sign * stop_value < sign * progress.stop_best - stop.min_delta:
            progress.stop_best, progress.stop_waited = stop_value, 0
        else:
            progress.stop_waited += 1
            if progress.stop_waited >= stop.patience:
                progress.finished = f"{stop.metric} has not improved for {stop.patience} evaluations"
    return any(step == progress.step for _, step in progress.best)


def scalar(values: Mapping[str, Any], name: str) -> float:
    """Value of an evaluation by name.

    Raises:
        UserError: the evaluation gave no number of that name.
    """
    if not isinstance(values.get(name), int | float):
        raise UserError(
            f"no value {name!r} to judge the run by{nearest(name, list(values))}",
            remedy=f"best= and early_stop= can follow: {', '.join(values)}",
        )
    return float(values[name])


def save(s: Session, *, interim: bool = False) -> None:
    """Begin to write a checkpoint; weights that are not finite, as `see_copied` finds, never replace good ones.

    An interim one, at a stop between two that are due, goes when the next is written: an interrupted run leaves what
    an uninterrupted one leaves.
    """
    s.settle()
    progress = s.state.progress
    for path, leaf in leaves({live.name: live.carry for live in s.state.objectives}, "carry"):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            raise UserError(
                f"{path} still holds the graph of its batch",
                remedy='return {"carry": state.detach()} from step',
            )
    at, finished = (progress.epoch, progress.batch), progress.finished is not None
    s.state.stream = place_of(s.feed, s.interrupts, *at, finished=finished)
    s.record.save(s.state, s.metrics, interim=interim)
    s.saved_step = progress.step


def see_copied(s: Session) -> None:
    """Have all of the last save copied, and its weights looked at, before anything of it changes.

    Raises:
        NonFinite: a weight was not finite after the last step.
    """
    name = s.record.copied()
    if name is not None:
        raise NonFinite(f"parameter {name}", *s.last)


def leaves(tree: Any, path: str) -> list[tuple[str, Any]]:
    """Paths and leaves of nested dicts, lists and tuples."""
    if isinstance(tree, Mapping):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}[{key!r}]")]
    if isinstance(tree, list | tuple):
        return [leaf for i, value in enumerate(tree) for leaf in leaves(value, f"{path}[{i}]")]
    return [(path, tree)]
