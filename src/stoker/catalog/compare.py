"""What two runs have in common, and from which step on they do not. Reads only, and never imports torch."""

import difflib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker.catalog.runfiles import (
    DamagedRun,
    checkpoints,
    event_of,
    is_number,
    read_bytes,
    read_json,
    read_record,
    read_recorded,
)
from stoker.catalog.runs import FINISHED, Listed, read_run
from stoker.errors import UserError

ABSENT = "(not given)"
Pair = tuple[Any, Any]
Point = tuple[int, Any]  # step, value

# Other words, a maximum; where a run has judged by a value, its own judgement counts, whatever the name.
_LOW = ("loss", "error", "err", "perplexity", "ppl", "mae", "mse", "rmse", "nll", "distance", "fid")
_HIGH = ("accuracy", "acc", "auroc", "auc", "f1", "precision", "recall", "iou", "map", "r2", "bleu", "dice", "score")
_CAUSES = 6  # named in an explanation
_CHANGES_BITS = ("device", "devices", "strategy", "compile", "microbatch")  # of a plan; its workers change nothing


@dataclass(frozen=True)
class Curve:
    """One name's values in both runs.

    Attributes:
        a, b: (step, value) in the order they were logged.
        compared: how many values are of the same step, and of the same window of steps, in both.
        first_difference: step and both values where their bits first differ.
        mode: "min" or "max" is best; None where neither the runs nor the name tell.
    """

    name: str
    a: Sequence[Point]
    b: Sequence[Point]
    compared: int
    first_difference: tuple[int, Any, Any] | None
    mode: str | None

    @property
    def last(self) -> Pair:
        """The last values; None where there is none."""
        return (self.a[-1][1] if self.a else None), (self.b[-1][1] if self.b else None)

    @property
    def best(self) -> tuple[float | None, float | None]:
        """The best values; None where there is none, or it is not known what is best."""
        return self._best_of(self.a), self._best_of(self.b)

    def _best_of(self, points: Sequence[Point]) -> float | None:
        numbers = [float(value) for _, value in points if is_number(value) and not math.isnan(value)]
        if self.mode is None or not numbers:
            return None
        return min(numbers) if self.mode == "min" else max(numbers)


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        a, b: the runs' folders.
        runs: how they stand.
        differences: part of run.json -> name -> both values, `ABSENT` where one has none; equal parts are left out.
        parts: the parts that were looked at, `differences` or not.
        source: unified diff of recipe.py and the modules beside it; empty where they are the same.
        architecture: module -> both descriptions where they differ; None where a run has none recorded.
        curves: by name, of everything that is reproducible (not `time/` and `system/`).
        bits: whether something was logged by both, and all of it has the same bits.
        compared: number of values that both logged.
        first_difference: step, name and both values where the bits first differ.
        same_to: the last step up to which values were compared and are the same; None if there is none.
        steps: the last step of each run's events.
        alone: (step, name) of what one run logged and the other, though it came that far, did not.
        weights: step -> whether the model's weights have the same bits, for checkpoints that both have.
        decided: what decides the result, and differs: empty where the runs are the same function of the same values.
        notes: what else has to be said, of damaged lines and such.
        recorded: both run.json, part by part, as they were compared.
    """

    a: Path
    b: Path
    runs: tuple[Listed, Listed]
    differences: Mapping[str, Mapping[str, Pair]]
    parts: Sequence[str]
    source: Sequence[str]
    architecture: Mapping[str, Pair] | None
    curves: Mapping[str, Curve]
    bits: bool
    compared: int
    first_difference: tuple[int, str, Any, Any] | None
    same_to: int | None
    steps: tuple[int, int]
    alone: tuple[Sequence[tuple[int, str]], Sequence[tuple[int, str]]]
    weights: Mapping[int, bool]
    decided: Sequence[str]
    notes: Sequence[str] = ()
    recorded: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default=({}, {}), repr=False)

    @property
    def verdict(self) -> str:
        """What there is to say in one line."""
        if not self.compared:
            return "nothing to compare: no value was logged by both at the same step"
        if self.first_difference is not None:
            step, name, a, b = self.first_difference
            before = f"same bits to step {self.same_to}, " if self.same_to is not None and self.same_to < step else ""
            return f"{before}differ from step {step} on: {name} {a} vs {b}"
        other = [step for step, same in self.weights.items() if not same]
        if other:
            return f"same values to step {self.same_to}, but other weights in the checkpoint of step {min(other)}"
        return f"same bits to step {self.same_to}"

    @property
    def explanation(self) -> str:
        """Why the bits differ though everything that decides them is the same; empty where there is nothing to say."""
        if self.decided or (self.first_difference is None and all(self.weights.values())):
            return ""
        same = "though recipe, arguments, seed and source are the same"
        causes = [f"{name} {a} vs {b}" for name, (a, b) in self.differences.get("versions", {}).items()]
        causes += [f"{n} {a} vs {b}" for n, (a, b) in self.differences.get("plan", {}).items() if n in _CHANGES_BITS]
        causes += [f"git commit {_short(a)} vs {_short(b)}" for a, b in self.differences.get("git_commit", {}).values()]
        for part in (part for part in self.differences if part not in _PARTS):
            causes += [f"{part} {name} {a} vs {b}" for name, (a, b) in self.differences[part].items()]
        if causes:
            more = f", and {len(causes) - _CAUSES} more" if len(causes) > _CAUSES else ""
            return f"{same}; what differs: {', '.join(causes[:_CAUSES])}{more}"
        return (
            f"{same}, and so are versions and device: a law of stoker is broken, or the recipe reads something that is"
            " neither in its source nor in its arguments (a file that changed, the clock, the environment)"
        )


_PARTS = ("recipe", "arguments", "seed", "limits", "options", "plan", "versions", "git_commit")
_ELSEWHERE = {
    *_PARTS,
    "architecture",
    "modules",
    "modules_sha256",
    "source_sha256",
}  # of run.json; the last four in other ways


def compare(a: Path, b: Path) -> Comparison:
    """Compare two runs, finished or not; they may be in training.

    Raises:
        UserError: one of them is no run, or its run.json is damaged.
    """
    recorded = _recorded(a), _recorded(b)
    left, right = _parts_of(a, recorded[0]), _parts_of(b, recorded[1])
    parts = [name for name in left if name in right]  # what only one has recorded says nothing
    differences = {name: d for name in parts if (d := differing(left.get(name, {}), right.get(name, {})))}
    notes: list[str] = []
    source = source_diff(a, b, recorded, notes)
    runs = read_run(a), read_run(b)
    events = read_curves(a / "events.jsonl", "A", notes), read_curves(b / "events.jsonl", "B", notes)
    curves = {
        name: curve_of(name, events[0].get(name, []), events[1].get(name, []), runs)
        for name in dict.fromkeys([*events[0], *events[1]])
    }
    found = [(c.first_difference[0], name, *c.first_difference[1:]) for name, c in curves.items() if c.first_difference]
    first = min(found, key=lambda entry: entry[0], default=None)
    compared = sum(curve.compared for curve in curves.values())
    steps = _last_step(events[0]), _last_step(events[1])
    architectures = [r.get("architecture") for r in recorded]
    told = all(isinstance(architecture, dict) for architecture in architectures)
    return Comparison(
        a=a,
        b=b,
        runs=runs,
        differences=differences,
        parts=parts,
        source=source,
        architecture=differing(*architectures) if told else None,  # type: ignore[arg-type]
        curves=curves,
        bits=first is None and compared > 0,
        compared=compared,
        first_difference=first,
        same_to=_same_to(curves, first),
        steps=steps,
        alone=_alone(curves, steps, runs),
        weights=weights_of(a, b),
        decided=_decided(differences, recorded, bool(source)),
        notes=notes,
        recorded=(left, right),
    )


def _recorded(run: Path) -> dict[str, Any]:
    if not (run / "run.json").is_symlink() and not (run / "run.json").exists():
        raise UserError(
            f"{run} is not a run",
            why="it has no run.json" if run.is_dir() else "there is no such folder",
            remedy="give two folders that `stoker runs` lists",
        )
    try:
        return read_recorded(run)
    except DamagedRun as error:
        raise UserError(
            f"{run} cannot be compared: {error}", why="it was damaged, or written by another version of stoker"
        ) from None


def _parts_of(run: Path, recorded: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What run.json says, part by part; parts that this version does not know are compared like the others."""
    recipe = recorded["recipe"]
    parts: dict[str, dict[str, Any]] = {
        "recipe": {name: value for name, value in recipe.items() if name != "arguments"},
        "arguments": recipe["arguments"],
    }
    for name in (*_PARTS[2:], *(name for name in recorded if name not in _ELSEWHERE)):
        value = recorded.get(name)
        parts[name] = _flat(value) if isinstance(value, dict) else {name: value}
    parts["plan"] = {name: value for name, value in parts["plan"].items() if name != "notes"}
    try:  # beside a run that came out of an archive
        kept = read_json(run / "environment.json")
    except DamagedRun:
        kept = None
    return {**parts, "environment": _flat(kept)} if isinstance(kept, dict) else parts


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by dotted name."""
    flat = {}
    for name, value in values.items():
        inside = _flat(value) if isinstance(value, dict) else {}
        flat.update({f"{name}.{key}": part for key, part in inside.items()} if inside else {name: value})
    return flat


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    """Both values of every name whose values differ."""
    pairs = {name: (a.get(name, ABSENT), b.get(name, ABSENT)) for name in dict.fromkeys([*a, *b])}
    return {
        name: pair for name, pair in pairs.items() if pair[0] != pair[1] and _spelling(pair[0]) != _spelling(pair[1])
    }


def _spelling(value: Any) -> str:
    """A value's bits as text: -0.0 is not 0.0, 1 is not 1.0, nan is nan."""
    return json.dumps(value, sort_keys=True)


