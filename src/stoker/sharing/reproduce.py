"""`stoker reproduce`: run a run again from what it kept, and say whether the same came out."""

import hashlib
import json
import linecache
import math
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stoker.data.seeding import isolated
from stoker.devices.strategy import find_device
from stoker.errors import LIBRARIES, UserError
from stoker.files import read_text, write_atomically
from stoker.recall import recorded_options
from stoker.recipe import Recipe, parameters_of
from stoker.run import Identity, jsonable
from stoker.sharing.agreement import Agreement, Verdict, agreement, weights_in_words
from stoker.sharing.archive import Whole, opened, whole
from stoker.sharing.environment import differences, distributions, environment
from stoker.source import load_file
from stoker.start import Run, prepare
from stoker.train import train

TOLERANCE = 1e-3
RECORD = "reproduction.json"
# Options of `fit` that a run has recorded and that are its own; others belong to the machine that it ran on.
_OWN = {"epochs", "steps", "seed", "precision", "checkpoint_every", "eval_every", "log_every", "keep", "keep_best"}
_OWN |= {"microbatch", "workers", "compile"}


@dataclass(frozen=True)
class Reproduction:
    """A run that was run again, and how the two compare.

    Attributes:
        dir: the new run's folder.
        of: the archive, or the folder of the run.
        verdict: "bits", "metrics" or "differs".
        tolerance: relative difference up to which a value counts as the same.
        comparison: the values behind the verdict.
        overridden: arguments that were given anew.
        options: options that were given anew.
        environment: differences between the environments, and modules that were not kept, one a line.
        run: the new run.
    """

    dir: Path
    of: str
    verdict: Verdict
    tolerance: float
    comparison: Agreement
    overridden: Mapping[str, Any]
    options: Mapping[str, Any]
    environment: Sequence[str]
    run: Run = field(repr=False)

    @property
    def agrees(self) -> bool:
        """Whether bits or metrics agree."""
        return self.verdict != "differs"

    def __str__(self) -> str:
        """The verdict in words, then what it rests on."""
        lines = [self._headline()]
        found = self.comparison
        if self.verdict != "bits":
            lines.append(f"weights: {weights_in_words(found)}")
            lines += [f"first: {found.first}"] if found.first is not None else []
            lines += [f"largest: {found.largest}"] if found.largest not in (None, found.first) else []
            lines += [f"last values, largest: {found.final}"] if found.final not in (None, found.largest) else []
            lines += [f"{found.unmatched} values were logged by one of the runs only"] if found.unmatched else []
        lines += [f"with {name}={value} in place of the run's own" for name, value in self.overridden.items()]
        lines += [f"with --{name} {value}" for name, value in self.options.items()]
        if self.verdict != "bits":
            lines += [f"may be why: {line}" for line in self.environment]
            lines += [] if self.environment or self.overridden or self.options else [_NO_REASON]
        return "\n  ".join(lines)

    def _headline(self) -> str:
        found = self.comparison
        if self.verdict == "bits":
            return f"the bits agree: {found.tensors} tensors of weights and {found.events} logged values"
        worst = found.largest.relative if found.largest is not None else 0.0
        if self.verdict == "metrics" and not found.weights:
            return "the metrics agree, and the weights to the bit; values on the way were logged otherwise"
        if self.verdict == "metrics":
            return (
                f"the metrics agree: {found.events} logged values differ by {worst:.2g} at most, "
                f"within {self.tolerance:g} (relative)"
            )
        if found.first is None:
            return "it differs: in its weights, not in what was logged"
        return f"it differs from step {found.first.step} on: {found.first.name}"


_NO_REASON = (
    "no difference of the environments is known: look for randomness that has no seed (clocks, set order, "
    "os.urandom), for data that have changed, and for kernels that are not deterministic"
)


