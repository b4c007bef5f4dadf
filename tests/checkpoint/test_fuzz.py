"""Run folders from strangers: whatever was done to one, it is used, or refused in words. Nothing around it changes, and
no code runs but the source that it keeps.

Each case alters a small finished run (see mutations.py), in a forked process of bounded memory that reports through a
pipe, and puts it through `verify`, `show`, `load`, and `resume` or `fit`. STOKER_NIGHTLY=1 runs 10,000 cases.
"""

import contextlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar

import click
import pytest
import torch
import torch._dynamo  # optimizers import it: once here instead of once in every child

import stoker
import stoker.start
import stoker.verify
import stoker.watch.describe
from stoker.errors import recipes_fault
from stoker.source import load_source
from tests.checkpoint.mutations import STEPS, Case, furnish, mutate, write_recipe

CASES = 100  # in a block
BLOCKS = 100 if os.environ.get("STOKER_NIGHTLY") else 4
CASE_S = 20
SPARE_BYTES = 3 << 30
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class TooLong(BaseException):
    """A case has not ended in its time."""


# ------------------------------------------------------------------ what a case may not do


class Watch:
    """Audit hook: what runs, what is started and what is opened for writing, while it is active.

    Code of a library may run. Any other has to have been compiled, while this looked, from a text that the run keeps.
    """

    def __init__(self) -> None:
        places = [*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, str(Path(stoker.__file__).parent)]
        self.libraries = tuple({os.path.realpath(place) + os.sep for place in places if place and place != "/"})
        self.run: Path | None = None
        self.texts: set[str] = set()
        self.compiled: set[str] = set()
        self.seen: list[str] = []
        self.compiles = 0

    def begin(self, run: Path, texts: set[str]) -> None:
        self.run, self.texts, self.compiled, self.seen, self.compiles = run, texts, set(), [], 0

    def end(self) -> list[str]:
        self.run = None
        return self.seen

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.run is None or event not in self.EVENTS:
            return
        run, self.run = self.run, None  # what it does itself is not looked at
        try:
            found = self.EVENTS[event](self, run, *arguments)
            if found:
                self.seen.append(found)
        finally:
            self.run = run

    def _is_library(self, name: str) -> bool:
        return name.startswith("<") or os.path.realpath(name).startswith(self.libraries)

    def _compile(self, run: Path, source: Any, filename: Any, *_: Any) -> str | None:
        name = os.fsdecode(filename) if isinstance(filename, str | bytes) else str(filename)
        text = source.decode(errors="replace") if isinstance(source, bytes) else source
        if self._is_library(name):
            return None
        self.compiles += 1
        if text not in self.texts:
            return f"compiles {name}, which is not what the run keeps"
        self.compiled.add(name)
        return None

    def _exec(self, run: Path, code: CodeType, *_: Any) -> str | None:
        name = code.co_filename
        return None if self._is_library(name) or name in self.compiled else f"runs {name}, which was not compiled here"

    def _open(self, run: Path, path: Any, mode: Any, flags: int, *_: Any) -> str | None:
        if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            return None
        name = os.path.abspath(os.fsdecode(path))
        real = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        if not flags & (os.O_NOFOLLOW | os.O_EXCL):
            real = os.path.realpath(name)
        return None if real.startswith(f"{run}{os.sep}") or real == os.devnull else f"opens {real} for writing"

    def _never(self, run: Path, *arguments: Any) -> str | None:
        return f"starts or unpickles {arguments!r}"

    EVENTS: ClassVar[dict[str, Callable[..., str | None]]] = {
        "compile": _compile,
        "exec": _exec,
        "open": _open,
        **dict.fromkeys(
            ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class"),
            _never,
        ),
        **dict.fromkeys(("socket.connect", "ctypes.dlopen", "webbrowser.open"), _never),
    }


