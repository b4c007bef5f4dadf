"""`stoker compare`: what two runs have in common, and the first step at which their bits differ."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stoker.catalog.compare import ABSENT, Comparison, compare
from stoker.catalog.report import lines_of, sparkline
from stoker.cli.compare import compare as command
from stoker.errors import UserError
from tests.runs.made import RECIPE, copy, edit, edit_events, newest, train

PROGRAM = "from stoker.cli import cli, main; from stoker.cli.compare import compare; cli.add_command(compare); main()"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    return train(root / "whole")


def text(comparison: Comparison, everything: bool = False) -> str:
    return "\n".join(lines_of(comparison, everything, None, True))


def logged(run: Path, name: str) -> list[tuple[int, Any]]:
    """(step, value) of a name, as the run's file has them."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [(event["step"], event["value"]) for event in events if event["name"] == name]


# Runs that are the same


def test_the_same_run_twice(whole: Path, root: Path) -> None:
    found = compare(whole, train(root / "again"))
    assert found.bits
    assert (found.first_difference, found.same_to, found.steps) == (None, 18, (18, 18))
    assert found.verdict == "same bits to step 18"
    assert found.explanation == ""
    assert (list(found.source), list(found.decided), found.alone) == ([], [], ([], []))
    assert set(found.differences) <= {"recipe"}  # the file is another
    assert found.compared == 3 * 9 - 9 + 2 * 3  # train/loss and train/lr every 2 steps, two values at 3 epochs' ends
    assert found.weights == {18: True} | {step: True for step in found.weights}
    assert "same arguments, seed, limits, options, plan, versions, git commit, source" in text(found)
    assert compare(whole, whole).verdict == "same bits to step 18"


def test_an_interrupted_run_and_the_same_resumed(whole: Path, root: Path) -> None:
    half = train(root / "half", stop_at=7)
    found = compare(whole, half)
    assert found.bits
    assert (found.verdict, found.steps) == ("same bits to step 6", (18, 6))
    assert found.alone == ([], [])
    assert "the events of A go on to step 18, those of B end at 6" in text(found)
    assert "the events of B go on to step 18, those of A end at 6" in text(compare(half, whole))
    assert compare(whole, train(half)).verdict == "same bits to step 18"


def test_another_log_every_compares_what_can_be(whole: Path, root: Path) -> None:
    """A mean over 3 steps is not a mean over 2; validation and learning rates are the same all the same."""
    found = compare(whole, train(root / "every-3", log_every=3))
    assert found.bits
    assert found.verdict == "same bits to step 18"
    assert found.differences["options"] == {"log_every": (2, 3)}
    assert found.curves["train/loss"].compared == 0
    assert found.curves["train/lr"].compared == 3
    assert found.curves["val/loss"].compared == 3
    assert [step for step, name in found.alone[1] if name == "train/loss"] == [3, 9, 15]
    assert "not comparable" in text(found)


# Runs that differ


def test_another_argument(whole: Path, root: Path) -> None:
    other = train(root / "lr", lr=0.2)
    found = compare(whole, other)
    assert found.differences["arguments"] == {"lr": (0.1, 0.2)}
    assert found.decided == ["argument lr"]
    a, b = logged(whole, "train/loss")[0][1], logged(other, "train/loss")[0][1]
    assert found.first_difference == (2, "train/loss", a, b)
    assert not found.bits
    assert found.verdict == f"differ from step 2 on: train/loss {a} vs {b}"
    assert found.explanation == ""
    assert found.weights[18] is False
    curve = found.curves["train/lr"]
    assert curve.first_difference == (2, 0.1, 0.2)
    assert curve.last == (0.1, 0.2)
    assert "what decides it differs: argument lr" in text(found)


