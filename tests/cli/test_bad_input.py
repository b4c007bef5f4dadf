"""Bad input: one clear message, an exit code that is not 0, no traceback, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it: once here instead of once in every child

from stoker.checkpoint.store import Store
from tests.laws.runs import assert_same, events, start

LIMIT_S = 60  # a guard against hanging, not a measurement

RECIPE = '''
import time

import torch
from torch import nn
from torch.utils.data import Dataset

import stoker


class Data(Dataset):
    def __init__(self, n, fault="", sleep_s=0.0):
        self.n, self.fault, self.sleep_s = n, fault, sleep_s

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        time.sleep(self.sleep_s)
        x = torch.full((3,), 0.5 + i / 100)
        if i == 21:
            if self.fault == "getitem":
                raise OSError("broken file")
            x = {"nan": x * float("nan"), "negative": -x}.get(self.fault, x)
        return x, torch.tensor(i % 2 if i != 21 or self.fault != "loss_nan" else 2)


class Log(nn.Module):
    def forward(self, x):
        return torch.log(x)


class Metric:
    """What torchmetrics asks of a metric, failing where told."""

    def __init__(self, fault):
        self.fault = fault

    def reset(self):
        pass

    def update(self, output, target):
        if self.fault == "update":
            boom()

    def compute(self):
        if self.fault == "compute":
            boom()
        return torch.tensor(1.0)


def boom(*args):
    raise ValueError("boom")


STEP_S = 0.0


def loss(output, target):
    time.sleep(STEP_S)
    if (target == 2).any():
        return output.sum() * float("nan")
    return 100 * nn.functional.cross_entropy(output, target)


def recipe(
    fault: str = "",
    lr: float = 1e-3,
    n: int = 32,
    n_val: int = 8,
    batch_size: int = 4,
    sleep_s: float = 0.0,
    step_s: float = 0.0,
):
    """Fails where `fault` says."""
    global STEP_S
    STEP_S = step_s
    if fault == "function":
        boom()
    if fault == "nothing":
        return None
    learns = {"step": boom} if fault == "step" else {"loss": boom if fault == "loss" else loss}
    return stoker.Recipe(
        model=boom if fault == "model" else lambda: nn.Sequential(Log(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)),
        optimizer=boom if fault == "optimizer" else lambda params: torch.optim.SGD(params, lr=lr),
        schedule=boom if fault == "schedule" else None,
        train=stoker.Loader(Data(n, fault, sleep_s), batch_size, collate=boom if fault == "collate" else None),
        val=stoker.Loader(Data(n_val + (fault == "val_nan") * 24, "nan" if fault == "val_nan" else "")),
        metrics={"odd": Metric(fault)},
        **learns,
    )


def needs(width: int):
    """Has no default."""


def number():
    return 5
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "faulty.py"
    path.write_text(RECIPE)
    return path


def stoker(*words: Any, log: Path) -> tuple[int, str]:
    """Exit code and output of a command; one that hangs is ended, and told from one that fails."""
    log.unlink(missing_ok=True)
    process = start(list(words), log)
    process.join(LIMIT_S)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        pytest.fail(f"the command hangs; until then it said:\n{log.read_text()}")
    return process.exitcode, log.read_text()


def refused(*words: Any, log: Path, code: int = 1) -> str:
    """What a command says that must fail with one message and no traceback."""
    exit_code, text = stoker(*words, log=log)
    assert "Traceback" not in text, text
    assert exit_code == code, text
    assert sum(line.startswith(("error: ", "Error: ")) for line in text.splitlines()) == 1, text
    return text


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def content(folder: Path) -> dict[str, bytes]:
    """Every byte below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------ the recipe's file, function and arguments


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fault.py", "faulty.py"),  # the nearest name beside it
        ("nowhere/at/all.py", "no recipe file"),
        (".", "no recipe file"),
        ("faulty.py:recip", "did you mean recipe"),
        ("faulty.py:zzz", "recipe, needs, number"),
        ("faulty.py:Data", "returned a Data, not a stoker.Recipe"),
        ("faulty.py:number", "returned a int, not a stoker.Recipe"),
        ("faulty.py:needs", "needs a value for width"),
    ],
)
def test_no_such_recipe(file: Path, log: Path, spec: str, said: str) -> None:
    arguments = ["n=3"] if spec.endswith(":Data") else []
    text = refused("train", file.parent / spec, *arguments, "--epochs", 1, "--out", file.parent / "out", log=log)
    assert said in text
    assert not (file.parent / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batchsize=8"], ["no parameter 'batchsize'", "did you mean batch_size", "lr: float = 0.001"]),
        (["zzz=8"], ["no parameter 'zzz'", "batch_size: int = 4"]),
        (["n=many"], ["n='many' is not int", "n: int = 32"]),
        (["n=2.5"], ["n='2.5' is not int"]),
        (["n=1e999"], ["n='1e999' is not int"]),
        (["lr="], ["lr='' is not float"]),
        (["lr"], ["'lr' is not an argument", "key=value"]),
        (["n=0"], ["the train dataset is empty"]),
        (["n_val=0"], ["the val dataset is empty"]),
        (["n=3"], ["batch_size 4 is larger than the train dataset (3 samples)"]),
        (["batch_size=0"], ["batch_size must be at least 1"]),
        (["batch_size=-2"], ["batch_size must be at least 1"]),
    ],
)
def test_bad_arguments(file: Path, log: Path, words: list[str], said: list[str]) -> None:
    text = refused("train", file, *words, "--epochs", 1, "--out", file.parent / "out", log=log)
    assert [part for part in said if part not in text] == []
    assert not (file.parent / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--epochs N or --steps N"),
        (["--epochs", 0], "epochs must be at least 1"),
        (["--steps", -3], "steps must be at least 1"),
        (["--epochs", 1, "--eval-every", 0], "eval_every must be at least 1"),
        (["--epochs", 1, "--checkpoint-every", 0], "checkpoint_every must be at least 1"),
        (["--epochs", 1, "--log-every", 0], "log_every must be at least 1"),
        (["--epochs", 1, "--workers", -1], "workers must not be negative"),
        (["--epochs", 1, "--microbatch", 0], "microbatch must be at least 1"),
        (["--epochs", 1, "--precision", "fp8"], "--precision fp32, bf16, fp16"),
        (["--epochs", 1, "--device", "gpu"], "'gpu' is not a device"),
        (["--epochs", 1, "--devices", 2], "2 devices"),
        (["--epochs", 1, "--strategy", "ring"], "'ring'"),
    ],
)
def test_bad_options(file: Path, log: Path, options: list[Any], said: str) -> None:
    assert said in refused("train", file, *options, "--out", file.parent / "out", log=log)
    assert not (file.parent / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["train", "FILE", "--epochs", "many"],
        ["train", "FILE", "--epocs", 1],
        ["tran", "FILE"],
        ["resume"],
        ["eval", "RUN", "--split", "everything"],
        ["lr", "FILE", "--steps", "ten"],
    ],
)
def test_usage(file: Path, log: Path, words: list[Any]) -> None:
    text = refused(*[file if word == "FILE" else word for word in words], log=log, code=2)
    assert "Usage: stoker" in text


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("command", ["train", "lr"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_no_such_device(file: Path, log: Path, device: str, command: str) -> None:
    extra = ["--epochs", 1] if command == "train" else []
    text = refused(command, file, *extra, "--device", device, "--out", file.parent / "out", log=log)
    assert f"device {device!r} is not available" in text
    assert "--device cpu" in text


def test_the_message_is_on_stderr(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "stoker", "train", str(tmp_path / "none.py"), "--epochs", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no recipe file")


# ------------------------------------------------------------------ a recipe that raises


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import stoker\nx = 1 / 0\n", ["ZeroDivisionError", "bad.py:2", "x = 1 / 0"]),
        ("def recipe(:\n", ["bad.py:1", "invalid syntax"]),
        ("import no_such_module_at_all\n", ["ModuleNotFoundError", "no_such_module_at_all", "bad.py:1"]),
        ("def recipe(size: 'Size' = 1):\n    pass\n", ["Size"]),
        ("def recipe():\n    import stoker\n    return stoker.Recipe(model=1)\n", ["bad.py:3", "train"]),
    ],
)
def test_a_file_that_raises(tmp_path: Path, log: Path, text: str, said: list[str]) -> None:
    (tmp_path / "bad.py").write_text(text)
    told = refused("train", tmp_path / "bad.py", "--epochs", 1, "--out", tmp_path / "out", log=log)
    assert [part for part in said if part not in told] == []


@pytest.mark.parametrize("fault", ["function", "nothing", "model", "optimizer", "schedule", "loss", "step", "collate"])
def test_a_recipe_that_raises(file: Path, log: Path, fault: str) -> None:
    text = refused("train", file, f"fault={fault}", "--epochs", 1, "--out", file.parent / "out", log=log)
    assert "returned a NoneType" in text if fault == "nothing" else "ValueError: boom" in text
    assert "faulty.py" in text, "the message must name the recipe's line"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["getitem", "collate"])
