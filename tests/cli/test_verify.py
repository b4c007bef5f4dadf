"""`stoker verify`: what it says and how it exits, on runs that are good, damaged, half written, or none at all."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  (optimizers import it: once here instead of once in every child)

import stoker
from stoker.source import load_source
from tests.checkpoint.mutations import write_recipe
from tests.checkpoint.test_fuzz import survey
from tests.laws.runs import run, run_killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("verify")
    recipe = load_source(str(write_recipe(folder))).recipe({})
    return stoker.fit(recipe, epochs=2, out=folder / "run", checkpoint_every=3, quiet=True).dir


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be altered."""
    return Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


def told(path: Path, log: Path) -> tuple[int, list[str]]:
    """Exit code and lines of `stoker verify`."""
    log.unlink(missing_ok=True)
    code = run(["verify", path], log)
    said = log.read_text()
    assert "Traceback" not in said
    return code, said.splitlines()


def lines_of(said: list[str]) -> dict[str, tuple[bool, str]]:
    """Name of every part, whether it is good, and what is said of it."""
    found = {}
    for line in said:
        name, verdict, *words = line.split(maxsplit=2)
        assert verdict in ("good", "DAMAGED"), said
        found[name] = verdict == "good", "".join(words)
    return found


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def test_a_good_run(out: Path, tmp_path: Path) -> None:
    before = survey(out)
    code, said = told(out, tmp_path / "log")
    found = lines_of(said)
    names = [path.name for path in checkpoints(out)]
    assert code == 0 and len(names) == 2
    assert list(found) == [*names, "latest", "best", "run.json", "events.jsonl"]
    assert all(good for good, _ in found.values())
    assert found["latest"][1] == names[-1]
    assert found["best"][1] in names
    assert "with recipe.py and 3 modules" in found["run.json"][1]
    count = len((out / "events.jsonl").read_text().splitlines())
    assert found["events.jsonl"][1] == f"{count} events"
    assert survey(out) == before


def test_one_checkpoint(out: Path, tmp_path: Path) -> None:
    older, newer = checkpoints(out)
    (older / "model.safetensors").write_bytes(b"")
    for path, expected in ((older, 1), (newer, 0), (out / "checkpoints" / "latest", 0)):
        code, said = told(path, tmp_path / "log")
        assert (code, len(said)) == (expected, 1)
        assert said[0].startswith(older.name if path == older else newer.name)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "ema.safetensors", "checkpoint.json"])
def test_a_flipped_bit(out: Path, tmp_path: Path, name: str) -> None:
    path = checkpoints(out)[0]
    flip(path / name)
    code, said = told(out, tmp_path / "log")
    found = lines_of(said)
    assert code == 1
    assert [part for part, (good, _) in found.items() if not good] == [path.name]
    assert f"{path.name}/{name}" in found[path.name][1]


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def linked(path: Path) -> None:
    other = path.parent.parent / "other"
    path.rename(other)
    path.symlink_to(other)


def removed(path: Path) -> None:
    path.unlink()


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x\n")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 << 30)


@pytest.mark.parametrize("how", [pipe, linked, removed, longer, huge])
@pytest.mark.parametrize("name", ["CHECKPOINT/model.safetensors", "run.json", "recipe.py", "events.jsonl"])
def test_what_is_not_what_was_written(out: Path, tmp_path: Path, name: str, how: Callable[[Path], None]) -> None:
    checkpoint = checkpoints(out)[-1]
    how(out / name.replace("CHECKPOINT", str(checkpoint.relative_to(out))))
    code, said = told(out, tmp_path / "log")
    bad = [part for part, (good, _) in lines_of(said).items() if not good]
    if (name, how) == ("events.jsonl", removed):  # the run has not logged anything
        assert (code, bad) == (0, [])
        return
    expected = {"CHECKPOINT/model.safetensors": checkpoint.name, "recipe.py": "run.json"}.get(name, name)
    assert (code, bad) == (1, [expected])


def test_events_that_a_kill_cut_off(out: Path, tmp_path: Path) -> None:
    data = (out / "events.jsonl").read_bytes()
    (out / "events.jsonl").write_bytes(data[:-5])
    code, said = told(out, tmp_path / "log")
    assert code == 0
    assert "cut off: a resume writes it again" in lines_of(said)["events.jsonl"][1]
    lines = data.split(b"\n")
    for odd in (b"null", b"{}", b"\xff", b"[" * 100_000, lines[1][:-9]):
        (out / "events.jsonl").write_bytes(b"\n".join([lines[0], odd, *lines[2:]]))
        code, said = told(out, tmp_path / "log")
        assert code == 1
        assert lines_of(said)["events.jsonl"][1].startswith("line 2: ")