def _decided(
    differences: Mapping[str, Mapping[str, Pair]], recorded: Sequence[Mapping[str, Any]], other_source: bool
) -> list[str]:
    """What of the differences changes a run's result by intent, as `Identity.differences` counts it."""
    found = [name for name in ("name", "function") if name in differences.get("recipe", {})]
    found = ["recipe"] if found else []
    found += [f"argument {name}" for name in differences.get("arguments", {})]
    found += ["seed"] if "seed" in differences else []
    found += ["precision"] if "precision" in differences.get("plan", {}) else []
    length = any(r["limits"].get("length_matters") for r in recorded)
    limits = ["eval_every", *(["epochs", "steps"] if length else [])]
    found += [name for name in limits if name in differences.get("limits", {})]
    return [*found, *(["source"] if other_source else [])]


def source_diff(a: Path, b: Path, recorded: Sequence[Mapping[str, Any]], notes: list[str]) -> list[str]:
    """Lines of a unified diff of all source that the runs keep."""
    texts: list[dict[str, str]] = []
    for run, record in zip((a, b), recorded, strict=True):
        paths = {"recipe.py": run / "recipe.py", **{name: run / "source" / name for name in record["modules"]}}
        kept = {}
        for name, path in paths.items():
            try:
                kept[name] = read_bytes(path, name).decode(errors="replace")
            except DamagedRun as error:
                notes.append(f"{run}: {error}")
        texts.append(kept)
    lines: list[str] = []
    for name in dict.fromkeys([*texts[0], *texts[1]]):
        old, new = (text.get(name, "") for text in texts)
        diff = difflib.unified_diff(old.splitlines(), new.splitlines(), f"A/{name}", f"B/{name}", lineterm="", n=2)
        lines += list(diff) or ([f"{name}: only the ends of its lines differ"] if old != new else [])
    return lines