def test_data_that_raise_lose_nothing(file: Path, log: Path, fault: str, workers: int) -> None:
    out = file.parent / "out"
    words = ["train", file, f"fault={fault}", "--epochs", 1, "--workers", workers, "--checkpoint-every", 2]
    text = refused(*words, "--out", out, log=log)
    if fault == "getitem":
        assert "OSError: broken file" in text
        assert "sample 21" in text
        checkpoint, complaints = Store(out / "checkpoints").newest_good()
        assert checkpoint is not None and complaints == []
        assert checkpoint.step == 5, "all steps before the one whose sample is broken"
    else:
        assert "ValueError: boom" in text
    assert "faulty.py" in text, "the message must name the recipe's line"


@pytest.mark.parametrize("fault", ["update", "compute"])
def test_a_metric_that_fails(file: Path, log: Path, fault: str) -> None:
    out, whole = file.parent / "out", file.parent / "whole"
    words = ["train", file, "--epochs", 2, "--checkpoint-every", 4]
    text = refused(*words, f"fault={fault}", "--out", out, log=log)
    assert "metric 'odd' failed: ValueError: boom" in text
    assert "Store" not in text
    checkpoint, _ = Store(out / "checkpoints").newest_good()
    assert checkpoint is not None and checkpoint.step == 8, "the epoch that was to be evaluated"
    # The metric mended, the same folder goes on (the argument that mends it is a change, hence --force).
    assert stoker(*words, "--out", out, "--force", log=log)[0] == 0
    assert stoker(*words, "--out", whole, log=log)[0] == 0
    assert_same(whole, out)