@pytest.mark.parametrize("target", ["../..", "nowhere", "latest", "/etc", "../run.json"])
@pytest.mark.parametrize("name", ["latest", "best"])
def test_links_that_lead_elsewhere(out: Path, tmp_path: Path, name: str, target: str) -> None:
    (out / "checkpoints" / name).unlink()
    (out / "checkpoints" / name).symlink_to(target)
    code, said = told(out, tmp_path / "log")
    found = lines_of(said)
    assert code == 1
    assert [part for part, (good, _) in found.items() if not good] == [name]
    assert repr(target) in found[name][1]


def test_names_that_a_terminal_would_obey(out: Path, tmp_path: Path) -> None:
    """Nor can a name feign a line of its own."""
    name = "step-00000009-epoch-2-loss-\x1b[2J\x9b31m\u202e\nrun.json  good  indeed"
    shutil.copytree(checkpoints(out)[0], out / "checkpoints" / name)
    shutil.copytree(checkpoints(out)[0], out / "checkpoints" / os.fsdecode(b"step-00000010-epoch-2-loss-\xff"))
    code, said = told(out, tmp_path / "log")
    assert code == 1
    assert len(said) == 8
    assert [line for line in said if not line.isprintable()] == []


def test_a_run_that_was_killed_while_it_saved(out: Path, tmp_path: Path) -> None:
    """Whatever the kill left half done is no damage, and the next save clears it away."""
    file = write_recipe(tmp_path / "again")
    words = ["train", file, "--epochs", 200, "--out", tmp_path / "killed", "--checkpoint-every", 1, "--quiet"]
    words += ["--keep", 3]
    log, strays = tmp_path / "log", list[str]()
    for delay_s in (0.05, 0.11, 0.17, 0.23):
        events = tmp_path / "killed" / "events.jsonl"
        assert run_killed(words, log, delay_s, after=events) == -signal.SIGKILL
        strays += [path.name for path in (tmp_path / "killed" / "checkpoints").glob(".*")]
        code, said = told(tmp_path / "killed", log)
        assert code == 0, said
        assert all(good for good, _ in lines_of(said).values())
    # And what no kill is sure to leave: each hidden name there is, with rubbish in it.
    shutil.rmtree(tmp_path / "killed")
    newest = checkpoints(out)[-1].name
    for name in (".partial-00000007", f".dropped-{newest}", f".replaced-{newest}"):
        (out / "checkpoints" / name).mkdir()
        (out / "checkpoints" / name / "checkpoint.json").write_text("{")
    (out / "checkpoints" / ".latest.tmp").symlink_to("nowhere")
    (out / ".run.json.tmp").write_text("{")
    code, said = told(out, log)
    assert code == 0, said


@pytest.mark.parametrize("kind", ["empty", "missing", "file", "weights", "recipe", "checkpoints"])
def test_what_is_no_run(out: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "foreign"
    if kind in ("empty", "weights"):
        path.mkdir()
    if kind == "weights":
        shutil.copy(checkpoints(out)[0] / "model.safetensors", path)
    if kind == "file":
        path = checkpoints(out)[0] / "model.safetensors"
    if kind == "recipe":
        path = write_recipe(path)
    if kind == "checkpoints":
        path = out / "checkpoints"
    code, said = told(path, tmp_path / "log")
    assert code == 1
    assert said[0].startswith("error: ") and "is not a run" in said[0]
    assert any("remedy:" in line for line in said)


def test_a_run_that_has_only_begun(out: Path, tmp_path: Path) -> None:
    """No checkpoint, no event yet."""
    shutil.rmtree(out / "checkpoints")
    (out / "events.jsonl").unlink()
    code, said = told(out, tmp_path / "log")
    assert code == 0
    assert list(lines_of(said)) == ["run.json", "events.jsonl"]


def test_what_it_says_of_a_good_run_is_true(out: Path, tmp_path: Path) -> None:
    """The sizes are those of the files, and the checkpoint that it calls good is the one that `load` takes."""
    code, said = told(out, tmp_path / "log")
    assert code == 0
    record = json.loads((checkpoints(out)[-1] / "checkpoint.json").read_text())
    size = sum(entry["bytes"] for entry in record["files"].values())
    assert lines_of(said)[checkpoints(out)[-1].name][1] == f"{size / 1000:.0f} KB"
    assert sum(p.numel() for p in stoker.load(out).parameters()) == 3 * 5 + 5 + 2 * 5 + 5 * 2 + 2
