"""`stoker runs`: finds them, reads them however damaged they are, filters, sorts, and disturbs nobody."""

import fcntl
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from stoker.catalog.compare import compare
from stoker.catalog.listing import aligned, as_json, default_columns, select, table
from stoker.catalog.report import as_json as compared_as_json
from stoker.catalog.report import lines_of
from stoker.catalog.runfiles import DamagedRun, read_record
from stoker.catalog.runs import Listed, find_runs, list_runs, read_run
from stoker.checkpoint.store import Damaged
from stoker.checkpoint.store import read_record as stores_read_record
from stoker.cli.runs import runs as command
from stoker.errors import UserError
from tests.runs.made import copy, edit, light_copy, newest, train

_FORK = multiprocessing.get_context("fork")
PROGRAM = "from stoker.cli import cli, main; from stoker.cli.runs import runs; cli.add_command(runs); main()"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("stopped") / "run", stop_at=7)


@pytest.fixture(scope="module")
def many(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 runs: 150 learning rates, two seeds, two recipes, every tenth without a validation value."""
    root = tmp_path_factory.mktemp("many")
    for i in range(300):
        run = light_copy(whole, root / f"group-{i % 7}" / f"run-{i:03}")

        def recorded(value: dict[str, Any], i: int = i) -> None:
            value["recipe"]["name"] = ("digits", "words")[i % 2]
            value["recipe"]["arguments"] = {"lr": (i // 2) / 1000, "name": f"n{i % 3}", "layers": [i % 4, 64]}
            value["seed"] = i % 2

        def reached(value: dict[str, Any], i: int = i) -> None:
            value["metrics"] = {"val/accuracy": i / 300} if i % 10 else {"train/loss": 1.0}
            value["state"]["progress"]["best"] = [{"$tuple": [i / 300, 18]}] if i % 10 else []
            value["state"]["progress"]["finished"] = "epochs" if i % 3 else None

        edit(run / "run.json", recorded)
        edit(newest(run) / "checkpoint.json", reached)
        (run / "events.jsonl").write_text("")
    return root


def call(*words: Any) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def listed(*words: Any) -> list[dict[str, Any]]:
    """What `stoker runs --json` prints."""
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]


def in_a_process(*words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "runs", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


# What is read


def test_a_finished_run(whole: Path) -> None:
    (run,) = list_runs(whole)
    assert (run.status, run.reason, run.step, run.epoch, run.seed) == ("finished", "epochs", 18, 3, 0)
    assert run.recipe == "tiny"
    assert run.arguments == {"lr": 0.1, "width": 4, "bound": float("inf"), "judged": True}
    logged = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    accuracies = [(event["value"], event["step"]) for event in logged if event["name"] == "val/accuracy"]
    assert (run.best, run.best_name) == (max(value for value, _ in accuracies), "val/accuracy")
    assert (run.best, run.best_step) in accuracies
    assert run.metrics == {event["name"]: event["value"] for event in logged}
    files = [path for path in whole.rglob("*") if path.is_symlink() or path.is_file()]
    assert run.size == sum(path.lstat().st_size for path in files if not path.parent.is_symlink())
    assert run.written == max(
        (whole / "events.jsonl").stat().st_mtime, (newest(whole) / "checkpoint.json").stat().st_mtime
    )


def test_a_stopped_run(stopped: Path) -> None:
    (run,) = list_runs(stopped)
    assert (run.status, run.step, run.epoch) == ("stopped", 7, 1)
    assert run.best_name == "val/accuracy"
    assert run.best_step == 6


def test_without_validation_the_last_loss_is_shown(tmp_path: Path) -> None:
    run = read_run(train(tmp_path / "run", judged=False))
    assert (run.best_name, run.best_step) == ("train/loss", None)
    assert run.best == run.metrics["train/loss"]
    assert f"{run.best:.5g} train/loss (last)" in call(tmp_path).output


def test_a_run_that_was_killed_before_its_first_checkpoint(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "recipe.py").unlink()
    found = read_run(run)
    assert (found.status, found.reason, found.step) == ("stopped", "no checkpoint yet", 18)
    (run / "events.jsonl").unlink()
    assert read_run(run).step == 0


def test_a_run_in_training_is_seen_and_not_disturbed(whole: Path, tmp_path: Path) -> None:
    reached, go = _FORK.Event(), _FORK.Event()

    def wait(progress: Any, metrics: Any) -> None:
        if progress.step == 9:
            reached.set()
            assert go.wait(100)

    child = _FORK.Process(target=train, args=(tmp_path / "run",), kwargs={"on_step": wait})
    child.start()
    try:
        assert reached.wait(100)
        lock = (tmp_path / "run" / ".lock").stat()
        for _ in range(3):
            (run,) = list_runs(tmp_path)
            assert (run.status, run.step, run.epoch) == ("training", 8, 1)  # of the last event
        assert "training now" in call(tmp_path).output
        half_way = compare(whole, tmp_path / "run")
        assert half_way.bits
        assert half_way.same_to == 8
        with (tmp_path / "run" / ".lock").open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        after = (tmp_path / "run" / ".lock").stat()
        assert (after.st_mtime_ns, after.st_ino) == (lock.st_mtime_ns, lock.st_ino)
    finally:
        go.set()
        child.join()
    assert child.exitcode == 0
    assert [run.status for run in list_runs(tmp_path)] == ["finished"]
    assert compare(whole, tmp_path / "run").bits


def _try_lock(path: Path, answer: Any) -> None:
    with path.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            answer.put("free")
        except BlockingIOError:
            answer.put("held")


def test_a_run_of_this_very_process_keeps_its_lock(tmp_path: Path) -> None:
    """To open a lock file and close it again would let go of the lock that this process holds."""
    seen: list[str] = []

    def look(progress: Any, metrics: Any) -> None:
        if progress.step == 9:
            seen.extend(run.status for run in list_runs(tmp_path))
            seen.append(read_run(tmp_path / "run").status)
            answer = _FORK.Queue()
            child = _FORK.Process(target=_try_lock, args=(tmp_path / "run" / ".lock", answer))
            child.start()
            seen.append(answer.get(timeout=100))
            child.join()

    train(tmp_path / "run", on_step=look)
    assert seen == ["training", "training", "held"]


# Where it looks


def test_every_depth_links_and_hidden_folders(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for place in ("a", "b/c/d", ".hidden/e", "elsewhere/f"):
        light_copy(whole, root / place)
    light_copy(whole, root / "a" / "inside")  # of a run
    light_copy(whole, tmp_path / "outside" / "g")
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "self").symlink_to("self")
    (root / "again").symlink_to(root / "elsewhere")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "nowhere").symlink_to(tmp_path / "not there")
    found = sorted(str(path.relative_to(root)) for path in find_runs(root))
    assert found == ["a", "b/c/d", "elsewhere/f", "linked/g"]
    assert [run.path for run in list_runs(root / "a")] == [root / "a"]


def test_no_runs(tmp_path: Path) -> None:
    result = call(tmp_path)
    assert result.exit_code == 0
    assert "no runs in" in result.output
    assert "stoker train" in result.output
    assert listed_lines(call(tmp_path, "--json").stdout) == []


def listed_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("{")]


def test_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = in_a_process(tmp_path / "typo")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: there is no folder {tmp_path}/typo\n")
    assert "remedy: stoker runs FOLDER" in done.stderr
    for name in ("file", "nul\0", "x" * 5000):
        with pytest.raises(UserError):
            list_runs(tmp_path / name)


# Filters, order, columns


def numbers(many: Path, *words: Any) -> list[int]:
    return [int(run["path"][-3:]) for run in listed(many, *words)]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("lr>0.1", lambda i: i // 2 / 1000 > 0.1),
        ("lr>=1e-1", lambda i: i // 2 / 1000 >= 0.1),
        ("lr < 0.01", lambda i: i // 2 / 1000 < 0.01),
        ("lr<=0.01", lambda i: i // 2 / 1000 <= 0.01),
        ("lr=5e-2", lambda i: i // 2 == 50),
        ("lr==0.05", lambda i: i // 2 == 50),
        ("args.lr=0.05", lambda i: i // 2 == 50),
        ("seed!=1", lambda i: i % 2 == 0),
        ("recipe=digits", lambda i: i % 2 == 0),
        ("recipe>digits", lambda i: i % 2 == 1),
        ("name!=n1", lambda i: i % 3 != 1),
        ("name<3", lambda i: "n" < "3"),
        ("lr<text", lambda i: False),
        ("lr=text", lambda i: False),
        ("layers=[2, 64]", lambda i: i % 4 == 2),
        ("layers=2,64", lambda i: i % 4 == 2),
        ("layers=__import__('os')", lambda i: False),
        ("val/accuracy>=0.5", lambda i: i % 10 and i / 300 >= 0.5),
        ("val/accuracy!=0", lambda i: i % 10),  # what a run lacks it does not fulfil
        ("best>0.9", lambda i: i / 300 > 0.9 if i % 10 else True),
        ("best_name=train/loss", lambda i: i % 10 == 0),
        ("status=finished", lambda i: i % 3),
        ("status!=finished", lambda i: i % 3 == 0),
        ("written>2001-01-01", lambda i: True),
        ("step=18.0", lambda i: True),
    ],
)
def test_where(many: Path, expression: str, expected: Any) -> None:
    found = numbers(many, "--where", expression)
    assert sorted(found) == [i for i in range(300) if expected(i)]


def test_conditions_add_up(many: Path) -> None:
    found = numbers(many, "--where", "lr>0.1", "--where", "seed=0", "--where", "status=finished")
    assert sorted(found) == [i for i in range(300) if i // 2 > 100 and i % 2 == 0 and i % 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "lrr>0.1"], "no run has a value 'lrr' (did you mean lr?)"),
        (["--sort", "val/acuracy"], "no run has a value 'val/acuracy' (did you mean val/accuracy?)"),
        (["--columns", "path,stat"], "no run has a value 'stat' (did you mean status?)"),
        (["--where", "lr"], "is not a condition"),
        (["--where", "lr=>3"], "is not a condition"),
        (["--where", ">3"], "is not a condition"),
        (["--where", "a\x1b[31m>3"], "no run has a value 'a\\x1b[31m'"),
    ],
)
def test_what_is_no_name_or_no_condition(many: Path, words: list[str], message: str) -> None:
    result = call(many, *words)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\x1b" not in str(result.exception)
    assert "remedy:" in str(result.exception)


def test_nothing_matches(many: Path) -> None:
    result = call(many, "--where", "lr>7")
    assert result.exit_code == 0
    assert "none of the 300 runs" in result.output


@pytest.mark.parametrize("reverse", [False, True])
def test_sort(many: Path, reverse: bool) -> None:
    words = ["--reverse"] if reverse else []
    found = numbers(many, "--sort", "val/accuracy", *words)
    having = sorted((i for i in range(300) if i % 10), reverse=reverse)
    assert found[:270] == having
    assert set(found[270:]) == {i for i in range(300) if i % 10 == 0}  # without it: last, in either order
    names = [run["recipe"] for run in listed(many, "--sort", "recipe", *words)]
    assert names == sorted(names, reverse=reverse)


def test_numbers_sort_as_numbers_then_texts_then_nan_then_nothing() -> None:
    values = {"a": "x", "b": 10, "c": 9.5, "d": float("nan"), "e": True, "f": None}
    found = [Listed(Path(name), arguments={"v": value}) for name, value in values.items()] + [Listed(Path("g"))]
    order = "".join(str(run.path) for run in select(found, sort="v"))
    assert order == "ecbfadg"  # None is a text: "None"
    assert "".join(str(run.path) for run in select(found, sort="v", reverse=True)) == "afbcedg"
    assert [str(run.path) for run in select(found, ["v=nan"])] == ["d"]
    assert [str(run.path) for run in select(found, ["v=none"])] == ["f"]
    assert [str(run.path) for run in select(found, ["v=true"])] == ["e"]
    assert [str(run.path) for run in select(found, ["v>9"])] == ["b", "c"]


def test_an_argument_called_as_a_column_is() -> None:
    found = [Listed(Path(str(i)), recipe="r", arguments={"size": f"s{i}"}, size=7) for i in range(3)]
    assert [run.path.name for run in select(found, ["args.size=s1"])] == ["1"]
    assert len(select(found, ["size=7"])) == 3
    assert "args.size" in default_columns(found)


def test_limit_and_columns(many: Path) -> None:
    result = call(many, "--sort", "lr", "--limit", 4, "--columns", "path,lr,val/accuracy,best_name")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["path", "lr", "val/accuracy", "best_name"]
    assert lines[1].split()[1:] == ["0.0", "train/loss"]
    assert lines[2].split()[1:] == ["0.0", "0.0033333", "val/accuracy"]
    assert "296 more are left out" in result.output
    one = listed(many, "--limit", 1, "--columns", "seed,val/accuracy,arguments")
    assert one == [{"seed": 0, "val/accuracy": None, "arguments": {"lr": 0.0, "name": "n0", "layers": [0, 64]}}]


def test_columns_are_the_arguments_that_differ() -> None:
    some = [{"lr": 0, "same": 1}, {"lr": 1, "same": 1, "odd": 1}]
    found = [Listed(Path(str(i)), recipe="r", arguments=arguments) for i, arguments in enumerate(some)]
    assert default_columns(found)[:5] == ["path", "recipe", "lr", "odd", "seed"]
    assert default_columns(found[:1])[:3] == ["path", "recipe", "seed"]
    others = [Listed(Path(name), recipe="q", arguments={"depth": name}) for name in "xy"]
    two = [*found, *others, Listed(Path("z"), status="damaged", reason="?")]
    assert default_columns(two)[:4] == ["path", "recipe", "arguments", "seed"]
    rows, _ = table(two, ["path", "arguments"])
    assert rows[2] == ["1", "lr=1  odd=1"]
    assert rows[-2:] == [["y", "depth=y"], ["z", ""]]


def test_a_table_is_aligned_and_folds_on_a_narrow_terminal() -> None:
    rows = [["name", "value"], ["日本", "1"], ["a" * 30, "22"]]
    lines = aligned(rows, [False, True])
    assert lines[1] == "日本" + " " * 26 + "  " + "    1"
    assert lines[2] == "a" * 30 + "  " + "   22"
    folded = aligned(rows, [False, True], width=20)
    assert max(map(len, folded)) <= 20
    assert "".join(line.split()[0] for line in folded[2:]) == "a" * 30


def test_nothing_heavy_is_imported(many: Path) -> None:
    heavy = "import sys; print({'torch', 'numpy', 'torchmetrics'} & set(sys.modules), file=sys.stderr)"
    code = f"import atexit\natexit.register(lambda: exec({heavy!r}))\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", code, "runs", str(many)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    assert len(done.stdout.splitlines()) == 301


def test_a_terminal_without_unicode(whole: Path, tmp_path: Path) -> None:
    light_copy(whole, tmp_path / "läuft-日本")
    done = in_a_process(tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "l\\xe4uft-" in done.stdout


# Damage


def test_control_characters_stay_off_the_terminal(whole: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\r\n\u202e"
    run = light_copy(whole, tmp_path / f"run{evil}")
    light_copy(whole, Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")))
    edit(run / "run.json", lambda value: value["recipe"].update(name=evil, arguments={evil: evil}))
    edit(newest(run) / "checkpoint.json", lambda value: value["state"]["progress"].update(finished=evil))
    text = call(tmp_path).output
    assert len(text.splitlines()) == 3
    assert not [c for c in text if c != "\n" and not c.isprintable()]
    assert evil in [run["recipe"] for run in listed(tmp_path)]
    assert not [c for c in call(tmp_path, "--json").stdout if c != "\n" and not c.isprintable()]
    report = "\n".join(lines_of(compare(whole, run), True, None, True))
    assert not [c for c in report if c != "\n" and not c.isprintable()]


DEEP = "[" * 100_000
BROKEN = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("[]", "not an object"),
    ("null", "not an object"),
    ("\0\0\0", "not JSON"),
    ("NaN", "not an object"),
    ("{}", "lacks recipe"),
    (DEEP, "nested too deep"),
    ("[" * 500 + "]" * 500, "nested too deep"),
    ('{"recipe": {}, "seed": ' + "9" * 5000 + "}", "not JSON"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_run_json(whole: Path, tmp_path: Path, text: str, reason: str) -> None:
    run = light_copy(whole, tmp_path / "run")
    (run / "run.json").write_text(text)
    found = read_run(run)
    assert found.status == "damaged"
    assert reason in found.reason
    assert len(found.reason) < 200
    assert found.size > 0
    with pytest.raises(UserError, match="cannot be compared"):
        compare(whole, run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.update(seed=float("nan")), "run.json: seed is a float, not a int"),
        (lambda r: r.update(seed=True), "seed is a bool"),
        (lambda r: r["recipe"].update(arguments=[1]), "arguments is a list"),
        (lambda r: r["recipe"].update(name=None), "name is a NoneType"),
        (lambda r: r.pop("limits"), "lacks limits"),
        (lambda r: r["limits"].update(epochs="3"), "epochs is a str"),
        (lambda r: r["plan"].pop("precision"), "lacks precision"),
        (lambda r: r.update(modules=["../../etc/passwd"]), "outside the run"),
        (lambda r: r.update(modules=["/etc/passwd"]), "outside the run"),
        (lambda r: r.update(modules=[3]), "outside the run"),
        (lambda r: r.update(modules=["gone.py"]), "source/gone.py is missing"),
    ],
)
def test_wrong_types_in_run_json(whole: Path, tmp_path: Path, change: Any, reason: str) -> None:
    run = light_copy(whole, tmp_path / "run")
    edit(run / "run.json", lambda value: (change(value), None)[1])
    found = read_run(run)
    assert found.status == "damaged"
    assert reason in found.reason


def test_files_that_are_none(whole: Path, tmp_path: Path) -> None:
    for name in ("link", "pipe", "folder", "no-source", "file-for-checkpoints"):
        light_copy(whole, tmp_path / name)
    for name in ("link", "pipe", "folder"):
        (tmp_path / name / "run.json").unlink()
    (tmp_path / "link" / "run.json").symlink_to(whole / "run.json")
    os.mkfifo(tmp_path / "pipe" / "run.json")
    (tmp_path / "folder" / "run.json").mkdir()
    (tmp_path / "no-source" / "recipe.py").unlink()
    shutil.rmtree(tmp_path / "file-for-checkpoints" / "checkpoints")
    (tmp_path / "file-for-checkpoints" / "checkpoints").write_text("")
    reasons = {run.path.name: (run.status, run.reason) for run in list_runs(tmp_path)}
    assert reasons == {
        "link": ("damaged", "run.json is a link"),
        "pipe": ("damaged", "run.json is not a file"),
        "folder": ("damaged", "run.json is not a file"),
        "no-source": ("damaged", "recipe.py is missing"),
        "file-for-checkpoints": ("damaged", "checkpoints cannot be read: Not a directory"),
    }
    text = call(tmp_path, "--sort", "status").output
    assert text.count("damaged: ") == 5


def test_odd_lock_files(whole: Path, tmp_path: Path) -> None:
    run = light_copy(whole, tmp_path / "run")
    for make in (lambda p: os.mkfifo(p), lambda p: p.symlink_to(whole / "run.json"), lambda p: p.mkdir()):
        make(run / ".lock")
        assert read_run(run).status == "finished"
        (run / ".lock").rmdir() if (run / ".lock").is_dir() else (run / ".lock").unlink()


def test_the_newest_good_checkpoint_counts(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    (newest(run) / "checkpoint.json").write_text("{")
    found = read_run(run)
    assert (found.status, found.step) == ("stopped", int(names[-2].split("-")[1]))
    assert f"{names[-1]}/checkpoint.json is not JSON" in found.reason
    for name in names:
        (run / "checkpoints" / name / "checkpoint.json").write_text("{}")
    found = read_run(run)
    assert found.status == "damaged"
    assert names[-1] in found.reason


def test_a_kill_between_two_renames(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    last = newest(run)
    last.rename(last.with_name(f".replaced-{last.name}"))
    assert read_run(run).step == 18
    assert not last.exists()  # it is read where it is


EVERYTHING: list[Any] = [
    None,
    True,
    -1,
    10**400,
    1e999,
    float("nan"),
    "x" * 9,
    [],
    [[1]],
    {},
    {"a": {"b": 1}},
    {"$float": "x"},
]


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is a value, in a nest of dicts and lists."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


def put(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The nest with another value in one place."""
    if not path:
        return value
    inside: Any = dict(node) if isinstance(node, dict) else list(node)
    inside[path[0]] = put(inside[path[0]], path[1:], value)
    return inside


def look_at(whole: Path, run: Path) -> None:
    """Everything that shows a run, which must take it as it is."""
    found = read_run(run)
    assert found.status in ("finished", "stopped", "damaged")
    assert bool(found.reason) or found.status == "stopped"
    rows, right = table([found], [*default_columns([found, found]), "arguments", *found.metrics])
    aligned(rows, right)
    json.loads(as_json(found), parse_constant=pytest.fail)
    select([found], ["step>=0", "best<0"], "best")
    try:
        report = compare(whole, run)
    except UserError:
        return
    lines_of(report, True, None, True)
    json.loads(compared_as_json(report), parse_constant=pytest.fail)


def test_any_value_in_any_place(whole: Path, tmp_path: Path) -> None:
    run = light_copy(whole, tmp_path / "run")
    (run / "events.jsonl").write_text((whole / "events.jsonl").read_text()[-2000:])
    draw = random.Random(0)
    for file in (run / "run.json", newest(run) / "checkpoint.json"):
        good = file.read_text()
        value = json.loads(good)
        every = places(value)
        for place in every if len(every) < 60 else draw.sample(every, 60):
            for other in draw.sample(EVERYTHING, 4):
                file.write_text(good)
                edit(file, lambda now, place=place, other=other: put(now, place, other))
                look_at(whole, run)
                if file.name == "checkpoint.json":
                    _never_laxer(file.parent)
        file.write_text(good)
    events = (run / "events.jsonl").read_text().splitlines()[-1]
    for place in places(json.loads(events)):
        for other in EVERYTHING:
            (run / "events.jsonl").write_text(json.dumps(put(json.loads(events), place, other)) + "\n")
            look_at(whole, run)


def test_any_damage_to_bytes(whole: Path, tmp_path: Path) -> None:
    run = light_copy(whole, tmp_path / "run")
    draw = random.Random(1)
    for file in (run / "run.json", run / "events.jsonl", newest(run) / "checkpoint.json"):
        good = file.read_bytes()
        value = json.loads(good) if file.name == "checkpoint.json" else None
        for _ in range(60):
            at, length = draw.randrange(len(good)), draw.choice((0, 1, 5, 10**9))
            file.write_bytes(good[:at] + draw.randbytes(draw.randrange(4)) + good[at + length :])
            look_at(whole, run)
            if file.name == "checkpoint.json":
                _agree(file.parent, value)
        file.write_bytes(good)
    assert read_run(run).status == "finished"
    _agree(newest(run))


def _never_laxer(checkpoint: Path) -> None:
    """What the listing takes for good the store does; types inside the state are the listing's own care."""
    try:
        ours = read_record(checkpoint)
    except DamagedRun:
        return
    assert ours == stores_read_record(checkpoint)


def _agree(checkpoint: Path, original: Any = None) -> None:
    """The store and the listing take the same records for good; the store is stricter with blanks."""
    try:
        theirs = stores_read_record(checkpoint)
    except Damaged:
        theirs = None
    try:
        ours = read_record(checkpoint)
    except DamagedRun:
        ours = None
    assert ours in (theirs, original)
    assert (theirs is None) or theirs == ours


def test_a_record_of_another_step(whole: Path, tmp_path: Path) -> None:
    run = light_copy(whole, tmp_path / "run")
    edit(newest(run) / "checkpoint.json", lambda record: record.update(step=17))
    _never_laxer(newest(run))
    assert "checkpoint.json is that of step 17" in read_run(run).reason


def test_a_damaged_run_has_no_value_to_match(whole: Path, tmp_path: Path) -> None:
    light_copy(whole, tmp_path / "good")
    (light_copy(whole, tmp_path / "bad") / "run.json").write_text("{")
    assert [Path(run["path"]).name for run in listed(tmp_path, "--where", "seed!=3")] == ["good"]
    assert [Path(run["path"]).name for run in listed(tmp_path, "--where", "recipe!=x")] == ["good"]
    assert [Path(run["path"]).name for run in listed(tmp_path, "--where", "status=damaged")] == ["bad"]
    assert [Path(run["path"]).name for run in listed(tmp_path, "--sort", "seed")] == ["good", "bad"]
    assert listed(tmp_path, "--where", "status=damaged")[0]["seed"] is None
