"""The folder of checkpoints: complete or absent, verified, kept by two rules, never a program."""

import json
import multiprocessing
import os
import pickletools
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it: once here instead of once in every child
from safetensors.torch import load_file
from torch import nn

import stoker
from stoker.checkpoint.saver import Staging
from stoker.checkpoint.store import Damaged, Store, read, snapshot
from stoker.errors import UserError
from stoker.state import load_by_name

_FORK = multiprocessing.get_context("fork")


def save(folder: Path, step: int, *, keep: int = 2, keep_best: int = 1, **changes: Any) -> Path:
    """Write a checkpoint of a tiny model whose weights are all `step`."""
    content: dict[str, Any] = {
        "step": step,
        "epoch": step // 10,
        "loss": 1 / (step + 1),
        "metrics": {"val/loss": 1 / (step + 1)},
        "model": {"weight": torch.full((50, 40), float(step)), "bias": torch.full((3,), float(step))},
        "ema": None,
        "state": {"progress": {"step": step}, "momentum": torch.full((50, 40), float(step))},
        "best": [],
    }
    return Store(folder, keep=keep, keep_best=keep_best).write(Staging().stage(snapshot(**{**content, **changes})))


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return [int(path.name.split("-")[1]) for path in Store(folder).all()]


# ------------------------------------------------------------------ atomicity


def _save_for_ever(folder: Path) -> None:
    for step in range(1, 10**6):
        save(folder, step, best=[step // 7 * 7] if step >= 7 else [])


def test_sigkill_at_any_moment_leaves_a_good_newest_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(1)
    for i in range(40):
        folder = tmp_path / str(i % 4)  # every fourth time, on what the kill before left behind
        process = _FORK.Process(target=_save_for_ever, args=(folder,))
        before = steps(folder)
        process.start()
        while process.is_alive() and steps_seen(folder) <= 2:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        checkpoint, complaints = Store(folder).newest_good()
        assert checkpoint is not None, before
        assert complaints == []
        assert checkpoint.model["weight"].eq(checkpoint.step).all()
        assert checkpoint.state["momentum"].eq(checkpoint.step).all()
        for path in Store(folder).all():
            read(path)
        save(folder, 10**6)  # clears away whatever the kill left
        strays = [p.name for p in folder.iterdir() if p.name.startswith(".")]
        assert strays == []
        shutil.rmtree(folder / Store(folder).all()[-1].name)


def steps_seen(folder: Path) -> int:
    """Newest step, read without touching the folder: another process is writing in it."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max(
        (int(name.split("-")[1]) for name in names if name.startswith("step-") and "01000000" not in name), default=0
    )


def test_links_that_a_kill_left_half_made_are_cleared_away(tmp_path: Path) -> None:
    """Also that of `best`, where there is no best checkpoint by now."""
    save(tmp_path, 1)
    for name in ("best", "latest"):
        (tmp_path / f".{name}.tmp").symlink_to("step-00000001")
    save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_same_step_again_replaces_itself(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    again = save(tmp_path, 2, model={"weight": torch.tensor([9.0])}, loss=0.25)
    assert steps(tmp_path) == [1, 2]
    checkpoint, complaints = Store(tmp_path).newest_good()
    assert checkpoint is not None and complaints == []
    assert checkpoint.path == again
    assert checkpoint.model["weight"].tolist() == [9.0]


def test_temporary_files_never_leave_the_folder(tmp_path: Path) -> None:
    """TMPDIR on another file system, where a rename would fail, or not writable at all: it is not used."""
    code = (
        "import sys; from pathlib import Path; from tests.checkpoint.test_store import save; save(Path(sys.argv[1]), 5)"
    )
    environment = {**os.environ, "TMPDIR": "/proc/none", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, env=environment, cwd=Path.cwd())
    assert steps(tmp_path / "c") == [5]
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    environment["TMPDIR"] = str(other)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], check=True, env=environment, cwd=Path.cwd())
    assert steps(tmp_path / "d") == [5]


def test_a_failed_save_leaves_no_trace(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot save odd: a object"):
        save(tmp_path, 2, state={"odd": object()})
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_loss_that_is_no_number(tmp_path: Path, loss: float | None) -> None:
    path = save(tmp_path, 1, loss=loss, metrics={"val/loss": loss})
    assert path.name == "step-00000001-epoch-0"
    assert repr(read(path).metrics["val/loss"]) == repr(loss)


# ------------------------------------------------------------------ retention and links


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 13):
        best = [s for s in (4, 9, 2) if s <= step]
        save(tmp_path, step, keep=3, keep_best=2, best=best)
    assert steps(tmp_path) == [4, 9, 10, 11, 12]
    assert (tmp_path / "latest").readlink() == Path(Store(tmp_path).all()[-1].name)
    assert (tmp_path / "best").readlink().name.startswith("step-00000004-")
    best = Store(tmp_path).best()
    assert best is not None and read(best).step == 4


def test_keep_nothing_still_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=0, keep_best=0)
    assert steps(tmp_path) == [3]


def test_a_run_that_went_back_drops_what_came_after(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=5)
    save(tmp_path, 3, keep=5)
    assert steps(tmp_path) == [1, 2, 3]
    assert (tmp_path / "latest").resolve().name.startswith("step-00000003")


def test_links_are_relative(tmp_path: Path) -> None:
    """A run's folder can be moved, or mounted elsewhere."""
    save(tmp_path / "a", 1, best=[1])
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b" / "latest" / "checkpoint.json").is_file()
    assert Store(tmp_path / "b").best() == Store(tmp_path / "b").all()[0]


def test_strangers_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-notes.txt").write_text("mine")
    (tmp_path / "step-00000009-epoch-1").write_text("a file, no folder")
    (tmp_path / "step-00000008-epoch-1").symlink_to("/nowhere")
    save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [2]
    assert (tmp_path / "step-notes.txt").exists()


@pytest.mark.parametrize("target", ["../../elsewhere", "/etc", "step-00000001-epoch-0", "."])
def test_a_best_link_that_leads_elsewhere(tmp_path: Path, target: str) -> None:
    save(tmp_path, 1, loss=None)
    (tmp_path / "best").symlink_to(target)
    assert Store(tmp_path).best() == (tmp_path / target if target.startswith("step") else None)


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "ema.safetensors", "checkpoint.json"])
def test_one_flipped_bit_anywhere(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2, ema={"weight": torch.ones(9)})
    file = path / name
    original = file.read_bytes()
    moments = random.Random(name)
    places = {0, 7, 8, len(original) - 1, *(moments.randrange(len(original)) for _ in range(60))}
    for place in places:
        damaged = bytearray(original)
        damaged[place] ^= 1 << moments.randrange(8)
        file.write_bytes(damaged)
        if name == "checkpoint.json" and _same_json(original, bytes(damaged)):
            continue  # white space
        checkpoint, complaints = Store(tmp_path).newest_good()
        assert checkpoint is not None and checkpoint.step == 1, place
        assert len(complaints) == 1 and name in complaints[0], complaints
    file.write_bytes(original)
    assert read(path).step == 2


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "long", "folder", "link"])
def test_a_file_that_is_not_what_was_written(tmp_path: Path, name: str, how: str) -> None:
    save(tmp_path / "c", 1)
    file = save(tmp_path / "c", 2) / name
    original = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "link":
        (tmp_path / "elsewhere").write_bytes(original)
        file.symlink_to(tmp_path / "elsewhere")
    elif how != "missing":
        file.write_bytes({"empty": b"", "short": original[:-1], "long": original + b" x"}[how])
    checkpoint, complaints = Store(tmp_path / "c").newest_good()
    assert checkpoint is not None
    if name == "checkpoint.json" and how == "link":
        return  # its own checksum guards its content, wherever that lies
    assert checkpoint.step == 1
    assert len(complaints) == 1 and name in complaints[0], complaints