def test_last_and_best_values(whole: Path, root: Path) -> None:
    other = train(root / "values", lr=0.3)
    found = compare(whole, other)
    for name, best in (("val/loss", min), ("val/accuracy", max), ("train/loss", min)):
        values = [[value for _, value in logged(run, name)] for run in (whole, other)]
        assert found.curves[name].last == (values[0][-1], values[1][-1])
        assert found.curves[name].best == (best(values[0]), best(values[1]))
    row = next(line for line in text(found).splitlines() if line.startswith("val/accuracy"))
    a, b = found.curves["val/accuracy"].last
    assert f"{b - a:+.3g}" in row.split()
    assert found.curves["train/lr"].best == (None, None)  # nobody knows what is best


def test_what_is_best_is_what_the_run_judged_by(whole: Path, root: Path) -> None:
    """`best_mode` counts, not the name."""
    run = copy(whole, root / "odd-name")
    odd = copy(whole, root / "odd-name-too")
    for folder in (run, odd):
        edit_events(folder, lambda e: e.update(name="val/error") if e["name"] == "val/accuracy" else None)
        for path in (folder / "checkpoints").glob("step-*/checkpoint.json"):
            edit(path, lambda r: r["metrics"].update({"val/error": r["metrics"].pop("val/accuracy")}))
    values = [value for _, value in logged(run, "val/error")]
    assert max(values) > min(values)
    assert compare(run, odd).curves["val/error"].best == (max(values), max(values))


def test_another_seed_and_other_limits(whole: Path, root: Path) -> None:
    other = train(root / "seed", seed=1)
    edit(other / "run.json", lambda r: r["limits"].update(epochs=4))
    found = compare(whole, other)
    assert found.differences["seed"] == {"seed": (0, 1)}
    assert found.differences["limits"] == {"epochs": (3, 4)}
    assert found.decided == ["seed"]  # no schedule is a function of the length
    edit(other / "run.json", lambda r: r["limits"].update(length_matters=True))
    assert compare(whole, other).decided == ["seed", "epochs"]


def test_another_source(whole: Path, root: Path) -> None:
    other = train(root / "source", source=RECIPE.replace("torch.optim.Adam(", "torch.optim.AdamW("))
    found = compare(whole, other)
    assert found.decided == ["source"]
    removed, added = ([line for line in found.source if line[0] == sign and line[1] != sign] for sign in "-+")
    assert removed == ["-        optimizer=lambda params: torch.optim.Adam(params, lr=lr),"]
    assert added == ["+        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),"]
    assert "A/recipe.py" in found.source[0]
    assert "source" not in next(line for line in text(found).splitlines() if line.startswith("same "))


def test_modules_beside_the_recipe(whole: Path, root: Path) -> None:
    runs = [copy(whole, root / f"modules-{i}") for i in range(2)]
    for i, run in enumerate(runs):
        (run / "source").mkdir()
        (run / "source" / "parts.py").write_text(f"WIDTH = {i}\n")
        edit(run / "run.json", lambda r: r.update(modules=["parts.py"]))
    found = compare(*runs)
    assert [line for line in found.source if line[0] in "+-"][2:] == ["-WIDTH = 0", "+WIDTH = 1"]
    assert any(line == "+WIDTH = 1" for line in compare(whole, runs[1]).source)
    (runs[0] / "source" / "parts.py").unlink()
    assert f"{runs[0]}: parts.py is missing" in compare(*runs).notes


def test_architecture_and_parts_that_are_new(whole: Path, root: Path) -> None:
    runs = [copy(whole, root / f"built-{i}") for i in range(2)]
    assert compare(*runs).architecture in (None, {})
    for i, run in enumerate(runs):
        about = {"0": f"Linear(4, {4 + i})", "1": "Linear(4, 2)", **({"2": "ReLU()"} if i else {})}
        edit(run / "run.json", lambda r, about=about: r.update(architecture=about))
        edit(run / "run.json", lambda r, i=i: r.update(surroundings={"cpu": {"model": f"cpu {i}", "cores": 2}}))
    found = compare(*runs)
    assert found.architecture == {"0": ("Linear(4, 4)", "Linear(4, 5)"), "2": (ABSENT, "ReLU()")}
    assert found.differences["surroundings"] == {"cpu.model": ("cpu 0", "cpu 1")}
    report = text(found)
    assert "Linear(4, 5)" in report
    assert "cpu.model" in report
    edit(runs[1] / "run.json", lambda r: r.pop("architecture") and None)
    found = compare(*runs)
    assert found.architecture is None  # what only one has recorded says nothing
    assert "architecture" not in text(found)