# ------------------------------------------------------------------ numbers that are none


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fault=nan"], ["train/loss is not finite in step 6", "sample 21", "samples: 20, 21, 22, 23"]),
        (["fault=negative"], ["train/loss is not finite in step 6", "module 0 (Log)", "samples: 20, 21, 22, 23"]),
        (["fault=loss_nan"], ["train/loss is not finite in step 6", "the loss function", "samples: 20, 21, 22, 23"]),
    ],
)
def test_a_loss_that_is_not_finite(file: Path, log: Path, words: list[str], said: list[str]) -> None:
    out = file.parent / "out"
    command = ["train", file, *words, "--epochs", 3, "--checkpoint-every", 2, "--out", out]
    text = refused(*command, log=log)
    assert [part for part in said if part not in text] == []
    checkpoint, complaints = Store(out / "checkpoints").newest_good()
    assert checkpoint is not None and complaints == []
    assert checkpoint.step == 4
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values())
    before = content(out / "checkpoints")
    assert refused(*command, log=log).splitlines()[-4:] == text.splitlines()[-4:]
    assert content(out / "checkpoints") == before


@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_weights_that_explode(file: Path, log: Path, checkpoint_every: int) -> None:
    """The first update makes them infinite: step 1 is named, and no such weights are ever saved."""
    out = file.parent / "out"
    words = ["lr=3e38", "--steps", 6, "--checkpoint-every", checkpoint_every]
    text = refused("train", file, *words, "--out", out, log=log)
    if checkpoint_every == 1:  # found when it was about to be saved
        assert "is not finite in step 1 " in text
        assert "samples: 0, 1, 2, 3" in text
    else:
        assert "is not finite in step 2 " in text
    assert "parameter " in text
    assert Store(out / "checkpoints").all() == []


def test_an_evaluation_that_is_not_finite(file: Path, log: Path) -> None:
    """It is logged as what it is, is never the best, and training goes on."""
    out = file.parent / "out"
    code, text = stoker("train", file, "fault=val_nan", "--epochs", 2, "--out", out, log=log)
    assert "Traceback" not in text, text
    assert code == 0
    assert [e["value"] for e in events(out) if e["name"] == "val/loss"] == ["nan", "nan"]
    assert Store(out / "checkpoints").best() is None


# ------------------------------------------------------------------ --out


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with the given options."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    yield mount
    subprocess.run(["umount", folder], capture_output=True, check=False)


def test_unwritable(file: Path, log: Path) -> None:
    for out in (file / "below", file, Path("/proc/stoker"), Path("/dev/null/run")):
        text = refused("train", file, "--epochs", 1, "--out", out, log=log)
        assert f"cannot write to {out}" in text
    assert file.read_text() == RECIPE


def test_read_only(file: Path, log: Path, mounted: Callable[[str], Path]) -> None:
    out = mounted("ro,size=1m") / "run"
    assert f"cannot write to {out}: Read-only file system" in refused(
        "train", file, "--epochs", 1, "--out", out, log=log
    )