def read_curves(path: Path, label: str, notes: list[str]) -> dict[str, list[Point]]:
    """(step, value) by name of what is reproducible in an event log; a line that is still being written is not read."""
    curves: dict[str, list[Point]] = {}
    broken = 0
    try:
        lines = read_bytes(path, whole=True).split(b"\n")[:-1]
    except DamagedRun as error:
        notes.append(f"{label}: {error}")
        return curves
    for line in lines:
        event = event_of(line)
        if event is None:
            broken += 1
        elif not event[2].startswith(("time/", "system/")):
            curves.setdefault(event[2], []).append((event[0], event[3]))
    if broken:
        notes.append(f"{label}: {broken} lines of events.jsonl are damaged, and were passed over")
    return curves


def curve_of(name: str, a: Sequence[Point], b: Sequence[Point], runs: Sequence[Listed]) -> Curve:
    """Line up two runs' values of a name.

    A `train/` value is a mean over the steps since the one before: only means over the same steps are compared.
    """
    left, right = _keyed(name, a), _keyed(name, b)
    common = [key for key in left if key in right]
    first = next((key for key in common if _spelling(left[key]) != _spelling(right[key])), None)
    difference = (first[0], left[first], right[first]) if first is not None else None
    return Curve(name, a, b, len(common), difference, _mode(name, (a, b), runs))


