"""From a recipe to a run: fit and resume. Everything is put together here once, before the loop."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import nn

from stoker.checkpoint.store import Checkpoint
from stoker.checks import (
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
from stoker.recipe import Recipe
from stoker.rehearse import settle_workers
from stoker.run import Identity, RunDir, fresh_dir, identity_of
from stoker.source import load_source
from stoker.state import Progress, TrainState
from stoker.train import Limits, NonFinite, Nowhere, Observer, Session, save, train
from stoker.watch.console import Console, console_for


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
    **plan: Unpack[PlanOptions],
) -> "Started":
    """Everything `fit` does before the loop; its arguments and errors are those of `fit`."""
    if not isinstance(recipe, Recipe):
        hint = "call it: fit(recipe(...), ...)" if callable(recipe) else "fit(stoker.Recipe(...), ...)"
        raise UserError(f"fit takes a Recipe, not a {type(recipe).__name__}", remedy=hint)
    limits = Limits(epochs, steps, eval_every, checkpoint_every, log_every, keep_best)
    options = make_plan(recipe.train, **plan)
    return start(recipe, options, limits, seed=seed, out=out, keep=keep, quiet=quiet, force=force, on_step=on_step)


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
    return fit(recipe or rebuild(folder, identity), **{**recorded_options(identity), "out": folder.path, **changes})


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


def rebuild(folder: RunDir, identity: Identity) -> Recipe:
    """Call the run's recipe again: its file, or where that is gone, the source that the run keeps.

    Raises:
        UserError: the recipe was not made by a function in a file.
    """
    if identity.function is None:
        raise UserError(
            f"{folder.path}: its recipe cannot be called again from the run alone",
            why="it was not returned by a function at the top level of a file, called with the recorded arguments",
            remedy="stoker.resume(run, recipe) or stoker.load(run, recipe) with the same recipe",
        )
    if identity.file is not None and Path(identity.file).is_file():
        source = load_source(f"{identity.file}:{identity.function}")
        return source.recipe(source.recall(identity.arguments), identity.seed)
    sys.path.insert(0, str(folder.path / "source"))  # what the recipe imported from its own folder
    source = load_source(f"{folder.path / 'recipe.py'}:{identity.function}")
    recipe = source.recipe(source.recall(identity.arguments), identity.seed)
    where = Path(identity.file) if identity.file is not None else None
    recipe.origin = replace(recipe.origin, file=where, modules=identity.modules)
    return recipe


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

    def __init__(self, folder: RunDir, console: Console, plan: Plan, state: TrainState) -> None:
        self.folder, self.console, self.plan, self.state = folder, console, plan, state
        self.session: Session | None = None
        self.metrics: dict[str, Any] = {}

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
            interrupts=Interrupts(),
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
        if self.session is not None:
            self.session.interrupts.__exit__(kind, error, trace)
            if isinstance(error, Exception) and not isinstance(error, NonFinite):
                self._rescue(self.session, error)
            self.session.close()
            if isinstance(error, Exception) and not isinstance(error, UserError | NonFinite):
                ids = sample_ids(self.session.recipe.train, self.session.seed, progress.epoch, progress.batch)
                samples = f", samples {', '.join(map(str, ids[:16]))}" if ids else ""
                error.add_note(f"in step {progress.step + 1} (epoch {progress.epoch}, batch {progress.batch}{samples})")
        self.console.stop()
        self.folder.close()
        if error is None:
            signal = self.session.interrupts.requested if self.session else None
            self.console.end(self.folder.path, self.state.progress, self.metrics, signal)
        if isinstance(error, NonFinite) and self.session is not None:
            raise self._explained(self.session, error) from error
        if isinstance(error, IndexError | RuntimeError) and self.session is not None:
            explanation = explain_labels(self.session)
            if explanation is not None:
                raise explanation from error

    def _rescue(self, s: Session, error: Exception) -> None:
        """Save what was trained before data, a metric or a function of the user's failed between two steps."""
        step = s.state.progress.step
        if not s.between_steps or step in (0, s.saved_step):
            return
        try:
            save(s, interim=True)
            self.console.note(f"saved at step {step}, before the error")
        except (UserError, NonFinite) as second:
            error.add_note(f"nor could step {step} be saved: {second}")

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

    def result(self) -> Run:
        """What `fit` returns."""
        progress = self.state.progress
        model = self.state.evaluated.eval()
        return Run(self.folder.path, model, self.metrics, progress.step, progress.epoch, progress.finished)


def start(
    recipe: Recipe,
    plan: Plan,
    limits: Limits,
    *,
    seed: int,
    out: str | Path | None,
    keep: int = 2,
    quiet: bool = False,
    force: bool = False,
    on_step: Sequence[Observer] = (),
) -> Started:
    """Check everything that can be checked, build the state, and take over a checkpoint if the folder has one."""
    check_limits(recipe, limits)
    refuse_other_classes(recipe)
    path = Path(out) if out is not None else fresh_dir(recipe.origin.name)
    folder = RunDir(path, keep=keep, keep_best=limits.keep_best)
    identity = identify(recipe, plan, limits, seed, keep)
    folder.hold()
    try:
        before = folder.read_identity()
        if before is not None:
            refuse_changes(folder, identity, before, force)
        strategy = plan.open()
        state = build_state(recipe, strategy, limits, seed)
        refuse_split_carry(recipe, plan)
        notes = plan.notes + split_notes(recipe) + mode_notes(state.model)
        plan = replace(plan, notes=notes + partition_notes(state.model, plan, global_batch_size(recipe)))
        started = Started(folder, console_for(quiet), plan, state)
        checkpoint = take_over(started, limits)
        if not state.progress.finished:
            started.plan = plan = settle_workers(plan, recipe, state.model, strategy, seed)
            folder.write_identity(identity, plan)
            folder.open_events(checkpoint.state["events_bytes"] if checkpoint is not None else 0)
            started.open(
                recipe, strategy, limits, seed, checkpoint.step if checkpoint is not None else -1, on_step, force
            )
        return started
    except BaseException:
        folder.close()
        raise


def identify(recipe: Recipe, plan: Plan, limits: Limits, seed: int, keep: int) -> Identity:
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
            "keep": keep,
            "keep_best": limits.keep_best,
            "microbatch": plan.microbatch,
            "workers": "auto" if plan.measure_workers else plan.workers,
            "compile": plan.compile,
        },
    )


def take_over(started: Started, limits: Limits) -> Checkpoint | None:
    """Load the newest checkpoint that verifies, saying which newer ones did not."""
    checkpoint, complaints = started.folder.store.newest_good()
    if complaints and checkpoint is None:
        folder = started.folder.store.folder
        raise UserError(
            "no checkpoint of the run is good",
            why="\n          ".join(complaints),
            remedy=f"mend them, or begin anew: another --out, or move {folder} away (it is left as it is)",
        )
    for complaint in complaints:
        started.console.note(f"skipped a damaged checkpoint: {complaint}")
    if checkpoint is not None:
        state = started.state
        state.load(checkpoint.model, checkpoint.ema, checkpoint.state)
        started.metrics = dict(checkpoint.metrics)
        if state.progress.finished in ("epochs", "steps") and beyond(state.progress, limits):
            state.progress.finished = None
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
