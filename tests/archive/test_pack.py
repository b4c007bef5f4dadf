"""`stoker pack` and `stoker unpack` where nothing is altered, and what they refuse."""

import hashlib
import json
import os
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import stoker
from stoker.cli.pack import pack as pack_command
from stoker.cli.pack import unpack as unpack_command
from stoker.infer import open_run
from stoker.sharing.archive import opened, pack, unpack
from tests.archive.making import STEPS, manifest_of, members, trained, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return trained(write_recipe(folder / "src"), folder / "calm-otter", keep=3)


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "own", symlinks=True))


def test_an_archive_is_the_run(run: Path, tmp_path: Path) -> None:
    (run / "notes.txt").write_text("private")
    packed = pack(run, tmp_path / "a.zip")
    names = [info.filename for info, _ in members(packed.path)]
    latest = os.readlink(run / "checkpoints/latest")
    assert names[:-1] == sorted(names[:-1]) and names[-1] == "manifest.json"
    assert {n for n in names if not n.startswith("checkpoints/")} == {
        *("run.json", "recipe.py", "events.jsonl", "environment.json", "manifest.json"),
        *("source/shapes.py", "source/sizes.py"),
    }
    parts = ("checkpoint.json", "ema.safetensors", "model.safetensors", "state.safetensors")
    assert {f"checkpoints/{latest}/{part}" for part in parts} <= {*names}
    kept = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert kept == {latest, os.readlink(run / "checkpoints/best")}
    manifest = manifest_of(members(packed.path))
    assert manifest["stoker"] == stoker.__version__ and manifest["links"]["latest"] == latest
    for info, data in members(packed.path)[:-1]:
        assert info.compress_type == zipfile.ZIP_STORED
        listed = manifest["files"][info.filename]
        assert listed == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if info.filename != "environment.json":
            assert (run / info.filename).read_bytes() == data
    assert (packed.files, packed.bytes) == (len(names), packed.path.stat().st_size)
    assert packed.notes == ()


def test_the_same_run_gives_the_same_bytes(run: Path, own: Path, tmp_path: Path) -> None:
    for path in own.rglob("*"):
        os.utime(path, (1e9, 1e9), follow_symlinks=False)
    first, second = pack(run, tmp_path / "a.zip"), pack(own, tmp_path / "b.zip")
    assert first.path.read_bytes() == second.path.read_bytes()


def test_the_environment_holds_no_secret(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "s3cret-value")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    content = dict((info.filename, data) for info, data in members(pack(run, tmp_path / "a.zip").path))
    found = json.loads(content["environment.json"])
    assert found["variables"]["OMP_NUM_THREADS"] == "7"
    assert found["torch"]["version"] == torch.__version__ and found["torch"]["threads"] == torch.get_num_threads()
    assert found["distributions"]["torch"] == found["imports"]["torch"] and found["cpu"]["cores"] >= 1
    assert b"s3cret" not in (tmp_path / "a.zip").read_bytes()


def test_round_trip(run: Path, tmp_path: Path) -> None:
    sources = tmp_path / "src"
    away = trained(write_recipe(sources), tmp_path / "away", keep=3)
    scores = open_run(away).evaluate("val")
    archive = pack(away, tmp_path / "a.zip").path
    shutil.rmtree(sources)
    shutil.rmtree(away)
    folder = unpack(archive, tmp_path / "there" / "run")
    assert os.readlink(folder / "checkpoints/latest") == os.readlink(run / "checkpoints/latest")
    assert os.readlink(folder / "checkpoints/best") == os.readlink(run / "checkpoints/best")
    assert {p.name for p in folder.parent.iterdir()} == {"run"}
    assert open_run(folder).evaluate("val") == scores
    model = stoker.load(folder, which="latest")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), stoker.load(run, which="latest").parameters(), strict=True)
    )
    assert stoker.resume(folder, quiet=True).reason == "epochs"
    assert stoker.resume(folder, epochs=4, quiet=True).step == STEPS // 3 * 4
    with opened(archive) as inside:
        packed = {info.filename: data for info, data in members(archive)}
        assert (inside / "events.jsonl").read_bytes() == packed["events.jsonl"]
    assert not inside.exists()


def test_weights_are_not_looked_for_in_an_archive(run: Path, tmp_path: Path) -> None:
    archive = pack(run, tmp_path / "run.stoker.zip").path
    with pytest.raises(stoker.UserError, match=r"a run that `stoker pack` put into one file(.|\n)*stoker unpack"):
        stoker.load(archive, torch.nn.Linear(1, 1))


def test_an_empty_folder_may_be_there_a_full_one_not(run: Path, tmp_path: Path) -> None:
    archive = pack(run, tmp_path / "a.zip").path
    (tmp_path / "empty").mkdir()
    assert (unpack(archive, tmp_path / "empty") / "run.json").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (tmp_path / "empty", archive, tmp_path / "link"):
        with pytest.raises(stoker.UserError, match="is there already"):
            unpack(archive, taken)
    assert not (tmp_path / "nowhere").exists()


