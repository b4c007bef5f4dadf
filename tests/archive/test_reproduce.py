"""`stoker reproduce`: what a run kept is enough to train it again, and the verdict is right."""

import hashlib
import json
import linecache
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import stoker
from stoker.cli.pack import reproduce as command
from stoker.sharing.agreement import agreement, relative_difference
from stoker.sharing.archive import pack, unpack
from stoker.sharing.reproduce import reproduce
from stoker.source import load_source
from tests.archive.making import STEPS, trained, write_recipe
from tests.laws.runs import assert_same


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its recipe's file is there and as it was."""
    folder = tmp_path_factory.mktemp("reproduced")
    return trained(write_recipe(folder / "src"), folder / "run")


@pytest.fixture(scope="module")
def archive(run: Path) -> Path:
    return pack(run).path


def test_the_bits_agree(run: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, modules = list(sys.path), {*sys.modules}
    for number, original in enumerate((archive, run)):
        found = reproduce(original, f"again-{number}", quiet=True)
        assert (found.verdict, found.agrees, found.overridden, found.options) == ("bits", True, {}, {})
        assert found.comparison.tensors == 8 and found.comparison.events == 2 * STEPS + 2 * 3
        assert str(found) == "the bits agree: 8 tensors of weights and 54 logged values"
        assert_same(run, found.dir)
        record = json.loads((found.dir / "reproduction.json").read_text())
        assert (record["verdict"], record["of"], record["agrees"]) == ("bits", str(original), True)
        for name in ("seed", "limits", "options", "modules", "source_sha256", "recipe"):
            recorded = [json.loads((path / "run.json").read_text())[name] for path in (run, found.dir)]
            assert recorded[0] == recorded[1]
    assert sys.path == before
    assert not {"shapes", "sizes"} & ({*sys.modules} - modules)
    assert [p.name for p in run.iterdir() if p.name not in ("run.json", "recipe.py", "events.jsonl")] != []
    assert not list(run.rglob("__pycache__"))


def test_default_folder_and_a_run_as_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = load_source(str(write_recipe(tmp_path / "src")))
    done = stoker.fit(source.recipe({}), epochs=1, quiet=True)
    found = reproduce(done, quiet=True)
    assert found.dir.parent == done.dir.parent == Path("runs/planes") and found.dir != done.dir
    assert found.verdict == "bits"


def test_a_run_that_was_interrupted_again_and_again(run: Path, tmp_path: Path) -> None:
    file, seen = write_recipe(tmp_path / "src"), []

    def stop(progress: Any, metrics: Any) -> None:
        seen.append(progress.step)
        if progress.step in (3, 10, 16):
            signal.raise_signal(signal.SIGTERM)

    for _ in range(4):
        trained(file, tmp_path / "run", on_step=[stop], seed=5)
    assert len(seen) == STEPS
    found = reproduce(pack(tmp_path / "run").path, tmp_path / "again", quiet=True)
    assert found.verdict == "bits"
    assert_same(tmp_path / "run", found.dir)
    assert agreement(run, found.dir).verdict(1e-3) == "differs"  # another seed


def test_the_recipe_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_recipe(tmp_path / "src", width=7)
    out = trained(file, tmp_path / "run", "lr=0.01")
    archive = pack(out).path
    shutil.rmtree(file.parent)
    shutil.rmtree(out)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = reproduce(archive, "again", quiet=True)
    assert found.verdict == "bits"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert reproduce(pack(found.run, tmp_path / "second.zip").path, "third", quiet=True).verdict == "bits"


def test_the_recipe_has_changed(tmp_path: Path) -> None:
    """On the disk, and as this process has imported it: the module that only a module imports, too."""
    file = write_recipe(tmp_path / "src")
    out = trained(file, tmp_path / "run")
    write_recipe(tmp_path / "src", width=9)
    file.write_text(
        file.read_text().replace("Dropout(0.2)", "Dropout(0.9)").replace("shapes.width()", "shapes.width() + 1")
    )
    trained(file, tmp_path / "other", epochs=1)
    assert sys.modules["sizes"].WIDTH == 9
    for original in (out, pack(out).path):
        found = reproduce(original, tmp_path / f"again-{original.suffix}", quiet=True)
        assert found.verdict == "bits"
        assert_same(out, found.dir)
    assert sys.modules["sizes"].WIDTH == 9
    assert linecache.getline(str(file), 1) == file.read_text().splitlines(keepends=True)[0]
    assert "Dropout(0.2)" in (found.dir / "recipe.py").read_text()


def test_modules_that_were_not_kept_are_named(tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "src")
    file.write_text(
        file.read_text().replace(
            "import shapes", "import importlib\n\nimport shapes\n\nhidden = importlib.import_module('hidden_one')"
        )
    )
    (file.parent / "hidden_one.py").write_text("")
    out = trained(file, tmp_path / "run", epochs=1)
    del sys.modules["hidden_one"]
    found = reproduce(out, tmp_path / "again", quiet=True)
    assert found.environment == [f"{file.parent / 'hidden_one.py'} was read as it is now: the run has kept no copy"]


def test_a_default_that_json_cannot_keep(tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "src")
    file.write_text(
        file.read_text().replace('data: str = ""', 'data: str = "", act=nn.ReLU').replace("nn.ReLU()", "act()")
    )
    out = trained(file, tmp_path / "run", "lr=0.02", epochs=1)
    assert reproduce(out, tmp_path / "again", quiet=True).verdict == "bits"


def test_a_clock_is_found_out_at_its_first_step(tmp_path: Path) -> None:
    out = trained(write_recipe(tmp_path / "src"), tmp_path / "run", "clock_from=5")
    found = reproduce(out, tmp_path / "again", quiet=True)
    assert (found.verdict, found.agrees) == ("differs", False)
    first = found.comparison.first
    assert first is not None and (first.step, first.name) == (5, "train/loss") and first.then != first.now
    assert set(found.comparison.weights) > {"0.weight", "0.weight (average)"}
    assert found.comparison.final is not None
    text = str(found)
    assert text.startswith("it differs from step 5 on: train/loss\n")
    assert "8 of 8 tensors differ" in text and "look for randomness that has no seed" in text
    assert json.loads((found.dir / "reproduction.json").read_text())["comparison"]["first"]["step"] == 5


def test_a_tiny_difference(archive: Path, tmp_path: Path) -> None:
    found = reproduce(archive, tmp_path / "again", overrides=["nudge=1e-6"], quiet=True)
    assert (found.verdict, found.agrees, found.overridden) == ("metrics", True, {"nudge": 1e-6})
    largest = found.comparison.largest
    assert largest is not None and 0 < largest.relative < 1e-3
    assert all(0 < apart < 1e-2 for apart in found.comparison.weights.values()) and found.comparison.weights
    assert "within 0.001" in str(found) and "nudge=1e-06" in str(found)
    strict = reproduce(archive, tmp_path / "strict", overrides=["nudge=1e-6"], quiet=True, tolerance=1e-9)
    assert strict.verdict == "differs"


def test_overrides_and_options(run: Path, archive: Path, tmp_path: Path) -> None:
    data = tmp_path / "here"
    data.touch()
    found = reproduce(
        archive, tmp_path / "a", overrides=[f"data={data}", "lr=0.05"], workers=2, device="cpu", quiet=True
    )
    assert found.verdict == "bits" and found.overridden == {"data": str(data)}
    assert f"data={data} in place of the run's own" in str(found) and "--workers 2" in str(found)
    halves = reproduce(archive, tmp_path / "b", microbatch=4, quiet=True)
    assert halves.verdict != "bits" and "microbatch: None then, 4 now" in halves.environment
    for words in (["rate=3"], ["lr=fast"], ["lr"]):
        with pytest.raises(stoker.UserError):
            reproduce(archive, tmp_path / "c", overrides=words, quiet=True)
    assert not (tmp_path / "c").exists()


def test_data_that_are_gone(tmp_path: Path) -> None:
    data = tmp_path / "rows"
    data.touch()
    out = trained(write_recipe(tmp_path / "src"), tmp_path / "run", f"data={data}", epochs=1)
    archive = pack(out).path
    data.rename(tmp_path / "moved")
    with pytest.raises(stoker.UserError) as caught:
        reproduce(archive, tmp_path / "again", quiet=True)
    assert "KEY=PATH" in caught.value.remedy and "raise FileNotFoundError(data)" in caught.value.why
    found = reproduce(archive, tmp_path / "again", overrides=[f"data={tmp_path / 'moved'}"], quiet=True)
    assert found.verdict == "bits"


def test_packages_that_are_not_installed(archive: Path, tmp_path: Path) -> None:
    folder = unpack(archive, tmp_path / "run")
    recipe = folder / "recipe.py"
    recipe.write_text("import surely_absent\n" + recipe.read_text())
    recorded = json.loads((folder / "run.json").read_text())
    recorded["source_sha256"] = hashlib.sha256(recipe.read_bytes()).hexdigest()
    (folder / "run.json").write_text(json.dumps(recorded))
    with pytest.raises(stoker.UserError, match="surely_absent") as caught:
        reproduce(folder, tmp_path / "again", quiet=True)
    assert caught.value.remedy.startswith("install it")
    surroundings = json.loads((folder / "environment.json").read_text())
    surroundings["imports"]["surely-absent"] = "1.5"
    (folder / "environment.json").write_text(json.dumps(surroundings))
    with pytest.raises(stoker.UserError, match="surely_absent") as caught:
        reproduce(folder, tmp_path / "again", quiet=True)
    assert caught.value.remedy == "pip install surely-absent==1.5"


def test_folders_that_hold_something_else(run: Path, archive: Path, tmp_path: Path) -> None:
    unpack(archive, tmp_path / "copy")
    for out in (run, tmp_path / "copy"):
        before = (out / "events.jsonl").read_bytes()
        with pytest.raises(stoker.UserError, match="holds another run"):
            reproduce(archive, out, quiet=True)
        with pytest.raises(stoker.UserError, match="holds another run"):
            reproduce(run, out, quiet=True)
        assert (out / "events.jsonl").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(stoker.UserError, match="not a run"):
        reproduce(archive, tmp_path / "full", quiet=True)


def test_an_unfinished_or_missing_original(tmp_path: Path) -> None:
    with pytest.raises(stoker.UserError, match="no file"):
        reproduce(tmp_path / "none.zip")
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(stoker.UserError, match="stoker pack"):
        reproduce(tmp_path / "text.zip")

    def stop(progress: Any, metrics: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    out = trained(write_recipe(tmp_path / "src"), tmp_path / "run", on_step=[stop])
    with pytest.raises(stoker.UserError, match="not finished"):
        reproduce(out)


def test_an_interrupted_reproduction_goes_on(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOP_AT", "9")
    with pytest.raises(stoker.UserError, match="interrupted at step 9") as caught:
        reproduce(archive, tmp_path / "again", quiet=True)
    assert caught.value.remedy == f"stoker reproduce {archive} --out {tmp_path / 'again'}"
    monkeypatch.delenv("STOP_AT")
    assert reproduce(archive, tmp_path / "again", quiet=True).verdict == "bits"
    assert reproduce(archive, tmp_path / "again", quiet=True).verdict == "bits"  # finished: compared once more
    with pytest.raises(stoker.UserError, match="began differently"):
        reproduce(archive, tmp_path / "again", overrides=["lr=1"], quiet=True)


def test_a_run_that_was_extended(tmp_path: Path) -> None:
    """Its first end left values in the log that one piece does not have; the weights are the same."""
    file = write_recipe(tmp_path / "src")
    for steps in (11, STEPS):
        out = trained(file, tmp_path / "run", epochs=None, steps=steps, log_every=8)
    found = reproduce(out, tmp_path / "again", quiet=True)
    assert found.comparison.weights == {} and found.comparison.unmatched > 0
    assert found.verdict == "metrics"
    assert f"{found.comparison.unmatched} values were logged by one of the runs only" in str(found)


def test_other_environments_are_named(archive: Path, tmp_path: Path) -> None:
    then = unpack(archive, tmp_path / "then")
    recorded = json.loads((then / "run.json").read_text())
    recorded["versions"]["torch"] = "1.0"
    recorded["plan"]["device"] = "xpu:7"
    (then / "run.json").write_text(json.dumps(recorded))
    surroundings = json.loads((then / "environment.json").read_text())
    surroundings["cpu"]["model"] = "Abacus"
    surroundings["imports"]["numpy"] = "0.1"
    surroundings["torch"]["threads"] = 99
    surroundings["variables"]["MKL_CBWR"] = "AVX2"
    (then / "environment.json").write_text(json.dumps(surroundings))
    found = reproduce(then, tmp_path / "now", overrides=["nudge=1e-6"], quiet=True)
    lines = "\n".join(found.environment)
    for part in ("torch: 1.0 then", "device: xpu:7 then", "CPU: Abacus then", "numpy: 0.1 then", "99 then", "MKL_CBWR"):
        assert part in lines
    assert "may be why: torch: 1.0 then" in str(found)


def test_the_command(archive: Path, tmp_path: Path) -> None:
    def called(*words: Any) -> Any:
        return CliRunner().invoke(command, [*map(str, words)])

    same = called(archive, "--out", tmp_path / "a")
    assert same.exit_code == 0 and same.output.splitlines()[-1].startswith("the bits agree") and "epoch" in same.output
    other = called(archive, "lr=0.5", "--out", tmp_path / "b", "--quiet")
    assert other.exit_code == 3 and other.output.startswith("it differs from step 1 on")
    assert "with lr=0.5 in place" in other.output
    assert called(archive, "nudge=1e-6", "--out", tmp_path / "c", "--quiet").exit_code == 0
    assert isinstance(called(archive, "--out", archive.parent / "run", "--quiet").exception, stoker.UserError)


def test_relative_difference() -> None:
    assert relative_difference(1.0, 1.0) == relative_difference("nan", "nan") == relative_difference([], []) == 0
    assert relative_difference(2.0, 1) == relative_difference([5, 1.0], [5, 2.0]) == 0.5
    assert relative_difference(1e-12, -1e-12) == pytest.approx(2e-6)
    for a, b in [("nan", 1.0), ("inf", "-inf"), (10**400, 1.0), ([1], [1, 2]), (1, [1]), (None, 1)]:
        assert relative_difference(a, b) == float("inf")


def test_logs_that_differ_in_kind(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other", symlinks=True))
    log = other / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    at = max(i for i, line in enumerate(lines) if '"val/loss"' in line)
    event = json.loads(lines[at])
    for value in ("nan", [1, 2], None, event["value"] * 2):
        log.write_text("".join([*lines[:at], json.dumps({**event, "value": value}) + "\n", *lines[at + 1 :]]))
        found = agreement(run, other)
        assert found.first is not None and (found.first.step, found.first.name) == (event["step"], "val/loss")
        assert found.verdict(1e-3) == "differs" and not found.weights
    log.write_text("".join(lines[:at] + lines[at + 1 :]))
    assert agreement(run, other).unmatched == 1
    log.write_text("".join(line for line in lines if '"val/loss"' not in line))
    found = agreement(run, other)
    assert (found.unmatched, found.verdict(1e-3)) == (3, "differs")
    assert found.final is not None and (found.final.name, found.final.now) == ("val/loss", "(not logged)")
    for garbage in ("{}\n", "[1]\n", "{\n", '{"step": "x"}\n', "\xff\n"):
        log.write_text(garbage)
        with pytest.raises(stoker.UserError, match=r"events\.jsonl cannot be read"):
            agreement(run, other)
    log.write_text("".join(lines) + lines[-1])
    assert agreement(run, other).unmatched == 1
    log.write_text("".join(lines))
    assert agreement(run, other).verdict(0) == "bits"
    weights = other / "checkpoints" / os.readlink(other / "checkpoints/latest") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(stoker.UserError, match="damaged"):
        agreement(run, other)
