"""From a recipe to a run: fit and resume. Everything is put together here once, before the loop."""

import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import nn

from stoker.budget import check_room, checkpoint_bytes
from stoker.checkpoint.architecture import describe_architecture
from stoker.checkpoint.saver import ON_FULL_DISK
from stoker.checkpoint.store import Checkpoint
from stoker.checks import (
    changes_taken,
    check_limits,
    global_batch_size,
    mode_notes,
    refuse_changes,
    refuse_other_classes,
    refuse_split_carry,
    split_notes,
)
from stoker.data.loader import Loader, epoch_batches, open_feed, sample_ids
from stoker.data.seeding import isolated, seed_all_plainly
from stoker.devices.strategy import Strategy
from stoker.errors import UserError
from stoker.interrupts import Interrupts
from stoker.plan import Plan, make_plan, partition_notes
from stoker.probes.labels import explain_labels
from stoker.probes.nonfinite import explain
from stoker.recall import rebuild, recorded_options, require_identity
from stoker.recipe import Recipe
from stoker.rehearse import settle_workers
from stoker.run import Identity, RunDir, fresh_dir, identity_of
from stoker.state import Progress, TrainState
from stoker.train import Limits, NonFinite, Nowhere, Observer, Session, conclude, train
from stoker.watch.console import Console, console_for

_UNFIT = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


class PlanOptions(TypedDict, total=False):
    """Where and how: see `Plan`."""

    device: str | None
    devices: int
    strategy: str
    precision: str
    microbatch: int | None
    workers: int | str | None
    compile: bool


class FitOptions(PlanOptions, total=False):
    """How long, where to, how often: see `fit`."""

    epochs: int | None
    steps: int | None
    seed: int
    out: str | Path | None
    checkpoint_every: int | None
    eval_every: int | None
    log_every: int
    keep: int
    keep_best: int
    quiet: bool
    force: bool
    on_step: Sequence[Observer]
    on_full_disk: str
    grace_s: float | None


@dataclass(frozen=True)
class Run:
    """A run that has ended, for now or for good.

    Attributes:
        dir: its folder.
        model: the trained module (the average of the weights, where the recipe asks for one), in eval mode.
        metrics: the last value of everything that was logged.
        step, epoch: how far it came.
        reason: why it ended: "epochs", "steps", an early stop's reason, or None after a signal.
    """

    dir: Path
    model: nn.Module
    metrics: Mapping[str, Any]
    step: int
    epoch: int
    reason: str | None


def prepare(
    recipe: Recipe,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    checkpoint_every: int | None = None,
    eval_every: int | None = None,
    log_every: int = 50,
    keep: int = 2,
    keep_best: int = 1,
    quiet: bool = False,
    force: bool = False,
    on_step: Sequence[Observer] = (),
    on_full_disk: str = "continue",
    grace_s: float | None = None,
    **plan: Unpack[PlanOptions],
) -> "Started":
    """Everything `fit` does before the loop; its arguments and errors are those of `fit`."""
    if not isinstance(recipe, Recipe):
        hint = "call it: fit(recipe(...), ...)" if callable(recipe) else "fit(stoker.Recipe(...), ...)"
        raise UserError(f"fit takes a Recipe, not a {type(recipe).__name__}", remedy=hint)
    limits = Limits(epochs, steps, eval_every, checkpoint_every, log_every, keep_best)
    options = make_plan(recipe.train, **plan)
    path = Path(out) if out is not None else fresh_dir(recipe.origin.name)
    folder = RunDir(path, keep=keep, keep_best=keep_best, on_full_disk=on_full_disk)
    if grace_s is not None and not grace_s > 0:
        raise UserError(f"a grace of {grace_s:g} s is none", remedy="--grace SECONDS, more than 0")
    if on_full_disk not in ON_FULL_DISK:
        raise UserError(f"on_full_disk={on_full_disk!r}", remedy=f"one of {', '.join(ON_FULL_DISK)}")
    interrupts = Interrupts(grace_s)
    return start(recipe, options, limits, folder, interrupts, seed=seed, quiet=quiet, force=force, on_step=on_step)