def test_commands(own: Path, tmp_path: Path) -> None:
    called = CliRunner().invoke(pack_command, [str(own)])
    assert called.exit_code == 0 and str(tmp_path / "own.stoker.zip") in called.output
    again = CliRunner().invoke(pack_command, [str(own)])
    assert isinstance(again.exception, stoker.UserError) and "--force" in again.exception.remedy
    assert CliRunner().invoke(pack_command, [str(own), "--force"]).exit_code == 0
    said = CliRunner().invoke(unpack_command, [str(tmp_path / "own.stoker.zip"), str(tmp_path / "out")])
    assert said.output == f"stoker show {tmp_path / 'out'}\n"
    assert (tmp_path / "out/run.json").read_bytes() == (own / "run.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def refused(run: Path, out: Path | None = None) -> stoker.UserError:
    """The refusal to pack, which leaves nothing behind."""
    folder = (out or run).parent
    before = {*folder.iterdir()}
    with pytest.raises(stoker.UserError) as caught:
        pack(run, out)
    assert {*folder.iterdir()} == before
    return caught.value


def test_what_is_no_finished_run(tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "src")
    assert "no such folder" in refused(tmp_path / "none").why
    (tmp_path / "empty").mkdir()
    assert "run.json" in refused(tmp_path / "empty").why

    def stop(progress: Any, metrics: Any) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(file, tmp_path / "began", on_step=[stop])
    error = refused(tmp_path / "began")
    assert "not finished" in error.what and error.remedy == f"stoker resume {tmp_path / 'began'}"


def test_a_run_in_training_is_refused_and_goes_on(tmp_path: Path) -> None:
    """Also while it is extended: then its latest checkpoint is that of a finished run at first."""
    file, seen = write_recipe(tmp_path / "src"), []

    def look(progress: Any, metrics: Any) -> None:
        if progress.step < STEPS * 2:
            seen.append(refused(tmp_path / "run").what)

    trained(file, tmp_path / "run", on_step=[look])
    trained(file, tmp_path / "run", on_step=[look], epochs=6, checkpoint_every=100)
    assert seen == [f"{tmp_path / 'run'} is not finished"] * (2 * STEPS - 1)
    assert pack(tmp_path / "run").files == len(members(tmp_path / "run.stoker.zip"))


def test_a_recipe_that_is_no_function_in_a_file(tmp_path: Path) -> None:
    def recipe() -> stoker.Recipe:
        x, y = torch.randn(16, 4), torch.zeros(16, dtype=torch.long)
        return stoker.Recipe(
            model=torch.nn.Linear(4, 2),
            loss=torch.nn.CrossEntropyLoss(),
            optimizer=torch.optim.Adam,
            train=stoker.Loader((x, y), 8),
        )

    stoker.fit(recipe(), epochs=1, out=tmp_path / "run", quiet=True)
    assert "function in a file" in refused(tmp_path / "run").remedy


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "ema.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_damaged_checkpoint(own: Path, file: str, which: str) -> None:
    path = own / "checkpoints" / which / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "damaged checkpoint" in refused(own).what


@pytest.mark.parametrize("name", ["events.jsonl", "run.json", "recipe.py", "source/sizes.py"])
def test_a_missing_file(own: Path, name: str) -> None:
    (own / name).unlink()
    assert refused(own).what


def test_events_that_were_cut(own: Path) -> None:
    os.truncate(own / "events.jsonl", 100)
    assert "events.jsonl ends" in refused(own).what


def test_events_after_the_last_checkpoint_are_left_out(run: Path, own: Path) -> None:
    with (own / "events.jsonl").open("a") as log:
        log.write('{"step": 99, "epoch": 9, "name": "x", "value": 1}\n')
    content = {info.filename: data for info, data in members(pack(own).path)}
    assert content["events.jsonl"] == (run / "events.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["events.jsonl", "recipe.py", "source/sizes.py", "source", "checkpoints", "run.json"])
def test_links_out_of_the_run_are_not_followed(own: Path, tmp_path: Path, name: str) -> None:
    moved = tmp_path / "elsewhere"
    (own / name).rename(moved)
    (own / name).symlink_to(moved)
    with pytest.raises(stoker.UserError):
        pack(own)
    assert not (tmp_path / "own.stoker.zip").exists()


@pytest.mark.parametrize("module", ["../../secret.py", "/etc/passwd", ".hidden.py", "a/../../x.py"])
def test_modules_that_lie_elsewhere(own: Path, tmp_path: Path, module: str) -> None:
    (tmp_path / "secret.py").write_text("x")
    recorded = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps({**recorded, "modules": [*recorded["modules"], module]}))
    assert refused(own).what


def test_places_that_cannot_be_written(own: Path, tmp_path: Path) -> None:
    assert "lies in the run itself" in refused(own, own / "inside.zip").what
    (tmp_path / "there").mkdir()
    assert "is there already" in refused(own, tmp_path / "there").what
    (tmp_path / "file").write_text("")
    with pytest.raises(stoker.UserError, match="cannot write"):
        pack(own, tmp_path / "file" / "a.zip")


def test_a_full_disk(own: Path, tmp_path: Path) -> None:
    archive = pack(own, tmp_path / "a.zip").path
    before = archive.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(stoker.UserError, match="cannot write"):
            pack(own, archive, force=True)
        with pytest.raises(stoker.UserError, match="cannot write"):
            unpack(archive, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert archive.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"own", "a.zip"}


def test_notes_name_what_is_not_packed(tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("1\n")
    file = write_recipe(tmp_path / "src")
    file.write_text(file.read_text() + f"\n\nBESIDE, ABSOLUTE = __file__, {str(data)!r}\n")
    packed = pack(trained(file, tmp_path / "run", f"data={data}", "lr=0.01"))
    line = len(file.read_text().splitlines())
    assert len(packed.notes) == 3
    assert packed.notes[0].startswith(f"argument data: {data} is not packed")
    assert {note.split(" ")[0] for note in packed.notes[1:]} == {f"recipe.py:{line}"}
