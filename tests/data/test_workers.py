"""--workers auto: few where reading is cheap, many where it waits; and a rehearsal that leaves no trace."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stoker
from stoker.data.limits import machine
from stoker.data.seeding import draws, seed_all
from stoker.data.workers import Choice, choose_workers
from stoker.devices.strategy import Single
from stoker.rehearse import Rehearsal
from tests.laws.runs import assert_same

CPU = Single(torch.device("cpu"))


class Read(torch.utils.data.Dataset[Any]):
    """Samples that take a while: waiting, or computing."""

    def __init__(self, wait_s: float = 0.0, compute_s: float = 0.0, n: int = 1000) -> None:
        self.wait_s, self.compute_s, self.n = wait_s, compute_s, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        time.sleep(self.wait_s)
        began = time.process_time()
        while time.process_time() - began < self.compute_s:
            pass
        return torch.full((8,), float(i)) + torch.rand(8), i % 3


def choose(dataset: Any, step_s: float, batch_size: int = 16) -> Choice:
    def step(batch: Any) -> None:
        assert batch[0].shape == (batch_size, 8)
        time.sleep(step_s)

    return choose_workers(stoker.Loader(dataset, batch_size, shuffle=True), 0, batch_size, step, lambda: None)


def test_none_where_reading_is_nothing_beside_the_step() -> None:
    assert choose(Read(), step_s=0.2).workers == 0


def test_many_where_reading_waits() -> None:
    choice = choose(Read(wait_s=0.01), step_s=0.005)
    assert choice.workers >= 16  # 160 ms to read what 5 ms are spent on
    assert choice.cpu_share < 0.5
    assert choice.read_s == pytest.approx(0.16, rel=0.5)


def test_no_more_than_keep_the_device_busy() -> None:
    choice = choose(Read(wait_s=0.005), step_s=0.04)  # two would be just enough
    assert 2 <= choice.workers <= 8


def test_no_more_than_there_are_cores_where_reading_computes() -> None:
    assert choose(Read(compute_s=0.002), step_s=0.001).workers <= machine().cpus


def test_a_step_too_long_to_rehearse_is_left_to_arithmetic() -> None:
    choice = choose(Read(wait_s=0.1, n=40), step_s=0.4)
    assert choice.workers == 5 and list(choice.rates) == [0]  # 1.6 s to read, 0.4 s to train, and 5 %


def test_a_sample_of_seconds() -> None:
    assert choose(Read(wait_s=1.0, n=40), step_s=0.3, batch_size=4).workers >= 13


def test_a_data_set_smaller_than_what_is_rehearsed() -> None:
    assert choose(Read(wait_s=0.001, n=17), step_s=0.001).workers > 0


def recipe(wait_s: float = 0.002) -> stoker.Recipe:
    return stoker.Recipe(
        model=lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)),
        loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0])),
        optimizer=lambda params: torch.optim.AdamW(params),
        schedule=stoker.constant(warmup_steps=3),
        train=stoker.Loader(Read(wait_s, n=64), 8, shuffle=True),
        val=stoker.Loader(Read(n=16)),
        ema=0.9,
    )


def test_a_rehearsal_changes_nothing() -> None:
    given = recipe()
    model = given.build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rehearsal = Rehearsal(given, model, CPU, seed=0)
    batch = next(given.train.feed(0).epoch(0))[0]
    seed_all(5)
    expected = draws()
    seed_all(5)
    for _ in range(3):
        rehearsal.step(batch)
    assert draws() == expected
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_auto_changes_no_bit_and_is_decided_anew_on_resume(tmp_path: Path) -> None:
    stoker.fit(recipe(), epochs=2, out=tmp_path / "plain", quiet=True)
    stoker.fit(recipe(), epochs=1, out=tmp_path / "auto", quiet=True, workers="auto")
    identity = json.loads((tmp_path / "auto/run.json").read_text())
    assert identity["options"]["workers"] == "auto"
    assert "samples/s by workers" in " ".join(identity["plan"]["notes"])
    stoker.fit(recipe(), epochs=2, out=tmp_path / "auto", quiet=True, workers="auto")
    assert_same(tmp_path / "plain", tmp_path / "auto")


@pytest.mark.parametrize("workers", ["many", "-1", -1, "2.5"])
def test_words_that_are_no_number(workers: Any, tmp_path: Path) -> None:
    with pytest.raises(stoker.UserError, match="workers"):
        stoker.fit(recipe(), epochs=1, out=tmp_path / "run", quiet=True, workers=workers)
