"""`stoker doctor FILE`: where a recipe's data loading spends its time and its memory, and what would mend it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stoker.checks import check_limits, split_notes
from stoker.data.footprint import Growth, Holder, growth, holders
from stoker.data.limits import Machine, machine
from stoker.data.loader import Loader
from stoker.data.order import Batches
from stoker.data.seeding import isolated
from stoker.data.stages import Stages, stage_times, transform_times
from stoker.data.workers import Choice, choose_workers, time_of
from stoker.devices.strategy import Single, find_device
from stoker.errors import UserError
from stoker.recipe import Recipe
from stoker.rehearse import Rehearsal
from stoker.start import build_state
from stoker.train import Limits

_LOOKED_AT = 256  # samples, for the times
_MANY = 20_000  # samples, for memory that grows
_SMALL_SHM_BYTES = 1 << 30
_HEAVY_BYTES = 16 << 20  # of Python objects, from which on copies of them are worth a warning


@dataclass(frozen=True)
class Diagnosis:
    """What was measured. Times in seconds; None where the data are not read sample by sample.

    Attributes:
        stages: reading and collating, in one process.
        transforms: name -> seconds a sample.
        choice: the number of workers and what it rests on.
        holders: attributes of the data set that hold many Python objects.
        growth: memory that a forked worker takes for itself.
    """

    description: str
    num_samples: int | None
    batch_size: int
    machine: Machine
    step_s: float
    place_s: float
    stages: Stages | None = None
    transforms: tuple[tuple[str, float], ...] = ()
    choice: Choice | None = None
    holders: tuple[Holder, ...] = ()
    growth: Growth | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The report, line by line."""
        yield f"data       {self.description}, batches of {self.batch_size}"
        yield f"machine    {_machine(self.machine)}"
        per_s = self.batch_size / self.step_s
        if self.stages is not None and self.choice is not None:
            read_s, batch = self.stages.decode_s, self.batch_size
            kind = "computing" if self.stages.cpu_share > 0.5 else "waiting for files"
            yield _stage("reading", f"{_time(read_s)} a sample", 1 / read_s, f"in one process, mostly {kind}")
            yield _stage("collate", f"{_time(self.stages.collate_s)} a batch", batch / self.stages.collate_s)
        if self.place_s:
            yield _stage("transfer", f"{_time(self.place_s)} a batch", self.batch_size / self.place_s)
        yield _stage("step", f"{_time(self.step_s)} a batch", per_s)
        yield from self._verdict()
        if self.transforms:
            yield "each sample:"
            whole = sum(seconds for _, seconds in self.transforms) or 1.0
            for name, seconds in self.transforms:
                yield f"  {_time(seconds):>9}  {seconds / whole:4.0%}  {name}"
        yield from self._memory()
        for note in self.notes:
            yield f"note: {note}"

    def _verdict(self) -> Iterator[str]:
        if self.stages is None or self.choice is None:
            yield "verdict    compute-bound: batches are gathered from memory, workers could only slow that down"
            return
        choice = self.choice
        tried = ", ".join(f"{workers}: {rate:,.0f}" for workers, rate in sorted(choice.rates.items()))
        yield f"workers    samples/s with the step, by --workers: {tried}"
        bound = "data-bound" if choice.rates[choice.workers] < 0.9 * self.batch_size / self.step_s else "compute-bound"
        wanted = choice.read_s / self.step_s
        if bound == "data-bound":
            yield (
                f"verdict    data-bound: the step could take {self.batch_size / self.step_s:,.0f} samples/s, "
                f"the work of {wanted:.1f} workers; --workers {choice.workers} is the best here"
            )
            yield f"           {self._relief()}"
        else:
            yield f"verdict    compute-bound with --workers {choice.workers}: reading is faster than the step"

    def _relief(self) -> str:
        slowest = max(self.transforms, key=lambda entry: entry[1], default=("reading", 0.0))[0]
        if self.stages is not None and self.stages.cpu_share <= 0.5:
            return 'most of it is waiting: Loader(cache="disk") on a local disk reads a slow file system once'
        return f'most of the time goes into {slowest}; Loader(cache="memory") decodes once, augmentation stays random'

    def _memory(self) -> Iterator[str]:
        if self.growth is not None and self.growth.error:
            yield f"memory     not measured: {self.growth.error}"
        heavy = [holder for holder in self.holders if holder.size_bytes >= _HEAVY_BYTES]
        for holder in heavy:
            yield (
                f"memory     {holder.path} is a {holder.kind}: {_bytes(holder.size_bytes)} in {holder.objects:,} "
                "Python objects; a forked worker copies them page by page, as reading one writes its reference count"
            )
        grown = self.growth
        if heavy and grown is not None and not grown.error:
            yield (
                f"           measured: {grown.copied_bytes:,.0f} bytes copied a sample by each worker, "
                f"{_bytes(grown.epoch_bytes)} an epoch"
            )
        if heavy:
            name = heavy[0].path.split(".", 1)[-1].split("[")[0]
            yield f"           remedy: self.{name} = stoker.data.pack(self.{name}) holds the same without objects"
        elif grown is not None and not grown.error and grown.added_bytes > 1000:
            yield f"memory     a worker grows by {grown.added_bytes:,.0f} bytes a sample: does it keep them?"