@pytest.mark.parametrize("size_kib", [4, 8, 16, 40, 90])
def test_full(file: Path, log: Path, mounted: Callable[[str], Path], size_kib: int) -> None:
    """Full at the start, at the first event, at the first checkpoint, later: room made, the same bits in the end."""
    out, whole = mounted(f"size={size_kib}k") / "run", file.parent / "whole"
    command = ["train", file, "--epochs", 2, "--checkpoint-every", 1, "--keep", 30, "--log-every", 1]
    text = refused(*command, "--out", out, log=log)
    assert "cannot write" in text
    assert "No space left" in text
    checkpoint, complaints = Store(out / "checkpoints").newest_good()
    assert complaints == []
    assert (checkpoint is not None) == (size_kib >= 40)
    subprocess.run(["mount", "-o", "remount,size=20m", out.parent], check=True)
    code, text = stoker(*command, "--out", out, log=log)
    assert code == 0, text
    assert ("going on at step" in text) == (checkpoint is not None)
    assert stoker(*command, "--out", whole, log=log)[0] == 0
    assert_same(whole, out)


def test_killed_before_the_run_was_recorded(file: Path, log: Path) -> None:
    """SIGKILL between the two files that begin a run (run.json comes first): the same command begins it again."""
    out = file.parent / "out"
    assert stoker("train", file, "--steps", 2, "--out", out, log=log)[0] == 0
    for absent in ("recipe.py",):
        shutil.rmtree(out / "checkpoints")
        (out / "events.jsonl").unlink()
        (out / absent).unlink()
        code, text = stoker("train", file, "--steps", 2, "--out", out, log=log)
        assert code == 0, text


def test_a_folder_that_is_no_run(file: Path, log: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("It was")
    text = refused("train", file, "--epochs", 1, "--out", tmp_path / "thesis", log=log)
    assert "is not a run" in text and "chapter.tex" in text
    assert content(tmp_path / "thesis").keys() - {".lock"} == {"chapter.tex"}
    assert "is not a run" in refused("resume", tmp_path / "thesis", log=log)
    assert "no such folder" in refused("resume", tmp_path / "none", log=log)
    for command in ("eval", "predict"):
        assert "is not a run" in refused(command, tmp_path / "thesis", log=log)


def test_the_folder_of_the_recipe_itself(file: Path, log: Path) -> None:
    """The user's own recipe.py is never overwritten."""
    folder = file.parent / "mine"
    folder.mkdir()
    (folder / "recipe.py").write_text(RECIPE)
    text = refused("train", folder / "recipe.py", "--epochs", 1, "--out", folder, log=log)
    assert "is not a run" in text


@pytest.mark.parametrize("recorded", ["", "{", "[]", "{}", '{"recipe": 1}'])
def test_a_damaged_run_json(file: Path, log: Path, recorded: str) -> None:
    out = file.parent / "out"
    assert stoker("train", file, "--steps", 2, "--out", out, log=log)[0] == 0
    (out / "run.json").write_text(recorded)
    before = content(out / "checkpoints")
    for words in (["train", file, "--steps", 4, "--out", out], ["resume", out], ["show", out]):
        assert "run.json cannot be read" in refused(*words, log=log)
    assert content(out / "checkpoints") == before


def test_another_recipes_run(file: Path, log: Path) -> None:
    out, other = file.parent / "out", file.parent / "other.py"
    other.write_text(RECIPE)
    assert stoker("train", file, "--steps", 2, "--out", out, log=log)[0] == 0
    before = content(out)
    text = refused("train", other, "--steps", 4, "--out", out, log=log)
    assert "another recipe" in text and "recipe: faulty then, other now" in text and "another --out" in text
    assert content(out) == before


def test_two_processes_on_one_folder(file: Path, log: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = ["train", file, "sleep_s=0.02", "--epochs", 2]
    first = start([*words, "--out", out], tmp_path / "first.log")
    while first.is_alive() and not (out / "events.jsonl").exists():
        time.sleep(0.01)
    assert "another process is training in" in refused(*words, "--out", out, log=log)
    assert "another process is training in" in refused("resume", out, log=log)
    first.join(LIMIT_S)
    assert first.exitcode == 0
    assert stoker(*words, "--out", whole, log=log)[0] == 0
    assert_same(whole, out)


def test_orphaned_workers_do_not_keep_the_folder(file: Path, log: Path, tmp_path: Path) -> None:
    """The workers of a killed run live on for seconds; the same command goes on at once."""
    out = tmp_path / "out"
    words = ["train", file, "sleep_s=0.005", "--steps", 400, "--log-every", 1, "--out", out]
    first = start([*words, "--workers", 2], tmp_path / "first.log")
    while first.is_alive() and not ((out / "events.jsonl").exists() and (out / "events.jsonl").stat().st_size):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    code, text = stoker("train", file, "sleep_s=0.005", "--steps", 2, "--out", out, log=log)
    assert code == 0, text


# ------------------------------------------------------------------ what changed since the run began


def test_a_changed_source(file: Path, log: Path) -> None:
    out = file.parent / "out"
    words = ["train", file, "--out", out]
    assert stoker(*words, "--steps", 2, log=log)[0] == 0
    before = content(out)
    file.write_text(RECIPE.replace("nn.Linear(3, 4)", "nn.Linear(3, 4, bias=True)"))
    for command in ([*words, "--steps", 4], ["resume", out, "--steps", 4]):
        text = refused(*command, log=log)
        lines = [line.strip() for line in text.splitlines()]
        changed = [line for line in lines if line.startswith(("-", "+")) and "nn.Linear" in line]
        assert [line[0] for line in changed] == ["-", "+"] and "bias=True" in changed[1]
        assert f"stoker resume {out}" in text and "--force" in text
        assert content(out) == before
    code, text = stoker(*words, "--steps", 4, "--force", log=log)
    assert code == 0, text
    assert "going on at step 2" in text
    assert "bias=True" in (out / "recipe.py").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["lr=0.5"], "argument lr: 0.25 then, 0.5 now"),
        (["--seed", 4], "seed: 3 then, 4 now"),
        (["--precision", "bf16"], "precision: fp32 then, bf16 now"),
        (["--eval-every", 2], "eval_every: None then, 2 now"),
    ],
)
def test_a_changed_command(file: Path, log: Path, change: list[Any], said: str) -> None:
    out = file.parent / "out"
    assert stoker("train", file, "lr=0.25", "--seed", 3, "--steps", 2, "--out", out, log=log)[0] == 0
    before = content(out)
    words = ["train", file, *([] if change[0].startswith("lr") else ["lr=0.25"]), "--seed", 3, *change]
    text = refused(*words, "--steps", 4, "--out", out, log=log)
    assert said in text and "--force" in text
    assert content(out) == before
    code, text = stoker(*words, "--steps", 4, "--out", out, "--force", log=log)
    assert code == 0, text
    assert json.loads((out / "checkpoints/latest/checkpoint.json").read_text())["step"] == 4