def fit(recipe: Recipe, **options: Unpack[FitOptions]) -> Run:
    """Train a recipe; with the `out` of an unfinished run, go on with that run.

    Args:
        recipe: what to train.
        options: any of
            epochs, steps: how long; at least one of them.
            seed: of the model's initialisation, the order of samples and all randomness after that (default 0).
            out: the run's folder (default: a new one, `runs/RECIPE/NAME`).
            checkpoint_every: steps from one checkpoint to the next. By default an epoch's end is saved where that
                costs less than 2 % of the time since the last save; the last step and every best evaluation always.
            eval_every: steps from one evaluation to the next (default: at the end of every epoch).
            log_every: steps that one `train/loss` event averages over (default 50).
            keep, keep_best: how many of the newest and of the best checkpoints stay (defaults 2 and 1).
            quiet: no progress, no summary.
            force: in a folder whose run began with another source, arguments or seed, go on with these.
            on_full_disk: "continue" trains on without the checkpoint that a full disk has no room for, "wait" pauses
                until there is room, "stop" ends the run (default "continue").
            grace_s: seconds after a signal in which the process ends, whatever it is doing (default: as long as the
                step and its save take).
            on_step: functions called after every step with (progress, last logged values).
            device, devices, strategy, precision, microbatch, workers, compile: see `Plan`.

    Returns:
        the run, its model and its metrics.

    Raises:
        UserError: anything the caller can mend; nothing saved before is lost.
    """
    with isolated(), prepare(recipe, **options) as started:
        if started.session is not None:
            train(started.session)
    return started.result()


def resume(run: str | Path, recipe: Recipe | None = None, **changes: Unpack[FitOptions]) -> Run:
    """Go on with an unfinished run, with its own recipe, arguments, seed and limits.

    Args:
        run: the run's folder.
        recipe: the recipe, where the run's own cannot be called again (one made in a notebook, say).
        changes: any other option of `fit`, in place of what the run began with.

    Raises:
        UserError: there is no run, or its recipe has changed since (`force=True` goes on with the new one).
    """
    folder = RunDir(Path(run))
    identity = require_identity(folder)
    recipe = recipe or rebuild(folder, identity, force=changes.get("force", False))
    return fit(recipe, **{**recorded_options(identity), "out": folder.path, **changes})


def total_steps(recipe: Recipe, limits: Limits, seed: int) -> int | None:
    """Steps of the whole run, where they can be told beforehand."""
    if limits.epochs is None:
        return limits.steps
    counts = [epoch_batches(recipe.train, seed, 0)] * limits.epochs
    if isinstance(recipe.train, Loader) and recipe.train.varies:
        counts = [epoch_batches(recipe.train, seed, epoch) for epoch in range(limits.epochs)]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return limits.steps
    return min(sum(known), limits.steps) if limits.steps is not None else sum(known)


