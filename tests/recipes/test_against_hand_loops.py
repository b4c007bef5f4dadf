"""A recipe and the loop one would have written by hand end in the same weights, bit for bit.

Both get the same order of samples, `Loader.batches(seed, epoch)`; nothing else is shared.
"""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import Dataset, TensorDataset

import stoker

SEED, EPOCHS, N, BATCH = 5, 3, 22, 5  # the last batch of an epoch holds 2

Indices = list[int]


def samples(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


X, Y = samples()


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def loader(dataset: Any = (X, Y), batch_size: int = BATCH) -> stoker.Loader:
    return stoker.Loader(dataset, batch_size, shuffle=True)


def by_hand(make: Callable[[], nn.Module] = build) -> nn.Module:
    torch.manual_seed(SEED)
    return make()


def batches(data: stoker.Loader | None = None, epochs: int = EPOCHS) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (X, Y) in the order in which a run trains on them."""
    for epoch in range(epochs):
        for indices in (data or loader()).batches(SEED, epoch):
            yield X[indices], Y[indices]


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    before_step: Callable[[], object] = lambda: None,
    after_step: Callable[[], object] = lambda: None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> nn.Module:
    for x, y in batches():
        optimizer.zero_grad()
        with context():
            loss = loss_of(model(x), y)
        loss.backward()
        before_step()
        optimizer.step()
        after_step()
    return model


def fit(recipe: stoker.Recipe, out: Path, *, epochs: int = EPOCHS, **options: Any) -> stoker.Run:
    return stoker.fit(recipe, epochs=epochs, seed=SEED, out=out / "run", quiet=True, device="cpu", **options)


def raw(run: stoker.Run) -> dict[str, torch.Tensor]:
    """The weights themselves, where a run's model is their average."""
    return load_file(run.dir / "checkpoints" / "latest" / "model.safetensors")


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def assert_same(ours: nn.Module | dict[str, torch.Tensor], theirs: nn.Module, start: nn.Module | None = None) -> None:
    """Every entry of both state dicts has the same bits, and `theirs` has been trained since `start`."""
    left = bits(ours if isinstance(ours, dict) else ours.state_dict())
    right = bits(theirs.state_dict())
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []
    assert bits((start or by_hand()).state_dict()) != right


class Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A map-style dataset of the user's own."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[index], Y[index]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [TensorDataset(X, Y), Samples()], ids=["TensorDataset", "map-style"])
def test_supervised(tmp_path: Path, dataset: Any, workers: int) -> None:
    recipe = stoker.Recipe(model=build, loss=nn.CrossEntropyLoss(), optimizer=adamw, train=loader(dataset))
    run = fit(recipe, tmp_path, workers=workers)
    model = by_hand()
    plain_loop(model, adamw(model.parameters()), nn.CrossEntropyLoss())
    assert_same(run.model, model)
    assert run.step == EPOCHS * math.ceil(N / BATCH)


def mean_step(model: nn.Module, batch: Any) -> Any:
    return F.cross_entropy(model(batch[0]), batch[1])


def counted_step(model: nn.Module, batch: Any) -> Any:
    valid = batch[1] > 0
    return F.cross_entropy(model(batch[0])[valid], batch[1][valid], reduction="sum"), valid.sum()


def verbose_step(model: nn.Module, batch: Any) -> Any:
    output = model(batch[0])
    right = (output.argmax(1) == batch[1]).float()
    loss = F.cross_entropy(output, batch[1])
    return {"loss": loss, "output": output, "target": batch[1], "right": right, "spread": output.std()}


def counted_by_hand(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    valid = y > 0
    return F.cross_entropy(output[valid], y[valid], reduction="sum") / valid.sum()


@pytest.mark.parametrize(
    ("step", "twin"),
    [(mean_step, F.cross_entropy), (counted_step, counted_by_hand), (verbose_step, F.cross_entropy)],
    ids=["loss", "sum-and-count", "dict"],
)
def test_step_results(tmp_path: Path, step: Any, twin: Any) -> None:
    run = fit(stoker.Recipe(model=build, step=step, optimizer=sgd, train=loader()), tmp_path)
    model = by_hand()
    plain_loop(model, sgd(model.parameters()), twin)
    assert_same(run.model, model)
    if step is verbose_step:
        assert 0 <= run.metrics["train/right"] <= 1
        assert run.metrics["train/spread"] > 0


def test_one_loss_per_sample(tmp_path: Path) -> None:
    loss = nn.CrossEntropyLoss(reduction="none")
    run = fit(stoker.Recipe(model=build, loss=loss, optimizer=sgd, train=loader()), tmp_path)
    model = by_hand()
    plain_loop(model, sgd(model.parameters()), lambda output, y: loss(output, y).sum() / len(y))
    assert_same(run.model, model)


class Named(nn.Module):
    """Takes its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.wide(left) * self.narrow(right).sigmoid()


def test_dict_batches(tmp_path: Path) -> None:
    data = loader({"left": X[:, :4], "right": X[:, 4:], "label": Y})
    run = fit(stoker.Recipe(model=Named, loss=nn.CrossEntropyLoss(), optimizer=sgd, train=data), tmp_path)
    model = by_hand(Named)
    optimizer = sgd(model.parameters())
    for x, y in batches(data):
        optimizer.zero_grad()
        F.cross_entropy(model(left=x[:, :4], right=x[:, 4:]), y).backward()
        optimizer.step()
    assert_same(run.model, model, by_hand(Named))


@pytest.mark.parametrize("how", ["norm", "value", "both"])
def test_clipping(tmp_path: Path, how: str) -> None:
    norm, value = (None if how == "value" else 0.05), (None if how == "norm" else 0.01)
    recipe = stoker.Recipe(
        model=build,
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd,
        train=loader(),
        clip_norm=norm,
        clip_value=value,
    )
    run = fit(recipe, tmp_path)
    model, clipped = by_hand(), []

    def clip() -> None:
        if norm is not None:
            clipped.append(nn.utils.clip_grad_norm_(model.parameters(), norm) > norm)
        if value is not None:
            clipped.append(any((p.grad.abs() > value).any() for p in model.parameters()))
            nn.utils.clip_grad_value_(model.parameters(), value)

    plain_loop(model, sgd(model.parameters()), F.cross_entropy, clip)
    assert any(clipped)
    assert_same(run.model, model)
    assert ("train/grad_norm" in run.metrics) == (norm is not None)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_average_of_the_weights(tmp_path: Path) -> None:
    recipe = stoker.Recipe(model=Normed, loss=nn.CrossEntropyLoss(), optimizer=sgd, train=loader(), ema=0.7)
    run = fit(recipe, tmp_path)
    model, average = by_hand(Normed), by_hand(Normed)

    def move() -> None:
        with torch.no_grad():
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - 0.7)
            for mean, now in zip(average.buffers(), model.buffers(), strict=True):
                mean.copy_(now)

    plain_loop(model, sgd(model.parameters()), F.cross_entropy, after_step=move)
    assert_same(run.model, average, by_hand(Normed))
    assert_same(raw(run), model, by_hand(Normed))
    assert bits(average.state_dict()) != bits(model.state_dict())


STEPS = EPOCHS * math.ceil(N / BATCH)


def warmed_cosine(optimizer: torch.optim.Optimizer) -> Any:
    def factor(step: int) -> float:
        if step < 4:
            return (step + 1) / 5
        return 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4)))

    return lr_scheduler.LambdaLR(optimizer, factor)


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int = STEPS) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=total_steps)


def chain(optimizer: torch.optim.Optimizer) -> Any:
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
        lr_scheduler.ExponentialLR(optimizer, 0.8),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4, 9])


@pytest.mark.parametrize(
    ("schedule", "twin"),
    [(one_cycle, one_cycle), (stoker.cosine(warmup_steps=4), warmed_cosine), (chain, chain)],
    ids=["OneCycle", "cosine", "SequentialLR"],
)
def test_schedules(tmp_path: Path, schedule: Any, twin: Any) -> None:
    recipe = stoker.Recipe(model=build, loss=nn.CrossEntropyLoss(), optimizer=sgd, train=loader(), schedule=schedule)
    run = fit(recipe, tmp_path, log_every=1)
    model, rates = by_hand(), []
    optimizer = sgd(model.parameters())
    scheduler = twin(optimizer)

    def move() -> None:
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])

    plain_loop(model, optimizer, F.cross_entropy, after_step=move)
    assert_same(run.model, model)
    assert run.metrics["train/lr"] == rates[-1]
    assert len(set(rates)) > STEPS // 2


def decaying(optimizer: torch.optim.Optimizer, gamma: float = 0.9) -> Any:
    return lr_scheduler.ExponentialLR(optimizer, gamma)


@pytest.mark.parametrize("schedule", [decaying, lr_scheduler.LinearLR], ids=["default", "class"])
def test_a_schedules_other_parameters_keep_their_defaults(tmp_path: Path, schedule: Any) -> None:
    recipe = stoker.Recipe(model=build, loss=nn.CrossEntropyLoss(), optimizer=sgd, train=loader(), schedule=schedule)
    run = fit(recipe, tmp_path)
    model = by_hand()
    optimizer = sgd(model.parameters())
    plain_loop(model, optimizer, F.cross_entropy, after_step=schedule(optimizer).step)
    assert_same(run.model, model)


def test_a_steps_other_parameters_keep_their_defaults(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Any, smoothing: float = 0.1) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)

    run = fit(stoker.Recipe(model=build, step=step, optimizer=sgd, train=loader()), tmp_path)
    model = by_hand()
    plain_loop(model, sgd(model.parameters()), lambda output, y: F.cross_entropy(output, y, label_smoothing=0.1))
    assert_same(run.model, model)


def test_reduce_on_plateau(tmp_path: Path) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.05)

    held_out = (X[:7] + 0.3, Y[:7].flip(0))
    recipe = stoker.Recipe(
        model=build,
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd,
        train=loader(),
        val=stoker.Loader(held_out),
        schedule=schedule,
    )
    run = fit(recipe, tmp_path, epochs=6)
    model = by_hand()
    optimizer = sgd(model.parameters())
    scheduler = schedule(optimizer)
    for epoch in range(6):
        for indices in loader().batches(SEED, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(X[indices]), Y[indices]).backward()
            optimizer.step()
        with torch.no_grad():
            scheduler.step(F.cross_entropy(model(held_out[0]), held_out[1]))
    assert_same(run.model, model)
    assert run.metrics["train/lr"] != 0.1
    assert optimizer.param_groups[0]["lr"] < 0.1


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 1))


def test_gan(tmp_path: Path) -> None:
    """Two objectives with optimizers of their own; the noise comes with the data."""
    noise = torch.randn(N, 2, generator=torch.Generator().manual_seed(1))
    bce = F.binary_cross_entropy_with_logits

    def criticise(model: Gan, batch: Any) -> Any:
        real, z = batch
        score = model.critic(torch.cat([real, model.generator(z).detach()]))
        return bce(score, torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]))

    def forge(model: Gan, batch: Any) -> Any:
        return bce(model.critic(model.generator(batch[1])), torch.ones(len(batch[1]), 1))

    recipe = stoker.Recipe(
        model=Gan,
        train=loader((X, noise)),
        objectives={
            "critic": stoker.Objective(
                step=criticise,
                optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
                params=lambda model: model.critic.parameters(),
                clip_norm=0.5,
            ),
            "generator": stoker.Objective(
                step=forge,
                optimizer=lambda p: torch.optim.RMSprop(p, lr=0.01),
                params=lambda model: model.generator.parameters(),
                schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 4),
            ),
        },
    )
    run = fit(recipe, tmp_path)
    model = by_hand(Gan)
    critic = torch.optim.Adam(model.critic.parameters(), lr=0.02)
    generator = torch.optim.RMSprop(model.generator.parameters(), lr=0.01)
    scheduler = lr_scheduler.StepLR(generator, 4)
    for epoch in range(EPOCHS):
        for indices in loader().batches(SEED, epoch):
            model.zero_grad()
            criticise(model, (X[indices], noise[indices])).backward()
            nn.utils.clip_grad_norm_(model.critic.parameters(), 0.5)
            critic.step()
            model.zero_grad()
            forge(model, (X[indices], noise[indices])).backward()
            generator.step()
            scheduler.step()
    assert_same(run.model, model, by_hand(Gan))
    assert run.metrics["train/generator/lr"] == scheduler.get_last_lr()[0] < 0.01
    assert {"train/critic/loss", "train/generator/loss", "train/critic/grad_norm"} <= run.metrics.keys()


@pytest.mark.parametrize("scheduled", [False, True])
def test_lbfgs(tmp_path: Path, scheduled: bool) -> None:
    def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.5, max_iter=6, line_search_fn="strong_wolfe")

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.ExponentialLR(optimizer, 0.9)

    recipe = stoker.Recipe(
        model=build,
        loss=nn.CrossEntropyLoss(),
        optimizer=optimizer_of,
        train=loader(),
        schedule=schedule if scheduled else None,
    )
    run = fit(recipe, tmp_path)
    model, calls = by_hand(), 0
    optimizer = optimizer_of(model.parameters())
    scheduler = schedule(optimizer)
    for x, y in batches():

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if scheduled:
            scheduler.step()
    assert_same(run.model, model)
    assert calls > 2 * STEPS


TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on; then it wakes, and it runs home. " * 4
LETTERS = sorted(set(TEXT))
STREAMS, WINDOW = 3, 10


class Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, len(LETTERS))

    def forward(self, ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        hidden, state = self.lstm(self.embedding(ids), state)
        return self.head(hidden), state


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of WINDOW characters and what follows them: row i goes on where row i - STREAMS ended."""
    ids = torch.tensor([LETTERS.index(c) for c in TEXT])
    length = (len(ids) - 1) // (STREAMS * WINDOW) * WINDOW  # characters per stream
    streams = torch.stack([ids[i * length : (i + 1) * length + 1] for i in range(STREAMS)])
    cut = [(streams[:, t : t + WINDOW], streams[:, t + 1 : t + WINDOW + 1]) for t in range(0, length, WINDOW)]
    return torch.cat([x for x, _ in cut]), torch.cat([y for _, y in cut])


def tbptt_step(model: nn.Module, batch: Any, carry: Any) -> Any:
    output, state = model(batch[0], carry)
    loss = F.cross_entropy(output.flatten(0, 1), batch[1].flatten())
    return {"loss": loss, "carry": tuple(part.detach() for part in state)}


def test_truncated_back_propagation_through_time(tmp_path: Path) -> None:
    x, y = windows()
    data = stoker.Loader((x, y), STREAMS)
    run = fit(stoker.Recipe(model=Characters, step=tbptt_step, optimizer=adamw, train=data), tmp_path)
    models = {}
    for carries in (True, False):
        model = models[carries] = by_hand(Characters)
        optimizer = adamw(model.parameters())
        for _ in range(EPOCHS):
            state = None
            for start in range(0, len(x), STREAMS):
                optimizer.zero_grad()
                output, state = model(x[start : start + STREAMS], state if carries else None)
                F.cross_entropy(output.flatten(0, 1), y[start : start + STREAMS].flatten()).backward()
                optimizer.step()
                state = tuple(part.detach() for part in state)
    assert_same(run.model, models[True], by_hand(Characters))
    assert bits(models[True].state_dict()) != bits(models[False].state_dict())


class Memory(nn.Module):
    """Two cells whose states have the same shape, so that one could be mistaken for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRU(6, 4), nn.GRU(6, 4)])


def memory_loss(model: Memory, x: torch.Tensor, state: Any, which: int) -> tuple[torch.Tensor, torch.Tensor]:
    output, state = model.cells[which](x[:, None], state)
    return (output[:, 0] - x[:, :4]).square().mean(), state.detach()


def test_every_objective_carries_its_own_state(tmp_path: Path) -> None:
    def step(which: int) -> Any:
        return lambda model, batch, carry: dict(
            zip(("loss", "carry"), memory_loss(model, batch[0], carry, which), strict=True)
        )

    objectives = {
        f"cell{which}": stoker.Objective(
            step=step(which), optimizer=sgd, params=lambda model, which=which: model.cells[which].parameters()
        )
        for which in range(2)
    }
    data = stoker.Loader((X, Y), BATCH)
    run = fit(stoker.Recipe(model=Memory, objectives=objectives, train=data), tmp_path)
    model = by_hand(Memory)
    optimizers = [sgd(cell.parameters()) for cell in model.cells]
    for _ in range(EPOCHS):
        states: list[Any] = [None, None]
        for start in range(0, N, BATCH):
            for which, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                loss, states[which] = memory_loss(model, X[start : start + BATCH], states[which], which)
                loss.backward()
                optimizer.step()
    assert_same(run.model, model, by_hand(Memory))


def test_state_is_carried_once_however_often_a_closure_runs(tmp_path: Path) -> None:
    def step(model: Memory, batch: Any, carry: Any) -> Any:
        loss, state = memory_loss(model, batch[0], carry, 0)
        return {"loss": loss, "carry": state}

    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)

    data = stoker.Loader((X, Y), BATCH)
    recipe = stoker.Recipe(
        model=Memory, step=step, optimizer=lbfgs, train=data, params=lambda model: model.cells[0].parameters()
    )
    run = fit(recipe, tmp_path)
    model = by_hand(Memory)
    optimizer = lbfgs(model.cells[0].parameters())
    for _ in range(EPOCHS):
        state = following = None
        for start in range(0, N, BATCH):

            def closure(x: torch.Tensor = X[start : start + BATCH], state: Any = state) -> torch.Tensor:
                nonlocal following
                optimizer.zero_grad()
                loss, following = memory_loss(model, x, state, 0)
                loss.backward()
                return loss

            optimizer.step(closure)
            state = following
    assert_same(run.model, model, by_hand(Memory))


def test_a_step_that_carries_nothing_over_begins_anew(tmp_path: Path) -> None:
    """A state is carried from even to odd batches only."""

    def step(model: Memory, batch: Any, carry: Any) -> Any:
        loss, state = memory_loss(model, batch[0], carry, 0)
        return {"loss": loss, "carry": state if carry is None else None}

    data = stoker.Loader((X, Y), BATCH)
    run = fit(stoker.Recipe(model=Memory, step=step, optimizer=sgd, train=data), tmp_path)
    model = by_hand(Memory)
    optimizer = sgd(model.parameters())
    for _ in range(EPOCHS):
        state = None
        for start in range(0, N, BATCH):
            optimizer.zero_grad()
            loss, following = memory_loss(model, X[start : start + BATCH], state, 0)
            loss.backward()
            optimizer.step()
            state = following if state is None else None
    assert_same(run.model, model, by_hand(Memory))


def graph(sparse: bool) -> dict[str, torch.Tensor]:
    """20 nodes, random symmetric edges, the adjacency normalised as Kipf & Welling do; 12 nodes are labelled."""
    generator = torch.Generator().manual_seed(3)
    edges = (torch.rand(20, 20, generator=generator) < 0.2).float()
    adjacency = ((edges + edges.T + torch.eye(20)) > 0).float()
    scale = adjacency.sum(1).rsqrt()
    adjacency = scale[:, None] * adjacency * scale
    return {
        "x": torch.randn(20, 6, generator=generator),
        "adjacency": adjacency.to_sparse() if sparse else adjacency,
        "y": torch.randint(0, 3, (20,), generator=generator),
        "labelled": torch.arange(20) < 12,
    }


class Gcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        return adjacency @ self.second(torch.relu(adjacency @ self.first(x)))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_graph_as_one_full_batch(tmp_path: Path, sparse: bool) -> None:
    data = graph(sparse)

    def step(model: nn.Module, batch: Any) -> Any:
        output = model(batch["x"], batch["adjacency"])[batch["labelled"]]
        return {"loss": F.cross_entropy(output, batch["y"][batch["labelled"]])}

    run = fit(stoker.Recipe(model=Gcn, step=step, optimizer=adamw, train=data), tmp_path, epochs=8)
    model = by_hand(Gcn)
    optimizer = adamw(model.parameters())
    for _ in range(8):
        optimizer.zero_grad()
        output = model(data["x"], data["adjacency"])
        F.cross_entropy(output[:12], data["y"][:12]).backward()
        optimizer.step()
    assert_same(run.model, model, by_hand(Gcn))
    assert (run.step, run.epoch) == (8, 8)


class Layered(nn.Module):
    """Two layers, each with a head for a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])