def reproduce(
    run: Run | str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str | None = None,
    workers: int | str | None = None,
    microbatch: int | None = None,
    tolerance: float = TOLERANCE,
    quiet: bool = False,
) -> Reproduction:
    """Train a finished run again from its own source, from scratch, and compare the two.

    Args:
        run: an archive that `stoker pack` made, a run's folder, or a Run.
        out: the new run's folder (default: `runs/RECIPE/NAME`); with that of an interrupted reproduction, go on.
        overrides: `key=value` words, arguments to use in place of the recorded ones: where the data are, say.
        device: where (default: the recorded device, where there is one like it).
        workers: in place of the recorded number.
        microbatch: in place of the recorded one.
        tolerance: relative difference up to which logged values agree.
        quiet: no progress.

    Raises:
        UserError: the archive, the recipe, an override or the folder cannot be used; or the training was interrupted.
    """
    given = {"device": device, "workers": workers, "microbatch": microbatch}
    options = {name: value for name, value in given.items() if value is not None}
    of = str(run.dir if isinstance(run, Run) else run)
    with opened(run) as folder:
        original = whole(folder)
        settings = _settings(original, options)
        mark = {"format": 1, "of": of, "identity": _fingerprint(original.identity)}
        _refuse_other(original, out, mark)
        with laid_out(original.identity) as file:
            before = {*sys.modules}
            recipe, overridden = _recipe(original, file, overrides)
            new = _train(recipe, mark, {**settings, "out": out, "quiet": quiet, "force": False})
            uncertain = _not_kept(original.identity, before)
        if new.reason is None:
            raise UserError(
                f"interrupted at step {new.step}: there is nothing to compare yet",
                remedy=" ".join(["stoker reproduce", of, *overrides, "--out", str(new.dir)]),
            )
        comparison = agreement(folder, new.dir)
        told = Reproduction(
            dir=new.dir,
            of=of,
            verdict=comparison.verdict(tolerance),
            tolerance=tolerance,
            comparison=comparison,
            overridden=overridden,
            options=options,
            environment=uncertain + _environment_differences(original, new.dir),
            run=new,
        )
    _record(told, mark)
    return told


