"""Resume is O(1): at step 1,000,000 nothing is read that was used before."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import stoker
from stoker.checkpoint.saver import Staging
from stoker.checkpoint.store import Store, read, snapshot

STEP, BATCH, MORE = 1_000_000, 2, 3


class Slow(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """10^8 samples of 50 ms each; what is asked for is written down, across processes."""

    def __init__(self) -> None:
        self.count = multiprocessing.Value("q", 0)
        self.read = torch.full((4096,), -1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return 10**8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with self.count.get_lock():
            self.read[self.count.value] = index
            self.count.value += 1
        time.sleep(0.05)
        return torch.tensor([index / 1e8, 1.0]), torch.tensor([1.0])

    def asked(self) -> list[int]:
        with self.count.get_lock():
            return self.read[: self.count.value].tolist()


def recipe_of(data: Slow, **order: Any) -> stoker.Recipe:
    def make() -> stoker.Recipe:  # within a function, so that `data` is no argument of the recipe
        return stoker.Recipe(
            model=lambda: nn.Linear(2, 1),
            loss=nn.MSELoss(),
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
            schedule=stoker.constant(warmup_steps=10),
            train=stoker.Loader(data, BATCH, **order),
        )

    return make()


def at_a_million(out: Path, recipe: stoker.Recipe) -> None:
    """Leave a run at step 1,000,000: two real steps, and the count of steps set in the checkpoint they left."""
    stoker.fit(recipe, steps=2, out=out, quiet=True, device="cpu")
    latest = Store(out / "checkpoints").latest()
    assert latest is not None
    saved = read(latest)
    state = dict(saved.state)
    state["progress"] = {**state["progress"], "step": STEP, "batch": STEP, "finished": None}
    fields = {"step": STEP, "epoch": 0, "loss": None, "metrics": {}, "best": []}
    Store(out / "checkpoints", keep=1).write(
        Staging().stage(snapshot(model=saved.model, ema=None, state=state, **fields))
    )


@pytest.mark.parametrize(
    "order", [{}, {"shuffle": True}, {"sampler": "random"}], ids=["as it is", "shuffled", "sampler"]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_step_reads_its_own_samples(tmp_path: Path, workers: int, order: dict[str, Any]) -> None:
    if order.get("sampler"):
        order = {"sampler": torch.utils.data.RandomSampler(range(10**8))}
    at_a_million(tmp_path, recipe_of(Slow(), **order))
    data = Slow()
    recipe = recipe_of(data, **order)
    run = stoker.fit(recipe, steps=STEP + MORE, out=tmp_path, quiet=True, workers=workers, device="cpu")
    assert (run.step, run.epoch) == (STEP + MORE, 0)
    asked, ahead = data.asked(), 2 * workers  # torch's prefetch_factor batches a worker
    upcoming = [b.tolist() for b in recipe.train.plan().take(0, 0, STEP, STEP + MORE + ahead)]
    own = {index for batch in upcoming[:MORE] for index in batch}
    assert own <= set(asked) <= {index for batch in upcoming for index in batch}
    assert len(asked) == len(set(asked)) <= (MORE + ahead) * BATCH


def test_an_epochs_last_step(tmp_path: Path) -> None:
    """The end of a long epoch, and the beginning of the next."""
    at_a_million(tmp_path, recipe_of(Slow(), shuffle=True))
    data = Slow()
    data.__class__ = type("Slow", (Slow,), {"__len__": lambda self: (STEP + 1) * BATCH})
    recipe = recipe_of(data, shuffle=True)
    run = stoker.fit(recipe, steps=STEP + MORE, out=tmp_path, quiet=True, device="cpu")
    assert (run.step, run.epoch) == (STEP + MORE, 1)
    plan = recipe.train.plan()
    expected = [*plan.take(0, 0, STEP, STEP + 1), *plan.take(0, 1, 0, MORE - 1)]
    assert data.asked() == [index for batch in expected for index in batch.tolist()]