def local_loss(model: Layered, x: torch.Tensor, y: torch.Tensor, depth: int) -> torch.Tensor:
    for layer in model.layers[:depth]:
        x = torch.tanh(layer(x)).detach()
    return F.cross_entropy(model.heads[depth](torch.tanh(model.layers[depth](x))), y)


def layer_parameters(model: Layered, depth: int) -> list[nn.Parameter]:
    return [*model.layers[depth].parameters(), *model.heads[depth].parameters()]


def test_losses_local_to_a_layer_as_objectives(tmp_path: Path) -> None:
    objectives = {
        f"layer{depth}": stoker.Objective(
            step=lambda model, batch, *, depth=depth: local_loss(model, *batch, depth),
            optimizer=lambda parameters, depth=depth: torch.optim.SGD(parameters, lr=0.1 / (1 + depth)),
            params=lambda model, depth=depth: layer_parameters(model, depth),
        )
        for depth in range(2)
    }
    run = fit(stoker.Recipe(model=Layered, objectives=objectives, train=loader()), tmp_path)
    model = by_hand(Layered)
    optimizers = [torch.optim.SGD(layer_parameters(model, depth), lr=0.1 / (1 + depth)) for depth in range(2)]
    for x, y in batches():
        for depth, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            local_loss(model, x, y, depth).backward()
            optimizer.step()
    assert_same(run.model, model, by_hand(Layered))