@pytest.mark.parametrize(
    "record", ["null", "[]", "3", '"text"', "{}", '{"sha256": 1}', '{"sha256": []}', "\ufeff{}", "[" * 5000]
)
def test_a_record_that_is_no_record(tmp_path: Path, record: str) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "checkpoint.json").write_text(record)
    checkpoint, complaints = Store(tmp_path).newest_good()
    assert checkpoint is not None and checkpoint.step == 1
    assert len(complaints) == 1


def forge(path: Path, **changes: Any) -> None:
    """Rewrite a record so that its checksum holds: what a malicious sender could do."""
    import hashlib

    record = {**json.loads((path / "checkpoint.json").read_text()), **changes}
    text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True)
    record["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", ["../secret.safetensors", "ABSOLUTE", "..", ".", "", "a/../../secret.safetensors"])
def test_a_forged_record_reads_nothing_outside(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    secret = tmp_path / "secret.safetensors"
    shutil.copy(path / "model.safetensors", secret)
    record = json.loads((path / "checkpoint.json").read_text())
    entry = record["files"]["model.safetensors"]
    forge(path, files={**record["files"], str(secret) if name == "ABSOLUTE" else name: entry})
    with pytest.raises(Damaged):
        read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"files": {}},
        {"files": []},
        {"files": {"model.safetensors": {}}},
        {"files": {"model.safetensors": 3}},
        {"state": {"$tensor": "no such tensor"}},
        {"state": {"$tensor": ["x"]}},
        {"state": {"$float": "many"}},
        {"state": {"$tuple": 3}},
        {"state": {"$dict": [[1]]}},
        {"state": {"$dict": [[[], 1]]}},
        {"state": {"$counter": [["a", "b", "c"]]}},
    ],
    ids=str,
)
def test_a_forged_record_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    forge(path, **changes)
    checkpoint, complaints = Store(tmp_path).newest_good()
    assert checkpoint is not None and checkpoint.step == 1
    assert len(complaints) == 1