def _settings(original: Whole, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `fit` that the run was trained with, and those given now."""
    recorded = {k: v for k, v in recorded_options(original.identity).items() if k in _OWN}
    device = _plan(original.folder.path).get("device")
    try:
        find_device(str(device))
    except UserError:
        device = None  # none like it here: the first there is
    return {**recorded, "device": device, **options}


def _plan(run: Path) -> dict[str, Any]:
    plan = json.loads(read_text(run / "run.json")).get("plan")
    return plan if isinstance(plan, dict) else {}


def _fingerprint(identity: Identity) -> list[Any]:
    source = hashlib.sha256(json.dumps([identity.source, dict(identity.modules)]).encode()).hexdigest()
    return [identity.recipe, identity.function, identity.seed, jsonable(identity.arguments), source]


def _refuse_other(original: Whole, out: str | Path | None, mark: Mapping[str, Any]) -> None:
    """Refuse a folder that holds any other run: comparing a run with itself would tell nothing.

    Raises:
        UserError: it does.
    """
    if out is None or not (Path(out) / "run.json").exists():
        return
    try:
        found = json.loads(read_text(Path(out) / RECORD))
        same = found["identity"] == mark["identity"] and Path(out).resolve() != original.folder.path.resolve()
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{out} holds another run", remedy="choose a new folder with --out")


def _train(recipe: Recipe, mark: Mapping[str, Any], settings: dict[str, Any]) -> Run:
    with isolated(), prepare(recipe, **settings) as started:
        write_atomically(started.folder.path / RECORD, json.dumps(mark, indent=1))
        if started.session is not None:
            train(started.session)
    return started.result()


def _recipe(original: Whole, file: Path, overrides: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
    """Call the run's own source with its own arguments, and those given anew; return these, too."""
    identity = original.identity
    try:
        source = load_file(
            file, identity.function or "", original=Path(identity.file or file), modules=identity.modules
        )
        asked = source.arguments(overrides)
        # What JSON cannot keep, a class say, is recorded by its spelling: where that is the default's, it is meant.
        defaults = {name: jsonable(p.default) for name, p in parameters_of(source.function).items()}
        recorded = {k: v for k, v in identity.arguments.items() if k not in defaults or defaults[k] != v}
        recipe = source.recipe({**source.recall(recorded), **asked}, identity.seed)
    except UserError as error:
        if error.remedy:
            raise
        raise UserError(error.what, why=error.why, remedy=_remedy(original, error.__cause__)) from error.__cause__
    where = Path(identity.file) if identity.file is not None else None
    recipe.origin = replace(recipe.origin, file=where, modules=identity.modules)
    overridden = {k: v for k, v in asked.items() if jsonable(v) != identity.arguments.get(k)}
    return recipe, overridden


def _remedy(original: Whole, cause: BaseException | None) -> str:
    """What to do about a recipe that ran then and raises now."""
    if isinstance(cause, ImportError):
        imports = _surroundings(original).get("imports")
        installed = distributions()
        known = imports.items() if isinstance(imports, dict) else ()
        missing = [f"{name}=={version}" for name, version in known if name not in installed]
        return f"pip install {' '.join(missing)}" if missing else "install it, or pack the run where its module is"
    return "an archive holds no data: stoker reproduce ARCHIVE KEY=PATH says where they are"


def _surroundings(original: Whole) -> dict[str, Any]:
    """The environment as an archive has kept it; empty for a run that never was in one."""
    try:
        found = json.loads(read_text(original.folder.path / "environment.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def laid_out(identity: Identity) -> Iterator[Path]:
    """A run's own source as `recipe.py` with the folder `source` beside it, in a temporary place.

    Modules that were imported by these names are put aside, and back afterwards: what is on the disk may have changed.
    """
    with tempfile.TemporaryDirectory(prefix="stoker-") as place:
        folder = Path(place).resolve()
        shown = identity.file or str(folder / "recipe.py")  # what messages call the recipe's file
        texts = {"recipe.py": identity.source, **{f"source/{k}": text for k, text in identity.modules.items()}}
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            # Messages show lines, also when the folder is gone: an entry without a date is never looked up again.
            lines = (len(text), None, text.splitlines(keepends=True), str(path))
            linecache.cache[shown if name == "recipe.py" else str(path)] = lines
        with _own_modules(identity, folder):
            yield folder / "recipe.py"
        linecache.cache.pop(shown, None)  # the file on the disk is another one


@contextmanager
def _own_modules(identity: Identity, folder: Path) -> Iterator[None]:
    """Forget modules of the recipe's own names while inside, those of libraries apart, and its own afterwards."""
    names = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in identity.modules}
    before, path = dict(sys.modules), list(sys.path)
    for name in names & {*before}:
        if _is_users(_file_of(before[name])):
            del sys.modules[name]
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if _file_of(module).startswith(f"{folder}/") or (name not in before and _file_of(module) == identity.file):
                del sys.modules[name]
        for name, module in before.items():
            sys.modules.setdefault(name, module)


def _file_of(module: Any) -> str:
    return str(getattr(module, "__file__", None) or "")


def _is_users(file: str) -> bool:
    return bool(file) and not any(part in file for part in (*LIBRARIES, str(Path(__file__).parent.parent)))


def _not_kept(identity: Identity, before: Collection[str]) -> list[str]:
    """Lines on modules that were imported from beside the recipe's first file, as they are now, for want of a copy."""
    beside = f"{Path(identity.file).parent}/" if identity.file is not None else "\0"
    files = {_file_of(module) for name, module in list(sys.modules.items()) if name not in before}
    found = sorted(file for file in files if file.startswith(beside) and file != identity.file and _is_users(file))
    return [f"{file} was read as it is now: the run has kept no copy" for file in found]


def _environment_differences(original: Whole, new: Path) -> list[str]:
    """Differences of what the two runs recorded and of where they ran; versions first."""
    then, now = (json.loads(read_text(run / "run.json")) for run in (original.folder.path, new))
    lines = []
    for name in ("stoker", "torch", "numpy", "python"):
        old, fresh = (x["versions"].get(name) if isinstance(x.get("versions"), dict) else None for x in (then, now))
        if old is not None and old != fresh:
            lines.append(f"{name}: {old} then, {fresh} now")
    for name in ("device", "precision", "microbatch", "compile"):
        old, fresh = _plan(original.folder.path).get(name), _plan(new).get(name)
        if old != fresh:
            lines.append(f"{name}: {old} then, {fresh} now")
    texts = [original.identity.source, *original.identity.modules.values()]
    kept = _surroundings(original)
    found = differences(kept, environment(texts)) if kept else []
    known = {line.partition(":")[0] for line in lines}
    return lines + [line for line in found if line.partition(":")[0] not in known]


def _record(found: Reproduction, mark: Mapping[str, Any]) -> None:
    values = {f.name: getattr(found, f.name) for f in found.__dataclass_fields__.values() if f.name != "run"}
    values["comparison"] = asdict(replace(found.comparison, weights=dict(found.comparison.weights)))
    text = json.dumps({**mark, **_strict(jsonable(values)), "agrees": found.agrees}, indent=1, allow_nan=False)
    try:
        write_atomically(found.dir / RECORD, text)
    except OSError as error:
        raise UserError(f"cannot write {found.dir / RECORD}: {error.strerror or error}\n{found}") from None


def _strict(value: Any) -> Any:
    """JSON has no infinity: it is written as a string, as in events."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