class Started:
    """A session with its folder and its console; a context that closes them and tells how it went."""

    def __init__(self, folder: RunDir, console: Console, plan: Plan, state: TrainState, interrupts: Interrupts) -> None:
        self.folder, self.console, self.plan, self.state = folder, console, plan, state
        self.interrupts = interrupts
        interrupts.last_words = console.stop
        folder.saver.warn = console.note
        folder.saver.interrupted = lambda: interrupts.requested is not None
        self.session: Session | None = None
        self.metrics: dict[str, Any] = {}
        self.taken_step = -1  # of the checkpoint that was taken over

    def open(
        self,
        recipe: Recipe,
        strategy: Strategy,
        limits: Limits,
        seed: int,
        saved_step: int,
        on_step: Sequence[Observer],
        force: bool,
    ) -> None:
        """Open the data and make the session that the loop works on."""
        size = global_batch_size(recipe)
        val_size = (recipe.val.batch_size if isinstance(recipe.val, Loader) else None) or size or 64
        workers = self.plan.workers
        train_feed, val = open_feed(recipe.train, seed, batch_size=size, workers=workers), None
        train_feed.restore(self.state.stream, force=force)
        if recipe.val is not None:
            val = open_feed(recipe.val, seed, batch_size=val_size, workers=workers, evaluation=True)
        self.session = Session(
            recipe=recipe,
            state=self.state,
            model=strategy.prepare(self.state.model),
            strategy=strategy,
            feed=strategy.ahead(train_feed),
            val_feed=strategy.ahead(val) if val is not None else None,
            seed=seed,
            microbatch=self.plan.microbatch,
            limits=limits,
            record=self.folder,
            interrupts=self.interrupts,
            observers=[self.console.observe],
            on_step=on_step,
            warn=self.console.note,
            metrics=self.metrics,
            saved_step=saved_step,
            deferred=strategy.device.type != "cpu",
        )
        self.console.begin(self.folder.path, self.state, limits, epoch_batches(recipe.train, seed, 0), self.plan)

    def __enter__(self) -> "Started":
        if self.session is not None:
            self.session.interrupts.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        progress = self.state.progress
        try:  # a scheduler's signal is still minded while data workers leave and a save is seen through
            self._close(error)
        finally:
            if self.session is not None:
                self.interrupts.__exit__(kind, error, trace)
        if error is None:
            self.console.end(self.folder.path, progress, self.metrics, self.interrupts.requested)
        if isinstance(error, _UNFIT) and self.session is not None and self._is_first(error):
            raise UserError(
                f"the optimizer cannot go on from the checkpoint of step {progress.step}: {error!r}",
                why="what the checkpoint has of the optimizer, or of its schedule, does not fit",
                remedy=f"move that checkpoint out of {self.folder.store.folder}: the run goes on from the one before",
            ) from error
        if isinstance(error, NonFinite) and self.session is not None:
            raise self._explained(self.session, error) from error
        if isinstance(error, IndexError | RuntimeError) and self.session is not None:
            explanation = explain_labels(self.session)
            if explanation is not None:
                raise explanation from error

    def _close(self, error: BaseException | None) -> None:
        progress = self.state.progress
        if self.session is not None:
            if isinstance(error, Exception) and not isinstance(error, NonFinite):
                self._rescue(self.session, error)
            self.session.close()
            if isinstance(error, Exception) and not isinstance(error, UserError | NonFinite):
                ids = sample_ids(self.session.recipe.train, self.session.seed, progress.epoch, progress.batch)
                samples = f", samples {', '.join(map(str, ids[:16]))}" if ids else ""
                error.add_note(f"in step {progress.step + 1} (epoch {progress.epoch}, batch {progress.batch}{samples})")
        self.console.stop()
        if error is not None:
            self._see_through()
        self.folder.close()

    def _is_first(self, error: BaseException) -> bool:
        """Whether torch's optimizer, or schedule, failed in the first step after a resume."""
        inner = traceback.extract_tb(error.__traceback__)[-1].filename
        return 0 < self.state.progress.step == self.taken_step and f"{os.sep}torch{os.sep}optim{os.sep}" in inner

    def _rescue(self, s: Session, error: Exception) -> None:
        """Save what was trained before data, a metric or a function of the user's failed between two steps."""
        step = s.state.progress.step
        if not s.between_steps or step in (0, s.saved_step):
            return
        try:
            conclude(s)
            self.console.note(f"saved at step {step}, before the error")
        except (UserError, NonFinite) as second:
            error.add_note(f"nor could step {step} be saved: {second}")

    def _see_through(self) -> None:
        """Let a save finish that was being written when something else failed."""
        try:
            name = self.folder.copied()
            if name is not None:
                self.console.note(f"parameter {name} was not finite before that, so the last save was not written")
            self.folder.settle(last=True)
        except UserError as second:
            self.console.note(str(second))

    def _explained(self, s: Session, error: NonFinite) -> UserError:
        """Find the culprit; where it was noticed late, by running the steps since the last checkpoint again.

        A run is a pure function of its recipe, arguments and seed: the second time, each step's loss is looked at
        before its update.
        """
        checkpoint, _ = self.folder.store.newest_good()
        lost = checkpoint is None and isinstance(s.recipe.model, nn.Module)  # its first weights are overwritten
        if not s.deferred or lost:
            return explain(s, error)
        state = build_state(s.recipe, s.strategy, s.limits, s.seed)
        if checkpoint is not None:
            state.load(checkpoint.model, checkpoint.ema, checkpoint.state)
        again = replace(
            s,
            state=state,
            model=s.strategy.prepare(state.model),
            val_feed=None,
            limits=Limits(None, error.step + 1, log_every=error.step + 2),
            record=Nowhere(),
            observers=(),
            on_step=(),
            deferred=False,
        )
        try:
            train(again)
        except NonFinite as found:
            return explain(again, found)
        finally:
            again.close()
        return explain(s, error)

    @property
    def exit_code(self) -> int:
        """What the process ends with: 0, or where a scheduler stopped an unfinished run, what asks for more."""
        stopped = self.interrupts.requested in ("SIGTERM", "SIGUSR1") and not self.state.progress.finished
        return self.interrupts.exit_code if stopped else 0

    def result(self) -> Run:
        """What `fit` returns."""
        progress = self.state.progress
        model = self.state.evaluated.eval()
        return Run(self.folder.path, model, self.metrics, progress.step, progress.epoch, progress.finished)