def test_a_default_spelled_out_is_no_change(file: Path, log: Path) -> None:
    out = file.parent / "out"
    assert stoker("train", file, "--steps", 2, "--out", out, log=log)[0] == 0
    code, text = stoker("train", file, "lr=0.001", "--steps", 4, "--out", out, log=log)
    assert code == 0, text


def test_a_changed_model_forced(file: Path, log: Path) -> None:
    """Force goes on where it can; weights that do not fit are refused by name, and nothing is lost."""
    out = file.parent / "out"
    assert stoker("train", file, "--steps", 2, "--out", out, log=log)[0] == 0
    checkpoints = content(out / "checkpoints")
    file.write_text(RECIPE.replace("nn.Linear(3, 4)", "nn.Linear(3, 5)").replace("nn.Linear(4, 3)", "nn.Linear(5, 3)"))
    text = refused("train", file, "--steps", 4, "--out", out, "--force", log=log)
    assert "1.weight: (4, 3) torch.float32 in the checkpoint, (5, 3) torch.float32 in the recipe" in text
    assert content(out / "checkpoints") == checkpoints


def test_a_finished_run_again(file: Path, log: Path) -> None:
    out = file.parent / "out"
    words = ["train", file, "--epochs", 1, "--out", out]
    assert stoker(*words, log=log)[0] == 0
    before = content(out)
    for command in (words, ["resume", out], [*words, "--quiet"]):
        code, text = stoker(*command, log=log)
        assert code == 0, text
        assert "--quiet" in command or "already finished at step 8" in text
        assert content(out) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_interrupt_leaves_at_once(file: Path, tmp_path: Path, workers: int) -> None:
    """In the middle of a step; nor do workers keep the process."""
    words = ["train", file, "step_s=1", "--steps", 9, "--log-every", 1, "--workers", workers]
    process = start([*words, "--out", tmp_path / "out"], tmp_path / "log")
    log_file = tmp_path / "out" / "events.jsonl"
    while process.is_alive() and not (log_file.exists() and log_file.stat().st_size):
        time.sleep(0.01)
    time.sleep(0.1)  # until the next step is being taken, for 1 s: the first signal waits for its end
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(LIMIT_S // 2)
    hangs = process.is_alive()
    if hangs:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert not hangs
    assert process.exitcode == 130
    assert "interrupted; what was saved before is untouched" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
