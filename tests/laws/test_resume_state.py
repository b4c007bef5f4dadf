"""Law 1 for everything that a step changes: each scheduler and optimizer of torch, stopped and resumed."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils

import stoker
from tests.laws.runs import assert_same, events, final

SEED, EPOCHS = 2, 4
STEPS = 4 * EPOCHS  # four batches an epoch, the last of them smaller
STOPS = (1, 6, 8, 13)  # after the first step, within an epoch, at its end, and late


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(14, 5, generator=generator), torch.randint(0, 3, (14,), generator=generator)


X, Y = rows()


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def recipe_with(**changes: Any) -> stoker.Recipe:
    data = stoker.Loader((X, Y), 4, shuffle=True)
    given = {"model": build, "loss": nn.CrossEntropyLoss(), "optimizer": sgd, "train": data, **changes}
    return stoker.Recipe(**given)


def stop_at(steps: tuple[int, ...]) -> Callable[[Any, Any], None]:
    """Send ourselves SIGTERM after each of these steps: the run saves and ends."""

    def stop(progress: Any, metrics: Any) -> None:
        if progress.step in steps:
            signal.raise_signal(signal.SIGTERM)

    return stop


def compare(
    make: Callable[[], stoker.Recipe], folder: Path, stops: tuple[int, ...] = STOPS, **options: Any
) -> stoker.Run:
    """Train in one go, and again with stops; assert that both leave the same bits. Return the run of one go."""
    given = {"epochs": EPOCHS, "seed": SEED, "log_every": 1, "quiet": True, "device": "cpu", **options}
    whole = stoker.fit(make(), out=folder / "whole", **given)
    for step in stops:
        stopped = stoker.fit(make(), out=folder / "stopped", on_step=[stop_at(stops)], **given)
        assert (stopped.step, stopped.reason) == (step, None)
    assert stoker.fit(make(), out=folder / "stopped", **given).reason == whole.reason
    assert_same(folder / "whole", folder / "stopped")
    return whole


def rates(out: Path) -> list[float]:
    return [event["value"] for event in events(out) if event["name"] == "train/lr"]


SCHEDULES: dict[str, Callable[..., Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.2, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, total_iters=7),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=3, mode="exp_range", gamma=0.95),
    "CyclicLR alone": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=3, cycle_momentum=False),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=9),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9, 9, 12], gamma=0.5),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o, total_steps: lr_scheduler.OneCycleLR(o, 0.3, total_steps=total_steps),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=12, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=6),
    "SWALR linear": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=6, anneal_strategy="linear"),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ExponentialLR(o, 0.8), lr_scheduler.StepLR(o, 2)], milestones=[7]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "warm-up, then restarts": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, total_iters=6),
            lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
        ],
        milestones=[6],
    ),
    "a sequence within a chain": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.SequentialLR(
                o, [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[4]
            ),
            lr_scheduler.ExponentialLR(o, 0.97),
        ]
    ),
    "stoker.cosine": stoker.cosine(warmup_steps=5, final=0.1),
    "stoker.linear": stoker.linear(warmup_steps=5),
    "stoker.constant": stoker.constant(warmup_steps=10),
}


def public_classes(module: Any, base: type) -> set[str]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name for name, value in found.items() if issubclass(value, base) and value is not base and name[0] != "_"}


def test_no_scheduler_of_torch_is_left_out() -> None:
    assert public_classes(lr_scheduler, lr_scheduler.LRScheduler) - SCHEDULES.keys() == set()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers(tmp_path: Path, name: str) -> None:
    def make() -> stoker.Recipe:
        return recipe_with(schedule=SCHEDULES[name], val=stoker.Loader((X[:5] + 0.5, Y[:5])))

    compare(make, tmp_path)
    found = rates(tmp_path / "whole")
    assert len(found) == STEPS
    assert len(set(found)) > 1


def test_learning_rates_kept_as_tensors(tmp_path: Path) -> None:
    def make() -> stoker.Recipe:
        return recipe_with(
            optimizer=lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05), foreach=False),
            schedule=SCHEDULES["CosineAnnealingLR"],
        )

    compare(make, tmp_path)
    assert len(set(rates(tmp_path / "whole"))) > 1


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.3, max_iter=3, history_size=4),
    "LBFGS strong_wolfe": lambda p: torch.optim.LBFGS(p, lr=0.3, max_iter=3, line_search_fn="strong_wolfe"),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
}


def test_no_optimizer_of_torch_is_left_out() -> None:
    assert public_classes(torch.optim, torch.optim.Optimizer) - OPTIMIZERS.keys() == {"SparseAdam"}  # below


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(tmp_path: Path, name: str) -> None:
    compare(lambda: recipe_with(optimizer=OPTIMIZERS[name]), tmp_path)
    tensors = final(tmp_path / "whole")["tensors"]
    assert any(key.startswith("model.safetensors:") for key in tensors)
    if name != "SGD":  # which has no state
        assert any(key.startswith("state.safetensors:") for key in tensors)


def test_optimizer_under_a_schedule_that_needs_a_closure(tmp_path: Path) -> None:
    compare(lambda: recipe_with(optimizer=OPTIMIZERS["LBFGS"], schedule=SCHEDULES["StepLR"]), tmp_path)


def test_sparse_embeddings(tmp_path: Path) -> None:
    ids = torch.arange(14 * 3).reshape(14, 3) % 9

    def make() -> stoker.Recipe:
        return recipe_with(
            model=lambda: nn.EmbeddingBag(9, 3, sparse=True),
            optimizer=lambda p: torch.optim.SparseAdam(list(p), lr=0.05),
            train=stoker.Loader((ids, Y), 4, shuffle=True),
        )

    compare(make, tmp_path)


def test_parameter_groups_and_names(tmp_path: Path) -> None:
    def groups(model: Any) -> list[dict[str, Any]]:
        return [
            {"params": list(model[3].named_parameters()), "lr": 0.01},
            {"params": list(model[0].named_parameters()), "weight_decay": 0.1},
        ]

    compare(lambda: recipe_with(params=groups, optimizer=OPTIMIZERS["AdamW"]), tmp_path)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)


def test_several_objectives(tmp_path: Path) -> None:
    def objective(side: str, optimizer: str, schedule: str) -> stoker.Objective:
        return stoker.Objective(
            step=lambda model, batch: F.cross_entropy(getattr(model, side)(batch[0]), batch[1]),
            params=lambda model: getattr(model, side).parameters(),
            optimizer=OPTIMIZERS[optimizer],
            schedule=SCHEDULES[schedule],
        )

    def make() -> stoker.Recipe:
        return stoker.Recipe(
            model=Pair,
            train=stoker.Loader((X, Y), 4, shuffle=True),
            objectives={"a": objective("left", "Adam", "CyclicLR alone"), "b": objective("right", "LBFGS", "StepLR")},
        )

    compare(make, tmp_path)


def test_early_stopping_ends_at_the_same_step(tmp_path: Path) -> None:
    def make() -> stoker.Recipe:
        return recipe_with(
            val=stoker.Loader((X[:6], Y[:6].flip(0))),
            early_stop=stoker.EarlyStop("val/loss", patience=4, min_delta=0.01),
        )

    whole = compare(make, tmp_path, stops=(3, 4, 9), epochs=50, eval_every=2)
    assert whole.reason is not None
    assert "val/loss" in whole.reason
    assert 9 < whole.step < 50 * 4


def test_state_carried_across_batches(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Any, carry: Any) -> Any:
        output, state = model(batch[0], carry)
        loss = (output - batch[0].roll(1, 1)).square().mean()
        return {"loss": loss, "carry": {"state": tuple(part.detach() for part in state), "nothing": None}}

    def forgetful(model: nn.Module, batch: Any, carry: Any) -> Any:
        return step(model, batch, None) | {"carry": None}

    def unpacked(model: nn.Module, batch: Any, carry: Any) -> Any:
        return step(model, batch, None if carry is None else carry["state"])

    x = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(1))

    def make(how: Any = unpacked) -> stoker.Recipe:
        return stoker.Recipe(
            model=lambda: nn.LSTM(3, 3, batch_first=True),
            step=how,
            optimizer=OPTIMIZERS["Adam"],
            train=stoker.Loader((x,), 2),
        )

    compare(make, tmp_path)
    stoker.fit(make(forgetful), out=tmp_path / "forgetful", epochs=EPOCHS, seed=SEED, quiet=True, device="cpu")
    model = "model.safetensors:weight_hh_l0"
    assert final(tmp_path / "forgetful")["tensors"][model] != final(tmp_path / "whole")["tensors"][model]


def test_loss_scale(tmp_path: Path) -> None:
    def make() -> stoker.Recipe:
        return recipe_with(
            loss=lambda output, target: 300 * F.cross_entropy(output, target),
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-4),
        )

    whole = compare(make, tmp_path, precision="fp16")
    assert 0 < whole.metrics["train/skipped_steps"] < STEPS
    assert final(tmp_path / "whole")["state"]["scaler"]["scale"] < 2.0**16


def test_average_of_the_weights_and_loss_with_weights(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(output * self.scale, target)

    compare(lambda: recipe_with(loss=Scaled(), ema=0.8, optimizer=OPTIMIZERS["Adam"]), tmp_path)
    names = final(tmp_path / "whole")["tensors"]
    assert any("scale" in name for name in names)


class Drifting(nn.Module):
    """Changes a buffer that its state dict leaves out, and makes another one only as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(X.shape[1], 3))
        self.inner.register_buffer("drift", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.inner.drift += 0.1
            before = getattr(self, "seen", torch.zeros(0))
            self.register_buffer("seen", torch.cat([before, x[:1, 0]]), persistent=False)
        return self.inner(x) * (1 + self.inner.drift + self.seen.sum())


@pytest.mark.parametrize("ema", [None, 0.9])
def test_buffers_that_the_state_dict_leaves_out(tmp_path: Path, ema: float | None) -> None:
    def make() -> stoker.Recipe:
        return recipe_with(model=Drifting, optimizer=OPTIMIZERS["Adam"], ema=ema, val=stoker.Loader((X, Y)))

    run = compare(make, tmp_path)
    assert len(run.model.seen) == run.step
    assert stoker.load(run, make(), which="latest").seen.equal(run.model.seen)