def diagnose(recipe: Recipe, seed: int = 0, device: str | None = None) -> Diagnosis:
    """Measure a recipe's data loading; takes about ten seconds, trains nothing that stays.

    Raises:
        UserError: the training data are no Loader, or cannot be read.
    """
    check_limits(recipe, Limits(None, 1))
    loader = recipe.train
    if not isinstance(loader, Loader):
        raise UserError("the recipe's training data are one batch", remedy="there is no loading to look at")
    strategy = Single(find_device(device))
    with isolated():
        state = build_state(recipe, strategy, Limits(None, 1000), seed)
    rehearsal = Rehearsal(recipe, state.model, strategy, seed)
    size = loader.batch_size or (len(loader.batches(seed, 0)[0]) if not loader.iterable else 1)
    kind = type(loader.dataset).__name__
    batch = next(loader.feed(seed, batch_size=size).epoch(0))[0]
    step_s = time_of(lambda: rehearsal.step(batch), rehearsal.settle)
    place_s = time_of(lambda: strategy.place(batch), rehearsal.settle) if strategy.device.type != "cpu" else 0.0
    if loader.iterable or loader.columns is not None:
        num = None if loader.iterable else len(loader)
        words = f"a stream ({kind})" if num is None else f"{num:,} samples in memory ({kind})"
        notes = () if loader.iterable else split_notes(recipe)
        return Diagnosis(words, num, size, machine(), step_s, place_s, notes=notes)
    reader, plan = loader.reader(seed), loader.plan(size)
    indices = first_indices(plan, seed, max(size, _LOOKED_AT))
    # From here on in the order in which a first read does least harm: forks before this process reads much.
    grown = growth(loader.source, first_indices(loader.plan(size, evaluation=True), seed, _MANY))
    choice = choose_workers(loader, seed, size, rehearsal.step, rehearsal.settle)
    return Diagnosis(
        f"{len(loader):,} samples ({kind})",
        len(loader),
        size,
        machine(),
        choice.step_s,
        place_s,
        stage_times(reader.dataset, lambda samples: reader.join(0, [0], samples, None), indices[:size]),
        tuple(transform_times(loader.source, indices[:64])),
        choice,
        tuple(holders(loader.source)),
        grown,
        split_notes(recipe),
    )


def first_indices(plan: Batches, seed: int, count: int) -> list[int]:
    """Samples that an epoch begins with."""
    found: list[int] = []
    for batch in range(plan.count(seed, 0)):
        found += plan.take(seed, 0, batch, batch + 1)[0].tolist()
        if len(found) >= count:
            break
    return found[:count]


def _machine(found: Machine) -> str:
    parts = [f"{found.cpus} cpus for this process"]
    parts += [f"{_bytes(found.memory_bytes)} memory to be had"] if found.memory_bytes is not None else []
    if found.shm_bytes is not None:
        parts.append(f"/dev/shm {_bytes(found.shm_bytes)}")
        if found.shm_bytes < _SMALL_SHM_BYTES:
            parts[-1] += " (small, and not needed: batches travel in memory files)"
    parts += [f"{found.open_files} open files"] if found.open_files is not None else []
    return ", ".join(parts)


def _stage(name: str, time: str, rate: float, more: str = "") -> str:
    return f"{name:10} {time:>16} {rate:>12,.0f} samples/s" + (f"  {more}" if more else "")


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _bytes(count: Any) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
