"""Law 2: how a batch is split, and by whom it is read, changes no gradient, no weight and no number in the log."""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import stoker
from stoker.data.loader import open_feed
from stoker.devices.strategy import Single
from stoker.evaluate import evaluate
from stoker.interrupts import Interrupts

SEED, CLASSES, WIDTH, TOKENS = 1, 4, 5, 6
TOLERANCE = 1e-12  # of float64


class Table(Dataset[Any]):
    """Samples (index, features, class); or rows of tokens, of which very unevenly many count."""

    def __init__(self, n: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(n)
        shape = (n, TOKENS) if kind == "tokens" else (n,)
        self.x = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, CLASSES, shape, generator=generator)
        if kind == "tokens":  # 0, 1 or all: many a microbatch has no valid token at all
            lengths = torch.tensor([0, TOKENS, 0, 1])[torch.randint(0, 4, (n,), generator=generator)]
            lengths[0] = TOKENS
            self.y[torch.arange(TOKENS) >= lengths[:, None]] = -100
        if kind == "ignore":
            self.y[torch.rand(n, generator=generator) < 0.5] = -100

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return index, self.x[index], self.y[index]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()


class Indexed(nn.Module):
    """Notes which samples it was given in training, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build()
        self.seen: list[int] = []

    def forward(self, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += index.tolist()
        output = self.inner(x)
        return output.transpose(1, 2) if output.dim() == 3 else output  # (B, C, T), as torch's losses want it


WEIGHT = torch.tensor([0.1, 1.0, 3.0, 0.5], dtype=torch.float64)


def masked(model: nn.Module, batch: Any) -> Any:
    """Sum over the valid tokens, and how many there are."""
    index, x, y = batch
    output = model(index, x)
    loss = F.cross_entropy(output, y, reduction="sum")
    return {"loss": (loss, (y != -100).sum()), "output": output, "target": y}


def masked_as_number(model: nn.Module, batch: Any) -> Any:
    found = masked(model, batch)
    return found["loss"][0], found["loss"][1].item()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("classes", {"loss": nn.CrossEntropyLoss()}),
    "function": ("classes", {"loss": F.cross_entropy}),
    "smoothed": ("classes", {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}),
    "class weights": ("classes", {"loss": nn.CrossEntropyLoss(weight=WEIGHT)}),
    "smoothed class weights": ("classes", {"loss": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1)}),
    "ignore_index": ("ignore", {"loss": nn.CrossEntropyLoss()}),
    "class weights and ignore_index": ("ignore", {"loss": nn.CrossEntropyLoss(weight=WEIGHT)}),
    "tokens with ignore_index": ("tokens", {"loss": nn.CrossEntropyLoss()}),
    "(sum, count)": ("tokens", {"step": masked}),
    "(sum, number)": ("tokens", {"step": masked_as_number}),
    "sum": ("classes", {"loss": nn.CrossEntropyLoss(reduction="sum")}),
    "sum with ignore_index": ("ignore", {"loss": nn.CrossEntropyLoss(reduction="sum")}),
    "one loss per sample": ("classes", {"loss": nn.CrossEntropyLoss(reduction="none")}),
}


def accuracy(output: torch.Tensor, target: torch.Tensor) -> Any:
    right = (output.argmax(1) == target) & (target != -100)
    return right.sum(), (target != -100).sum()


@dataclass
class Trace:
    """What a run computed."""

    weights: dict[str, torch.Tensor]
    logged: list[tuple[int, int, str, float]]
    seen: list[int]
    expected: list[int] = field(default_factory=list)


def trace_of(case: str, *, n: int, batch_size: int, clip_norm: float | None = None, **plan: Any) -> Trace:
    kind, how = CASES[case]
    data = stoker.Loader(Table(n, kind), batch_size, shuffle=True)
    recipe = stoker.Recipe(
        model=Indexed,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        schedule=stoker.cosine(warmup_steps=2),
        train=data,
        val=stoker.Loader(Table(max(n // 2, 1), kind)),
        metrics={} if case == "(sum, number)" else {"accuracy": accuracy},
        clip_norm=clip_norm,
        **how,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run = stoker.fit(recipe, epochs=2, seed=SEED, out=out, quiet=True, log_every=1, device="cpu", **plan)
        lines = map(json.loads, (out / "events.jsonl").read_text().splitlines())
        logged = [
            (e["step"], e["epoch"], e["name"], float(e["value"]))
            for e in lines
            if not e["name"].startswith(("time/", "system/"))
        ]
    expected = [index for epoch in range(2) for index in data.indices(SEED, epoch)]
    return Trace(run.model.state_dict(), logged, run.model.seen, expected)


def assert_equal(a: Trace, b: Trace) -> None:
    assert a.seen == b.seen == b.expected
    assert [entry[:3] for entry in a.logged] == [entry[:3] for entry in b.logged]
    rates = [[entry for entry in trace.logged if entry[2] == "train/lr"] for trace in (a, b)]
    assert rates[0] == rates[1] != []
    for (step, _, name, x), (*_, y) in zip(a.logged, b.logged, strict=True):
        assert math.isclose(x, y, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (step, name, x, y)
    for name, value in a.weights.items():
        assert (value - b.weights[name]).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("microbatch", [1, 3, 6, 8])
def test_microbatch(case: str, microbatch: int) -> None:
    """Batches of 8, 8, 3; microbatches that divide none, one or all of them."""
    whole = trace_of(case, n=19, batch_size=8)
    assert_equal(trace_of(case, n=19, batch_size=8, microbatch=microbatch), whole)
    losses = [value for _, _, name, value in whole.logged if name == "train/loss"]
    assert len(losses) == 6
    assert all(value > 0 for value in losses)


def test_microbatches_are_what_the_model_sees() -> None:
    sizes: list[int] = []

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        sizes.append(len(batch[0]))
        return F.cross_entropy(model(batch[0], batch[1]), batch[2])

    recipe = stoker.Recipe(
        model=Indexed,
        step=step,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        train=stoker.Loader(Table(11, "classes"), 8),
    )
    with tempfile.TemporaryDirectory() as folder:
        stoker.fit(recipe, epochs=1, out=folder, quiet=True, microbatch=3, device="cpu")
    assert sizes == [3, 3, 2, 3]


@pytest.mark.parametrize("case", ["mean", "(sum, count)"])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers(case: str, workers: int) -> None:
    one = trace_of(case, n=19, batch_size=8)
    many = trace_of(case, n=19, batch_size=8, workers=workers)
    assert many.logged == one.logged
    assert_equal(many, one)
    assert {k: v.numpy().tobytes() for k, v in many.weights.items()} == {
        k: v.numpy().tobytes() for k, v in one.weights.items()
    }
    assert_equal(trace_of(case, n=19, batch_size=8, workers=workers, microbatch=3), one)


def test_clipping_sees_the_gradient_of_the_whole_batch() -> None:
    whole = trace_of("(sum, count)", n=19, batch_size=8, clip_norm=0.01)
    assert_equal(trace_of("(sum, count)", n=19, batch_size=8, clip_norm=0.01, microbatch=3), whole)
    norms = [value for _, _, name, value in whole.logged if name == "train/grad_norm"]
    assert max(norms) > 0.01


@settings(max_examples=30)
@given(
    case=st.sampled_from(sorted(CASES)),
    n=st.integers(2, 24),
    batch_share=st.floats(0, 1),
    microbatch=st.integers(1, 25),
)
@example(case="(sum, count)", n=20, batch_share=0.3, microbatch=1)
def test_any_partition(case: str, n: int, batch_share: float, microbatch: int) -> None:
    batch_size = 1 + round(batch_share * (n - 1))
    if CASES[case][0] != "classes" and batch_has_nothing(case, n, batch_size):
        return  # a mean over nothing, see below
    assert_equal(
        trace_of(case, n=n, batch_size=batch_size, microbatch=microbatch), trace_of(case, n=n, batch_size=batch_size)
    )


def batch_has_nothing(case: str, n: int, batch_size: int) -> bool:
    """Whether some batch has no valid target, which makes torch's mean reduction nan."""
    y = Table(n, CASES[case][0]).y
    data = stoker.Loader(Table(n, CASES[case][0]), batch_size, shuffle=True)
    valid = [(y[batch] != -100).any() for epoch in range(2) for batch in data.batches(SEED, epoch)]
    return not all(valid) or not (Table(max(n // 2, 1), CASES[case][0]).y != -100).any()


@pytest.mark.parametrize("microbatch", [None, 2])
def test_a_mean_over_nothing_is_an_error_however_it_is_split(tmp_path: Path, microbatch: int | None) -> None:
    x, y = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)), torch.full((4,), -100)
    recipe = stoker.Recipe(
        model=lambda: nn.Linear(WIDTH, CLASSES),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        train=stoker.Loader((x, y), 4),
    )
    with pytest.raises(stoker.UserError, match="finite"):
        stoker.fit(recipe, steps=1, out=tmp_path / "run", quiet=True, microbatch=microbatch, device="cpu")


def test_extra_values_are_means_over_samples(tmp_path: Path) -> None:
    """Batches of 7: the microbatches of 3, 3 and 1 weigh as many samples as they hold."""

    def step(model: nn.Module, batch: Any) -> Any:
        index, x, y = batch
        output = model(index, x)
        right = (output.argmax(1) == y).double()
        return {
            "loss": F.cross_entropy(output, y),
            "each": right,
            "mean": right.mean(),
            "counted": (right[y > 0].sum(), (y > 0).sum()),
        }

    logged = []
    for microbatch in (None, 3):
        recipe = stoker.Recipe(
            model=Indexed,
            step=step,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            train=stoker.Loader(Table(14, "classes"), 7),
        )
        out = tmp_path / str(microbatch)
        stoker.fit(recipe, epochs=2, out=out, quiet=True, log_every=1, microbatch=microbatch, device="cpu")
        events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
        logged.append([e["value"] for e in events if e["name"] in ("train/each", "train/mean", "train/counted")])
    assert len(logged[0]) == 12
    assert logged[1] == pytest.approx(logged[0], rel=TOLERANCE, abs=TOLERANCE)


def test_carried_state_belongs_to_its_rows(tmp_path: Path) -> None:
    """Truncated back-propagation in microbatches either gives the same weights or is refused."""
    x = torch.randn(12, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def step(model: nn.Module, batch: Any, carry: Any) -> Any:
        output, state = model(batch[0], carry)
        return {"loss": (output - batch[1]).square().mean(), "carry": state.detach()}

    weights = []
    for microbatch in (None, 2):
        recipe = stoker.Recipe(
            model=lambda: nn.GRU(2, 2, batch_first=True).double(),
            step=step,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            train=stoker.Loader((x, x.roll(1, 1)), 4),
        )
        options = {"epochs": 1, "quiet": True, "device": "cpu", "microbatch": microbatch}
        try:
            run = stoker.fit(recipe, out=tmp_path / str(microbatch), **options)
        except stoker.UserError as error:
            assert microbatch is not None
            assert "carr" in str(error)
            return
        weights.append(run.model.state_dict())
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() <= TOLERANCE, name


def per_sample(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).double()


def as_a_mean(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.softmax(1).gather(1, target[:, None])).mean()


def as_a_number(output: torch.Tensor, target: torch.Tensor) -> float:
    return float(per_sample(output, target).mean())


def only_first_class(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Recall of class 0; a batch without it counts nothing."""
    mine = target == 0
    return per_sample(output, target)[mine].sum(), int(mine.sum())


METRICS: dict[str, Callable[[], Any]] = {
    "micro": lambda: MulticlassAccuracy(CLASSES, average="micro"),
    "macro": lambda: MulticlassAccuracy(CLASSES, average="macro"),
    "f1": lambda: MulticlassF1Score(CLASSES, average="macro"),
    "per_sample": lambda: per_sample,
    "mean": lambda: as_a_mean,
    "number": lambda: as_a_number,
    "recall0": lambda: only_first_class,
}


def directly(output: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """The same values from their definitions, over all samples at once."""
    found, wanted = output.argmax(1).numpy(), y.numpy()
    classes = [c for c in range(CLASSES) if (found == c).any() or (wanted == c).any()]
    hits = {c: int(((found == c) & (wanted == c)).sum()) for c in classes}
    recalls = [hits[c] / max((wanted == c).sum(), 1) for c in classes]
    f1 = [2 * hits[c] / ((found == c).sum() + (wanted == c).sum()) for c in classes]
    right = float((found == wanted).mean())
    return {
        "loss": float(F.cross_entropy(output, y)),
        "micro": right,
        "macro": float(np.mean(recalls)),
        "f1": float(np.mean(f1)),
        "per_sample": right,
        "mean": float(as_a_mean(output, y)),
        "number": right,
        "recall0": float((found[wanted == 0] == 0).mean()) if (wanted == 0).any() else math.nan,
    }


@pytest.mark.parametrize("batch_size", range(1, 9))
def test_evaluation_counts_every_sample_once(batch_size: int) -> None:
    torch.manual_seed(4)
    model = build()
    strategy = Single(torch.device("cpu"))
    for n in range(1, 31):
        table = Table(n, "classes")
        recipe = stoker.Recipe(
            model=model,
            loss=nn.CrossEntropyLoss(),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            train=stoker.Loader((table.x, table.y), 1),
            metrics={name: make() for name, make in METRICS.items()},
        )
        feed = open_feed(stoker.Loader((table.x, table.y)), SEED, batch_size=batch_size, workers=0, evaluation=True)
        found = evaluate(model, recipe, strategy, feed, "val", SEED, Interrupts())
        with torch.no_grad():
            expected = directly(model(table.x), table.y)
        assert found is not None
        assert found.keys() == {f"val/{name}" for name in expected}
        for name, value in expected.items():
            tolerance = 1e-6 if name in ("micro", "macro", "f1") else TOLERANCE  # torchmetrics divides in float32
            assert found[f"val/{name}"] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), (n, name)
        assert recipe.metrics["micro"].compute().item() == found["val/micro"]


def test_losses_in_float32_are_summed_in_float64() -> None:
    """One sample at a time or all at once: what is left is the rounding of the loss itself."""
    torch.manual_seed(4)
    model, table = build().float(), Table(30, "ignore")
    x, weight, expected = table.x.float(), WEIGHT.float(), 0.0
    with torch.no_grad():
        for row, target in zip(x, table.y, strict=True):
            if target != -100:
                expected += float(F.cross_entropy(model(row[None]), target[None], weight)) * float(weight[target])
    expected /= float(weight[table.y[table.y != -100]].double().sum())
    recipe = stoker.Recipe(
        model=model,
        loss=nn.CrossEntropyLoss(weight=weight),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        train=stoker.Loader((x, table.y), 1),
    )
    feed = open_feed(stoker.Loader((x, table.y)), SEED, batch_size=1, workers=0, evaluation=True)
    found = evaluate(model, recipe, Single(torch.device("cpu")), feed, "val", SEED, Interrupts())
    assert found is not None
    assert found["val/loss"] == pytest.approx(expected, rel=TOLERANCE)
