"""Law 1: killed at any step, any number of times, and resumed: the same bits."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from stoker.data.seeding import SAMPLE, fold
from tests.laws.runs import assert_same, is_finished, run, run_killed

HARD = Path(__file__).with_name("hard.py")


def command(out: Path, *extra: object) -> list[object]:
    return ["train", HARD, "--epochs", 5, "--seed", 3, "--log-every", 4, "--quiet", "--out", out, *extra]


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_sigkill_at_twenty_random_moments(tmp_path: Path, workers: int) -> None:
    extra = ["sleep_s=0.002", "--workers", workers, "--checkpoint-every", 5, "--epochs", 24]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    began_s = time.monotonic()
    assert run(command(whole, *extra), log) == 0
    took_s = time.monotonic() - began_s
    moments, deaths = random.Random(workers), 0
    while deaths < 20 and not (killed.exists() and is_finished(killed)):
        deaths += run_killed(command(killed, *extra), log, moments.uniform(0.05, 0.05 + took_s / 16)) == -signal.SIGKILL
    assert deaths == 20, "the run was over before it could be killed twenty times"
    assert run(command(killed, *extra), log) == 0
    assert_same(whole, killed)
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == sorted(
        p.name for p in (killed / "checkpoints").iterdir()
    )


@pytest.mark.parametrize("sampling", ["shuffled", "sequential", "own", "iterable"])
def test_workers_may_change_between_resumes(tmp_path: Path, sampling: str) -> None:
    extra = [f"sampling={sampling}", "sleep_s=0.002", "--checkpoint-every", 3]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    assert run(command(whole, *extra), log) == 0
    for workers in (2, 0, 4, 1):
        run_killed(command(killed, *extra, "--workers", workers), log, 0.5)
    assert run(command(killed, *extra), log) == 0
    assert_same(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_say_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    whole, stopped, log = tmp_path / "whole", tmp_path / "stopped", tmp_path / "log"
    extra = ["sleep_s=0.004", "--workers", 2]
    assert run(command(whole, *extra), log) == 0
    assert run_killed(command(stopped, *extra), log, 0.05, number, after=stopped / "events.jsonl") == 0
    record = json.loads((stopped / "checkpoints" / "latest" / "checkpoint.json").read_text())
    assert record["state"]["progress"]["finished"] is None
    assert f"stoker resume {stopped}" in log.read_text()
    assert run(["resume", stopped, "--quiet"], log) == 0
    assert_same(whole, stopped)


def test_a_signal_at_every_step_changes_nothing(tmp_path: Path) -> None:
    """Stop after each single step, evaluations included, and go on: 60 resumes of one run."""
    import stoker
    from stoker.source import load_source

    source = load_source(str(HARD))
    options = {"epochs": 5, "seed": 3, "log_every": 4, "quiet": True, "eval_every": 7}
    stoker.fit(source.recipe({}), out=tmp_path / "whole", **options)

    def stop(progress: object, metrics: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    for expected in range(1, 61):
        run = stoker.fit(source.recipe({}), out=tmp_path / "stopped", on_step=[stop], **options)
        assert run.step == expected
    assert run.reason is None  # the last evaluation is still to be done
    assert stoker.fit(source.recipe({}), out=tmp_path / "stopped", **options).reason == "epochs"
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    listings = [sorted(p.name for p in (tmp_path / run / "checkpoints").iterdir()) for run in ("whole", "stopped")]
    assert listings[0] == listings[1]


@pytest.mark.parametrize("broken", ["data", "metric"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_between_steps_loses_no_step(tmp_path: Path, broken: str, workers: int) -> None:
    """A sample that cannot be read at step 29, a metric that fails after step 36: what came before is saved."""
    import stoker
    from stoker.checkpoint.store import Store
    from stoker.source import load_source

    def recipe(fails: bool) -> stoker.Recipe:
        made = load_source(str(HARD)).recipe({"sampling": "shuffled"})
        data, output_of = made.train.dataset, made.metrics["accuracy"]
        bad = made.train.batches(3, 2)[4][1]

        class Broken(type(data)):
            def __getitem__(self, index: int) -> object:
                if fails and broken == "data" and torch.initial_seed() == fold(3, SAMPLE, 2, bad):
                    raise OSError("the disk is gone")
                return super().__getitem__(index)

        def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            calls.append(len(target))
            if fails and broken == "metric" and len(calls) > 8:
                raise ValueError("no such class")
            return output_of(output, target)

        calls: list[int] = []
        data.__class__ = Broken
        made.metrics = {"accuracy": accuracy}
        return made

    options = {"epochs": 5, "seed": 3, "quiet": True, "log_every": 4, "workers": workers}
    stoker.fit(recipe(False), out=tmp_path / "whole", **options)
    with pytest.raises(Exception, match=r"the disk is gone|no such class"):
        stoker.fit(recipe(True), out=tmp_path / "failed", **options)
    latest = Store(tmp_path / "failed" / "checkpoints").latest()
    assert latest is not None and latest.name.startswith(f"step-000000{28 if broken == 'data' else 36}")
    stoker.fit(recipe(False), out=tmp_path / "failed", **options)
    assert_same(tmp_path / "whole", tmp_path / "failed")


def test_an_evaluation_that_cannot_be_judged_is_repeated(tmp_path: Path) -> None:
    """`best` names no value: nothing of the evaluation is logged, and with the name mended it happens once."""
    import stoker
    from stoker.source import load_source

    options = {"epochs": 2, "seed": 3, "quiet": True, "log_every": 4}
    stoker.fit(load_source(str(HARD)).recipe({}), out=tmp_path / "whole", **options)
    wrong = load_source(str(HARD)).recipe({})
    wrong.best = "val/los"
    with pytest.raises(stoker.UserError, match=r"no value 'val/los'.*did you mean val/loss"):
        stoker.fit(wrong, out=tmp_path / "failed", **options)
    stoker.fit(load_source(str(HARD)).recipe({}), out=tmp_path / "failed", **options)
    assert_same(tmp_path / "whole", tmp_path / "failed")