# The same function of the same values, and other bits


@pytest.fixture
def flipped(whole: Path, tmp_path: Path) -> Path:
    """The same run, with the last bit of one value of step 8 another one."""
    run = copy(whole, tmp_path / "flipped")

    def flip(event: dict[str, Any]) -> None:
        if (event["step"], event["name"]) == (8, "train/loss"):
            event["value"] = math.nextafter(event["value"], 2)

    edit_events(run, flip)
    return run


def test_one_bit(whole: Path, flipped: Path) -> None:
    found = compare(whole, flipped)
    assert found.first_difference is not None
    assert found.first_difference[:2] == (8, "train/loss")
    assert not found.bits
    a, b = dict(logged(whole, "train/loss"))[8], dict(logged(flipped, "train/loss"))[8]
    assert found.verdict == f"same bits to step 6, differ from step 8 on: train/loss {a} vs {b}"
    assert "a law of stoker is broken" in found.explanation
    assert found.curves["val/loss"].first_difference is None


def test_what_may_have_changed_the_bits_is_named(whole: Path, flipped: Path) -> None:
    edit(flipped / "run.json", lambda r: r["versions"].update(torch="1.0"))
    edit(flipped / "run.json", lambda r: r["plan"].update(device="cuda:0", workers=7))
    found = compare(whole, flipped)
    assert found.decided == []
    assert "law" not in found.explanation
    assert "vs 1.0" in found.explanation
    assert "device cpu vs cuda:0" in found.explanation
    assert "workers" not in found.explanation  # they change nothing
    assert found.explanation in text(found)


def test_other_weights_behind_the_same_values(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    edit(newest(run) / "checkpoint.json", lambda r: r["files"]["model.safetensors"].update(sha256="0" * 64))
    found = compare(whole, run)
    assert found.bits
    assert found.weights[18] is False
    assert found.verdict == "same values to step 18, but other weights in the checkpoint of step 18"
    assert "law" in found.explanation


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("nan", "nan", True),
        ("inf", "inf", True),
        ("inf", "-inf", False),
        ("nan", 1.0, False),
        (0.0, -0.0, False),
        (1, 1.0, False),
        (None, None, True),
        ([1.0, "nan"], [1.0, "nan"], True),
        ([1.0, "nan"], [1.0, 2.0], False),
        (5e-324, 5e-324, True),
        (10**400, 10**400, True),
    ],
)
def test_values_that_compare_oddly(whole: Path, tmp_path: Path, a: Any, b: Any, same: bool) -> None:
    runs = copy(whole, tmp_path / "a"), copy(whole, tmp_path / "b")
    for run, value in zip(runs, (a, b), strict=True):
        edit_events(run, lambda e, value=value: e.update(value=value) if e["name"] == "val/loss" else None)
    found = compare(*runs)
    assert found.bits is same
    assert (found.curves["val/loss"].first_difference is None) is same
    for everything in (False, True):
        assert "val/loss" in text(found, everything)
    result = CliRunner().invoke(command, [*map(str, runs), "--json"])
    assert json.loads(result.stdout, parse_constant=pytest.fail)["bits"] is same


def test_best_passes_over_nan(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "a")
    edit_events(run, lambda e: e.update(value="nan") if (e["name"], e["step"]) == ("val/loss", 18) else None)
    curve = compare(run, whole).curves["val/loss"]
    assert curve.best[0] == min(value for _, value in logged(whole, "val/loss")[:2])
    assert math.isnan(curve.last[0])