def _keyed(name: str, points: Sequence[Point]) -> dict[tuple[int, int, int], Any]:
    """Values by step, start of the window, and how often the same was logged before."""
    counts: Counter[tuple[int, int]] = Counter()
    keyed, before = {}, 0
    for step, value in points:
        began = before if name.startswith("train/") and not name.endswith("/lr") else 0
        keyed[step, began, counts[step, began]] = value
        counts[step, began] += 1
        before = step
    return keyed


def _mode(name: str, points: Sequence[Sequence[Point]], runs: Sequence[Listed]) -> str | None:
    for run, own in zip(runs, points, strict=True):
        values = [value for _, value in own if is_number(value) and not math.isnan(value)]
        if run.best_name == name and run.best_step is not None and values and min(values) < max(values):
            if run.best == min(values):
                return "min"
            if run.best == max(values):
                return "max"
    words = name.lower().rpartition("/")[2].replace("-", "_").split("_")
    return "min" if any(w in _LOW for w in words) else "max" if any(w in _HIGH for w in words) else None


def _last_step(events: Mapping[str, Sequence[Point]]) -> int:
    return max((points[-1][0] for points in events.values()), default=0)


def _same_to(curves: Mapping[str, Curve], first: tuple[int, str, Any, Any] | None) -> int | None:
    """The last step at which values were compared, all of them before the first difference."""
    steps = [key[0] for c in curves.values() for key in _keyed(c.name, c.a).keys() & _keyed(c.name, c.b).keys()]
    return max((step for step in steps if first is None or step < first[0]), default=None)


def _alone(
    curves: Mapping[str, Curve], steps: tuple[int, int], runs: Sequence[Listed]
) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """What one run alone logged; of its very last step a run that is not finished may owe something still."""
    to = min(steps)
    found: tuple[list[tuple[int, str]], list[tuple[int, str]]] = ([], [])
    for name, curve in curves.items():
        logged = [{step for step, _ in points} for points in (curve.a, curve.b)]
        for one, other in ((0, 1), (1, 0)):
            complete = to if runs[other].status == FINISHED or steps[other] > to else to - 1
            found[one].extend((step, name) for step in logged[one] - logged[other] if step <= complete)
    return sorted(found[0]), sorted(found[1])


def weights_of(a: Path, b: Path) -> dict[int, bool]:
    """For every step of which both runs have a good checkpoint, whether the weights in it have the same bits.

    Their checksums are compared, the tensors are not read.
    """
    sums: list[dict[int, str]] = []
    for run in (a, b):
        found = {}
        try:
            paths = checkpoints(run)
        except DamagedRun:
            paths = []
        for step, path in paths:
            try:
                found[step] = str(read_record(path)["files"]["model.safetensors"]["sha256"])
            except (DamagedRun, KeyError, TypeError):
                continue
        sums.append(found)
    return {step: digest == sums[1][step] for step, digest in sums[0].items() if step in sums[1]}


def _short(commit: Any) -> str:
    return commit[:10] if isinstance(commit, str) else str(commit)