# ------------------------------------------------------------------ through runs


RECIPE = """
import torch
from torch import nn

import stoker


class Tied(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def recipe(width: int = 8, dtype: str = "float32", extra: bool = False):
    def build():
        model = Tied(width).to(getattr(torch, dtype))
        if extra:
            model.extra = nn.Linear(2, 2)
        return model

    x = torch.arange(40) % 10
    return stoker.Recipe(
        model=build,
        loss=lambda output, target: nn.functional.cross_entropy(output.float(), target),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        train=stoker.Loader((x, (x + 1) % 10), 8, shuffle=True),
        val=stoker.Loader((x, (x + 1) % 10)),
        ema=0.9,
    )
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tied.py"
    path.write_text(RECIPE)
    return path


def fit(file: Path, **options: Any) -> stoker.Run:
    """Train the file's recipe."""
    from stoker.source import load_source

    arguments = options.pop("arguments", {})
    defaults = {"out": file.parent / "run", "epochs": 2, "quiet": True, "checkpoint_every": 3, "keep": 9}
    return stoker.fit(load_source(str(file)).recipe(arguments), **{**defaults, **options})


def test_a_damaged_newest_checkpoint_is_told_and_passed_over(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = fit(file, out=file.parent / "whole")
    run = fit(file, steps=7)
    newest = Store(run.dir / "checkpoints").all()[-1]
    assert newest.name.startswith("step-00000007")
    damaged = bytearray((newest / "state.safetensors").read_bytes())
    damaged[-1] ^= 1
    (newest / "state.safetensors").write_bytes(damaged)
    capfd.readouterr()
    again = fit(file)
    said = capfd.readouterr().err
    assert "skipped a damaged checkpoint" in said and newest.name in said and "state.safetensors" in said
    assert again.step == whole.step == 10
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert a.equal(b), name


def test_every_checkpoint_damaged_loses_none_silently(file: Path) -> None:
    run = fit(file, steps=7)
    for path in Store(run.dir / "checkpoints").all():
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        stoker.load(run.dir)
    before = sorted(p.name for p in (run.dir / "checkpoints").iterdir())
    with pytest.raises(UserError, match="no checkpoint of the run is good"):
        fit(file)
    assert sorted(p.name for p in (run.dir / "checkpoints").iterdir()) == before


def test_tied_weights_under_each_name(file: Path) -> None:
    run = fit(file)
    for name in ("model.safetensors", "ema.safetensors"):
        tensors = load_file(run.dir / "checkpoints" / "latest" / name)
        assert sorted(tensors) == ["embed.weight", "head.weight"]
        assert tensors["embed.weight"].equal(tensors["head.weight"])
    model: Any = stoker.load(run.dir, which="latest")
    assert model.head.weight is model.embed.weight
    averaged = load_file(run.dir / "checkpoints" / "latest" / "ema.safetensors")
    assert model.embed.weight.equal(averaged["embed.weight"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"width": 9},
            ["embed.weight: (10, 8) torch.float32 in the checkpoint, (10, 9) torch.float32", "head.weight: "],
        ),
        ({"dtype": "float64"}, ["(10, 8) torch.float32 in the checkpoint, (10, 8) torch.float64 in the recipe"]),
        ({"extra": True}, ["missing in the checkpoint: extra.weight", "missing in the checkpoint: extra.bias"]),
    ],
)
def test_weights_of_another_model(file: Path, arguments: dict[str, Any], said: list[str]) -> None:
    run = fit(file)
    with pytest.raises(UserError) as caught:
        fit(file, arguments=arguments, epochs=3, force=True)
    assert [part for part in said if part not in str(caught.value)] == []
    assert run.model.state_dict().keys() == stoker.load(run.dir, which="latest").state_dict().keys()


def test_names_are_matched_with_their_nearest() -> None:
    saved = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)}).state_dict()
    with pytest.raises(UserError) as caught:
        load_by_name(nn.ModuleDict({"encodr": nn.Linear(2, 2), "head": nn.Linear(2, 2)}), saved, "model")
    assert "missing in the checkpoint: encodr.weight (did you mean encoder.weight?)" in str(caught.value)
    assert "unknown to the recipe: encoder.bias" in str(caught.value)


def test_a_run_holds_no_pickle(file: Path) -> None:
    run = fit(file)
    found = [p for p in run.dir.rglob("*") if p.is_file()]
    assert {p.suffix for p in found if p.name != ".lock"} <= {".json", ".jsonl", ".safetensors", ".py"}
    assert len(found) > 8
    for path in found:
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK")), path
        with pytest.raises(Exception, match=r"."):  # not even by accident a program for pickle's machine
            list(pickletools.genops(data))
        if path.suffix == ".json":
            json.loads(data)
        if path.suffix == ".safetensors":
            load_file(path)