def start(
    recipe: Recipe,
    plan: Plan,
    limits: Limits,
    folder: RunDir,
    interrupts: Interrupts,
    *,
    seed: int,
    quiet: bool = False,
    force: bool = False,
    on_step: Sequence[Observer] = (),
) -> Started:
    """Check everything that can be checked, build the state, and take over a checkpoint if the folder has one."""
    check_limits(recipe, limits)
    refuse_other_classes(recipe)
    identity = identify(recipe, plan, limits, folder, interrupts, seed)
    folder.hold()
    try:
        before, notes = folder.read_identity(), plan.notes
        changes = refuse_changes(folder, identity, before, force, recipe) if before is not None else ()
        strategy = plan.open()
        state = build_state(recipe, strategy, limits, seed)
        refuse_split_carry(recipe, plan)
        notes += changes_taken(folder, changes, state.model) + split_notes(recipe) + mode_notes(state.model)
        plan = replace(plan, notes=notes + partition_notes(state.model, plan, global_batch_size(recipe)))
        started = Started(folder, console_for(quiet), plan, state, interrupts)
        checkpoint = take_over(started, limits)
        if not state.progress.finished:
            started.plan = plan = settle_workers(plan, recipe, state.model, strategy, seed)
            folder.write_identity(identity, plan, describe_architecture(state.model))
            room = checkpoint_bytes(state)
            for note in check_room(folder.store, room, resumed=checkpoint is not None):
                started.console.note(note)
            folder.saver.reserve(room, pinned=strategy.device.type != "cpu")
            folder.open_events(checkpoint.state["events_bytes"] if checkpoint is not None else 0)
            started.taken_step = checkpoint.step if checkpoint is not None else -1
            started.open(
                recipe, strategy, limits, seed, checkpoint.step if checkpoint is not None else -1, on_step, force
            )
        return started
    except BaseException:
        folder.close()
        raise


def identify(recipe: Recipe, plan: Plan, limits: Limits, folder: RunDir, interrupts: Interrupts, seed: int) -> Identity:
    """Identity of a run, with the options that `stoker resume` takes over."""
    return identity_of(
        recipe.origin,
        seed=seed,
        precision=plan.precision,
        epochs=limits.epochs,
        steps=limits.steps,
        eval_every=limits.eval_every,
        length_matters=recipe.length_matters,
        options={
            "checkpoint_every": limits.checkpoint_every,
            "log_every": limits.log_every,
            "keep": folder.store.keep,
            "keep_best": limits.keep_best,
            "microbatch": plan.microbatch,
            "workers": "auto" if plan.measure_workers else plan.workers,
            "compile": plan.compile,
            "on_full_disk": folder.saver.on_full_disk,
            "grace_s": interrupts.grace_s,
        },
    )


def take_over(started: Started, limits: Limits) -> Checkpoint | None:
    """Load the newest checkpoint that verifies, saying which newer ones did not."""
    store, checkpoint, complaints, notes = started.folder.store, None, list[str](), list[str]()
    for found in store.good(complaints):
        try:
            notes = started.state.load(found.model, found.ema, found.state)
            if (started.state.progress.step, type(found.state["events_bytes"])) != (found.step, int):
                raise ValueError(f"its progress is at step {started.state.progress.step}")
            checkpoint = found
            break
        except _UNFIT as error:  # its checksums are right and its content is not
            complaints.append(f"{found.path.name} does not hold the state of a run: {error!r}")
    if complaints and checkpoint is None:
        raise UserError(
            "no checkpoint of the run is good",
            why="\n          ".join(complaints),
            remedy=f"mend them, or begin anew: another --out, or move {store.folder} away (it is left as it is)",
        )
    for note in [*(f"skipped a damaged checkpoint: {complaint}" for complaint in complaints), *notes]:
        started.console.note(note)
    if checkpoint is not None:
        started.metrics = dict(checkpoint.metrics)
        progress = started.state.progress
        if progress.finished in ("epochs", "steps") and beyond(progress, limits):
            progress.finished = None
    return checkpoint


def build_state(recipe: Recipe, strategy: Strategy, limits: Limits, seed: int) -> TrainState:
    """Model, optimizers and schedules as they are before the first step."""
    seed_all_plainly(seed)
    model = recipe.build_model().to(strategy.device)
    recipe.place_losses(strategy.device)
    if not model.training:  # as from_pretrained() returns it; in a model in train mode, frozen parts stay in eval
        model.train()
    length = total_steps(recipe, limits, seed) if recipe.length_matters else None
    return TrainState(recipe, model, total_steps=length, scaler=strategy.scaler())


def beyond(progress: Progress, limits: Limits) -> bool:
    """Whether the limits asked for reach further than the progress made."""
    more_epochs = limits.epochs is None or progress.epoch < limits.epochs
    more_steps = limits.steps is None or progress.step < limits.steps
    return more_epochs and more_steps
