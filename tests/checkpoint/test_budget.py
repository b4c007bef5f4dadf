"""The size of a checkpoint is known before the first step, and looking it up changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stoker
from stoker.budget import checkpoint_bytes, spelled
from stoker.checkpoint.store import Store
from stoker.state import TrainState
from tests.laws.test_resume_state import OPTIMIZERS

X, Y = torch.randn(32, 100, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 5


class Lookahead(torch.optim.Optimizer):
    """An optimizer around another one, with state of its own in places that a shallow copy would share."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.inner = torch.optim.Adam(parameters, lr=0.01)
        self.counters = {"steps": 0}
        self.rates = [0.1]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.counters["steps"] += 1
        self.inner.step()
        if self.counters["steps"] % 2:
            for group in self.param_groups:
                for p in group["params"]:
                    with torch.no_grad():
                        p.mul_(1 - self.rates[0])


class Delegating(torch.optim.Optimizer):
    """An optimizer whose state is another one's."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.Adam(parameters, lr=0.01)
        self.defaults = self.inner.defaults

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


def make(optimizer: Callable[..., Any], **changes: Any) -> stoker.Recipe:
    given = {
        "model": lambda: nn.Sequential(
            nn.Linear(100, 300), nn.Tanh(), nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 5)
        ),
        "loss": nn.CrossEntropyLoss(),
        "optimizer": optimizer,
        "train": stoker.Loader((X, Y), 8),
        **changes,
    }
    return stoker.Recipe(**given)


def estimate(recipe: stoker.Recipe) -> int:
    return checkpoint_bytes(TrainState(recipe, recipe.build_model(), total_steps=12, scaler=None))


CASES = {
    **{name: {"optimizer": value} for name, value in OPTIMIZERS.items()},
    "average": {"optimizer": OPTIMIZERS["Adam"], "ema": 0.9},
    "half": {
        "optimizer": OPTIMIZERS["AdamW"],
        "model": lambda: nn.Linear(100, 5).bfloat16(),
        "train": stoker.Loader((X.bfloat16(), Y), 8),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_estimates_hold(tmp_path: Path, name: str) -> None:
    """At least what a checkpoint takes, and not twice that."""
    recipe = make(**CASES[name])
    known = estimate(recipe)
    stoker.fit(make(**CASES[name]), epochs=3, out=tmp_path, quiet=True, device="cpu")
    newest = Store(tmp_path / "checkpoints").all()[-1]
    real = sum(file.stat().st_size for file in newest.iterdir())
    assert real <= 1.05 * known
    if not name.startswith("LBFGS"):  # whose history may not fill up
        assert known <= 1.25 * real + 20_000


@pytest.mark.parametrize("optimizer", [Lookahead, Delegating])
def test_optimizers_of_ones_own_are_left_as_they_were(tmp_path: Path, optimizer: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(100, 5)
    recipe = make(optimizer)
    state = TrainState(recipe, model, total_steps=12, scaler=None)
    weights = model.weight.detach().clone()
    live = state.objectives[0].optimizer
    assert checkpoint_bytes(state) > 3 * weights.nbytes
    assert torch.equal(weights, model.weight)
    assert live.inner.state_dict()["state"] == {}
    assert getattr(live, "counters", {"steps": 0}) == {"steps": 0}


def test_looking_draws_nothing(tmp_path: Path) -> None:
    recipe = make(OPTIMIZERS["Adam"])
    state = TrainState(recipe, recipe.build_model(), total_steps=12, scaler=None)
    before = torch.get_rng_state()
    calls: list[str] = []
    state.objectives[0].optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    checkpoint_bytes(state)
    assert torch.equal(before, torch.get_rng_state())
    assert calls == []
    assert all(p.grad is None for p in state.model.parameters())


def test_spelled() -> None:
    found = [spelled(n) for n in (0, 999, 1000, 999_000, 1_000_000, 123_456_789, 5_300_000_000, 2e12)]
    assert found == ["0 B", "999 B", "1 KB", "999 KB", "1 MB", "123 MB", "5.3 GB", "2 TB"]
    assert [spelled(n) for n in (999_600, 999_960_000)] == ["1 MB", "1 GB"]