def test_losses_local_to_a_layer_in_one_step(tmp_path: Path) -> None:
    def step(model: Layered, batch: Any) -> Any:
        losses = [local_loss(model, *batch, depth) for depth in range(2)]
        return {"loss": sum(losses), "last": losses[-1]}

    run = fit(stoker.Recipe(model=Layered, step=step, optimizer=adamw, train=loader()), tmp_path)
    model = by_hand(Layered)
    optimizer = adamw(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        hidden = torch.tanh(model.layers[0](x))
        first = F.cross_entropy(model.heads[0](hidden), y)
        second = F.cross_entropy(model.heads[1](torch.tanh(model.layers[1](hidden.detach()))), y)
        (first + second).backward()
        optimizer.step()
    assert_same(run.model, model, by_hand(Layered))


class Prototypes(nn.Module):
    """A loss that learns: distances to one point per class, at a learnt scale."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.eye(3))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(-torch.cdist(output, self.points) * self.log_scale.exp(), target)


def test_a_loss_with_parameters_of_its_own(tmp_path: Path) -> None:
    ours, theirs = Prototypes(), Prototypes()
    run = fit(stoker.Recipe(model=build, loss=ours, optimizer=sgd, train=loader()), tmp_path)
    model = by_hand()
    plain_loop(model, sgd([*model.parameters(), *theirs.parameters()]), theirs)
    assert_same(run.model, model)
    assert_same(ours, theirs, Prototypes())


def test_parameter_groups(tmp_path: Path) -> None:
    def groups(model: Any) -> list[dict[str, Any]]:
        return [{"params": model[0].parameters(), "lr": 0.3, "weight_decay": 0.1}, {"params": [model[2].weight]}]

    recipe = stoker.Recipe(model=build, loss=nn.CrossEntropyLoss(), optimizer=sgd, train=loader(), params=groups)
    run = fit(recipe, tmp_path)
    model = by_hand()
    plain_loop(model, sgd(groups(model)), F.cross_entropy)
    assert_same(run.model, model)
    assert torch.equal(run.model[2].bias, by_hand()[2].bias)  # in no group


def test_bf16(tmp_path: Path) -> None:
    recipe = stoker.Recipe(model=build, loss=nn.CrossEntropyLoss(), optimizer=sgd, train=loader())
    run = fit(recipe, tmp_path, precision="bf16")
    model, exact = by_hand(), by_hand()
    plain_loop(model, sgd(model.parameters()), F.cross_entropy, context=lambda: torch.autocast("cpu", torch.bfloat16))
    plain_loop(exact, sgd(exact.parameters()), F.cross_entropy)
    assert_same(run.model, model)
    assert bits(exact.state_dict()) != bits(model.state_dict())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before:UserWarning")  # by hand
@pytest.mark.parametrize(("clip_norm", "scheduled"), [(None, False), (1.0, False), (None, True)])
def test_fp16_skips_and_counts_overflowing_steps(tmp_path: Path, clip_norm: float | None, scheduled: bool) -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 40 * F.cross_entropy(output, target)  # times the first scale, 65536: too large for fp16

    def gentle(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.002)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.ExponentialLR(optimizer, 0.9)

    recipe = stoker.Recipe(
        model=build,
        loss=loss,
        optimizer=gentle,
        train=loader(),
        clip_norm=clip_norm,
        schedule=schedule if scheduled else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the user called nothing in the wrong order
        run = fit(recipe, tmp_path, precision="fp16")
    model, skipped = by_hand(), 0
    optimizer, scaler = gentle(model.parameters()), torch.amp.GradScaler("cpu")
    scheduler = schedule(optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss(model(x), y)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        finite = all(p.grad.isfinite().all() for p in model.parameters())
        skipped += not finite
        scaler.step(optimizer)
        scaler.update()
        if scheduled:
            scheduler.step()
    assert_same(run.model, model)
    assert 0 < skipped < STEPS
    assert run.metrics["train/skipped_steps"] == skipped


def test_fp16_is_refused_to_optimizers_that_need_a_closure(tmp_path: Path) -> None:
    """torch's scaler undoes its scale once a step; LBFGS evaluates several times."""
    recipe = stoker.Recipe(model=build, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.LBFGS, train=loader())
    with pytest.raises(stoker.UserError, match="fp16"):
        fit(recipe, tmp_path, precision="fp16")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch 2.11's own
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
def test_compiled(tmp_path: Path) -> None:
    data = stoker.Loader((X[:20], Y[:20]), BATCH, shuffle=True)  # batches of one shape: one graph
    recipe = stoker.Recipe(model=lambda: nn.Linear(6, 3), loss=nn.CrossEntropyLoss(), optimizer=sgd, train=data)
    run = fit(recipe, tmp_path, epochs=1, compile=True)
    torch.compiler.reset()
    model = by_hand(lambda: nn.Linear(6, 3))
    model.compile()
    optimizer = sgd(model.parameters())
    for x, y in batches(data, epochs=1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert_same(run.model, model, by_hand(lambda: nn.Linear(6, 3)))