def survey(folder: Path, besides: Path | None = None) -> dict[str, Any]:
    """Everything below a folder: kinds, sizes, times and contents; links and pipes are not opened."""
    found: dict[str, Any] = {}
    pending = [str(folder)]
    while pending:
        for entry in os.scandir(pending.pop()):
            if besides is not None and entry.path == str(besides):
                continue
            status = entry.stat(follow_symlinks=False)
            what: Any = None
            if entry.is_symlink():
                what = os.readlink(entry.path)
            elif entry.is_dir():
                pending.append(entry.path)
            elif entry.is_file() and status.st_size < 1 << 20:
                what = Path(entry.path).read_bytes()
            found[entry.path] = (status.st_mode, status.st_size, status.st_mtime_ns, what)
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Paths that are new, gone or different."""
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


# ------------------------------------------------------------------ one case


class Trial:
    """One altered run, and what was found out about it."""

    def __init__(self, base: Path, work: Path, number: int, watch: Watch) -> None:
        self.number, self.watch, self.draw = number, watch, random.Random(number)
        self.root = work / "case"
        if self.root.exists():
            shutil.rmtree(self.root)
        (self.root / "cwd").mkdir(parents=True)
        run, outside, marker = self.root / "run", self.root / "outside", self.root / "ran"
        shutil.copytree(base / "run", run, symlinks=True)
        outside.mkdir()
        self.case = Case(run, outside, marker)
        furnish(outside, marker, self.case.steps()[STEPS[-1]])
        self.file = base / "planes.py"
        self.gone = self.draw.random() < 0.7  # as on another machine
        if self.gone:
            text = (run / "run.json").read_text()
            (run / "run.json").write_text(text.replace(str(base), str(outside / "gone")))
        self.texts = {p.read_text() for p in base.rglob("*.py") if "run" not in p.relative_to(base).parts}
        mutate(self.case, self.draw)
        self.texts |= {version for text in self._kept() for version in (text, re.sub("\r\n?", "\n", text))}
        self.findings: list[str] = []
        self.ended: dict[str, str] = {}

    def _kept(self) -> set[str]:
        """The texts that `recipe.py` and `run.json` name as this run's source: to run them is what they are for."""
        run, found = self.case.run, set[str]()
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
            found.add(_plain(run / "recipe.py"))
            for name in json.loads(_plain(run / "run.json"))["modules"]:
                path = (run / "source" / name).resolve()
                if path.is_relative_to((run / "source").resolve()):
                    found.add(_plain(path))
        return found

    def finding(self, doing: str, text: str) -> None:
        self.findings.append(f"{doing}: {text}")

    def attempt(self, doing: str, function: Callable[[], Any]) -> tuple[Any, str]:
        """Do something as the command line does it; return its value and all that it printed."""
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
        err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
        value, path, modules, here = None, list(sys.path), dict(sys.modules), os.getcwd()
        self.watch.begin(self.case.run, self.texts)
        signal.setitimer(signal.ITIMER_REAL, CASE_S)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
                value = function()
            self.ended[doing] = "done"
        except stoker.UserError as error:
            self.ended[doing] = "refused"
            click.echo(f"error: {error}", err)
            if not error.what.strip() or not (error.why or error.remedy or re.search("[:,]", error.what)):
                self.finding(doing, f"says neither why nor what to do: {ascii(str(error))[:300]}")
        except TooLong:
            self.ended[doing] = "too long"
            self.finding(doing, f"takes more than {CASE_S} s")
        except BaseException as error:
            self.ended[doing] = "raised"
            if _is_recipes(error):  # the command line tells it as the recipe's own
                self.ended[doing] = "refused"
            else:
                self.finding(doing, f"{type(error).__name__}: {error!s:.200} {_where(error)}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for seen in self.watch.end():
                self.finding(doing, seen)
            sys.path[:] = path
            sys.modules.update(modules)
            for name in set(sys.modules) - set(modules):
                file = str(getattr(sys.modules[name], "__file__", None))
                if file.startswith((str(self.root), str(self.file.parent))):
                    del sys.modules[name]
            sys.path_importer_cache.clear()
            os.chdir(here)
        said = "".join(s.buffer.getvalue().decode("utf-8", "replace") for s in (out, err))
        if (found := CONTROL.search(said)) is not None:
            self.finding(doing, f"prints {found.group()!r} in {said[max(found.start() - 60, 0) : found.end() + 20]!r}")
        return value, said

    def run(self) -> None:
        """Read it in every way, then train in it."""
        case, work = self.case, self.root
        os.chdir(self.root / "cwd")
        around, inside = survey(work, besides=case.run), survey(case.run)
        findings, said = self.attempt("verify", lambda: _verify(case.run))
        if findings is not None:
            self._judge(findings, said)
        if self.ended["verify"] == "refused" and case.damaged and not case.forged:
            self.finding("verify", "refuses a run of which a checkpoint is damaged")
        self.attempt("show", lambda: stoker.watch.describe.describe_run(case.run))
        if self.watch.compiles:
            self.finding("show", "compiles something")
        which = self.draw.choice(["best", "latest"])
        self.attempt("load", lambda: stoker.load(case.run, which=which))
        if different := changes(inside, survey(case.run)):
            self.finding("reading", f"changes {different[:3]}")
        self._train()
        if different := changes(around, survey(work, besides=case.run)):
            self.finding("all", f"changes {different[:4]} outside the run")
        if case.marker.exists():
            self.finding("all", "planted code ran")

    def _judge(self, findings: list[Any], said: str) -> None:
        bad = {f.name for f in findings if not f.good}
        for step in self.case.damaged:
            if not any(name.startswith(f"step-{step:08d}") for name in bad):
                self.finding("verify", f"does not say that step {step} is damaged: {sorted(bad)}")
        if said.count("\n") != len(findings):
            self.finding("verify", f"prints {said.count(chr(10))} lines for {len(findings)} findings")

    def _train(self) -> None:
        case, way = self.case, self.draw.choice(["resume", "resume", "resume quietly not", "fit", "force"])
        options: dict[str, Any] = {"epochs": 3, "quiet": way != "resume quietly not", "force": way == "force"}
        if way.startswith("resume"):
            result, said = self.attempt("resume", lambda: stoker.resume(case.run, **options))
        else:
            recipe = load_source(str(self.file)).recipe({})
            result, said = self.attempt("fit", lambda: stoker.fit(recipe, out=case.run, **options))
        if case.forged or (way == "fit" and self.gone):
            return
        if len(case.damaged) < len(STEPS):
            if result is None or result.step != 9:
                self.finding(way, f"does not go on from the good checkpoint: {said[:300]}")
            if STEPS[-1] in case.damaged and f"step-{STEPS[-1]:08d}" not in said:
                self.finding(way, f"does not name the damaged checkpoint: {said[:300]}")
        elif result is not None:
            self.finding(way, "goes on although every checkpoint is damaged")


def _verify(run: Path) -> Any:
    findings = stoker.verify.verify_run(run)
    for line in stoker.verify.shown(findings):
        click.echo(line)
    return findings


def _plain(path: Path) -> str:
    small = path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20
    return path.read_bytes().decode(errors="replace") if small else ""


def _is_recipes(error: BaseException) -> bool:
    """Whether the command line would tell it as the recipe's own fault."""
    through = any("/stoker/" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return isinstance(error, Exception) and through and recipes_fault(error) is not None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/stoker/" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed((own or frames)[-3:]))


# ------------------------------------------------------------------ many cases


def _children_work(base: Path, work: Path, numbers: list[int], pipe: int) -> None:
    """Run cases in this forked process, telling the pipe of each before and after."""
    signal.signal(signal.SIGALRM, _too_long)
    os.environ["PATH"] = "/nonexistent"  # no git is asked for a commit
    os.environ["HOME"] = str(work / "home")
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch()
    sys.addaudithook(watch)
    for number in numbers:
        _send(pipe, {"case": number})
        trial = Trial(base, work, number, watch)
        _send(pipe, {"case": number, "did": trial.case.did})
        trial.run()
        _send(pipe, {"case": number, "did": trial.case.did, "findings": trial.findings, "ended": trial.ended})


def _too_long(number: int, frame: Any) -> None:
    raise TooLong


def _send(pipe: int, message: dict[str, Any]) -> None:
    os.write(pipe, json.dumps(message).encode() + b"\n")


def _messages(pipe: int, limit_s: float) -> Iterator[dict[str, Any]]:
    """What a child tells, until it ends or says nothing for that long."""
    rest = b""
    while select.select([pipe], [], [], limit_s)[0]:
        data = os.read(pipe, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from map(json.loads, lines)


def run_cases(base: Path, work: Path, numbers: list[int]) -> list[dict[str, Any]]:
    """Run cases in forked children; one that dies, or hangs, is a finding, and another goes on after it."""
    results: list[dict[str, Any]] = []
    left = list(numbers)
    while left:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reading)
                with (work / "log").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    sys.stdout = sys.stderr = log
                    try:
                        _children_work(base, work, left, writing)
                        status = 0
                    except BaseException:
                        traceback.print_exc()
                    log.flush()
            finally:
                os._exit(status)
        os.close(writing)
        last: dict[str, Any] = {"case": left[0]}
        for last in _messages(reading, 5 * CASE_S):
            if "findings" in last:
                results.append(last)
                left.remove(last["case"])
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if left and "findings" not in last:
            words = f"the process ended with {status}: {(work / 'log').read_text()[-600:]}"
            results.append({**last, "findings": [words], "ended": {}})
            left.remove(last["case"])
    return results


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its modules, and a finished run of two epochs with two checkpoints."""
    folder = tmp_path_factory.mktemp("fuzz").resolve()
    recipe = load_source(str(write_recipe(folder))).recipe({})
    result = stoker.fit(recipe, epochs=2, out=folder / "run", checkpoint_every=3, quiet=True)
    assert result.reason == "epochs" and result.step == STEPS[-1]
    return folder


@pytest.fixture
def work() -> Iterator[Path]:
    """In memory where there is a place for that: cases save, and saves wait for the disk."""
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
    folder = place / f"stoker-fuzz-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    (folder / "home").mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_altered_runs(base: Path, work: Path, block: int) -> None:
    numbers = list(range(block * CASES, (block + 1) * CASES))
    results = run_cases(base, work, numbers)
    assert sorted(result["case"] for result in results) == numbers
    found = [f"case {r['case']}, {r.get('did')}: {words}" for r in results for words in r["findings"]]
    assert found == [], "\n".join([f"{len(found)} findings", *found])
    ended = [way for result in results for way in result["ended"].values()]  # neither is everything refused, nor taken
    assert 0.1 < ended.count("refused") / len(ended) < 0.8