def test_a_log_that_is_still_written_and_one_that_is_damaged(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:12]) + lines[12][:20])
    found = compare(whole, run)
    assert found.bits
    assert found.notes == []
    (run / "events.jsonl").write_text("".join(["{}\n", "\0\0\n", "[" * 9999 + "\n", *lines[:12]]))
    found = compare(whole, run)
    assert found.bits
    assert found.notes == ["B: 3 lines of events.jsonl are damaged, and were passed over"]
    (run / "events.jsonl").unlink()
    found = compare(whole, run)
    assert (found.bits, found.compared) == (False, 0)
    assert found.verdict == "nothing to compare: no value was logged by both at the same step"
    assert found.notes == ["B: events.jsonl is missing"]
    assert "nothing to compare" in text(found)


def test_a_value_that_one_run_lacks_is_told(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    lines = [
        line
        for line in (run / "events.jsonl").read_text().splitlines()
        if '"step": 12, ' not in line or "val/" not in line
    ]
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    found = compare(whole, run)
    assert found.bits  # of what both have
    assert found.alone == ([(12, "val/accuracy"), (12, "val/loss")], [])
    assert "2 values are in A alone, from step 12 on" in text(found)


# The command


def test_the_command(whole: Path, flipped: Path) -> None:
    result = CliRunner().invoke(command, [str(whole), str(flipped)])
    assert result.exit_code == 0  # they differ, and that was the question
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["A", str(whole)]
    assert "finished: all epochs, step 18" in lines[0]
    assert compare(whole, flipped).verdict in lines
    drawn = [line for line in lines if "▁" in line]
    assert len(drawn) >= 4
    assert any(line.startswith("val/loss") for line in drawn)
    everything = CliRunner().invoke(command, [str(whole), str(flipped), "--all"])
    assert everything.exit_code == 0
    assert "log_every" in everything.stdout
    assert "log_every" not in result.stdout


def test_json(whole: Path, root: Path) -> None:
    other = train(root / "json", width=5)
    result = CliRunner().invoke(command, [str(whole), str(other), "--json"])
    value = json.loads(result.stdout, parse_constant=pytest.fail)
    assert value["differences"]["arguments"] == {"width": [4, 5]}
    assert value["first_difference"][:2] == [2, "train/loss"]
    assert value["curves"]["val/loss"]["points"] == [3, 3]
    assert value["verdict"].startswith("differ from step 2 on")


def test_what_is_no_run(whole: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "typo", whole / "run.json"):
        with pytest.raises(UserError, match="is not a run"):
            compare(whole, path)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "run.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"run\.json is a link"):
        compare(tmp_path / "link", whole)


def test_messages_and_exits_of_the_process(whole: Path, tmp_path: Path) -> None:
    def call(*words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, "compare", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
        )

    done = call(whole, tmp_path / "typo")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0] == f"error: {tmp_path}/typo is not a run"
    assert "remedy:" in done.stderr
    done = call(whole, whole, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "same bits to step 18" in done.stdout
    assert "#" in done.stdout  # curves without block characters


def test_sparklines() -> None:
    columns = [(i, i) for i in range(1, 7)]
    points = [(1, 0.0), (2, 1.0), (3, 0.5), (4, math.nan), (6, 7)]
    assert sparkline(points, columns, (0.0, 1.0), "▁▂▃▄▅▆▇█") == "▁█▅! █"
    assert sparkline([(1, 2.0)], [(1, 1)], (2.0, 2.0), "▁█") == "▁"
    assert sparkline([(1, -1e308), (2, 1e308)], [(1, 1), (2, 2)], (-1e308, 1e308), "ab") == "ab"
    assert sparkline([(i, float(i)) for i in range(100)], [(0, 49), (50, 99)], (0.0, 99.0), "ab") == "ab"
