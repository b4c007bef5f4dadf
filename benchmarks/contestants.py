"""The same small training job written for stoker, for its peers and by hand.

Every function trains `job.model` for `job.epochs` epochs and returns the trained module. A peer's function
is the shortest program its own documentation shows, at that peer's defaults; the clock runs only between two
forwards, so neither its import nor its set-up is measured.
"""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 9_600
BATCH_SIZE = 32
STEPS_PER_EPOCH = SAMPLES // BATCH_SIZE


class Stopwatch:
    """Wall time of every training forward; CPU time (all threads) at the two ends of the measured window."""

    def __init__(self, epochs: int) -> None:
        # Whole epochs, from the first forward of the second to the first forward of the last: every one of
        # them contributes all its steps and exactly one epoch end (checkpoint, log, new iterator).
        self.first_step, self.last_step = STEPS_PER_EPOCH, STEPS_PER_EPOCH * (epochs - 1)
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    def forward_started(self) -> None:
        if len(self.wall_s) in (self.first_step, self.last_step):
            self.cpu_s.append(time.process_time())
        self.wall_s.append(time.perf_counter())


class TimedMLP(nn.Module):
    """64-128-128-10; one clock reading a forward, about 0.1 us, paid by all alike."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        # bound method: not a parameter, a buffer or a module, so nobody saves or moves it
        self.forward_started = stopwatch.forward_started

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.forward_started()
        output: Tensor = self.net(x)  # (B, 64) -> (B, 10)
        return output


@dataclass
class Job:
    model: TimedMLP
    x: Tensor  # (SAMPLES, 64)
    y: Tensor  # (SAMPLES,), what a fixed linear teacher says: learnable, so that accuracy shows real training
    epochs: int
    out: Path
    optimizer_name: str = "adamw"
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)

    def optimizer(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        if self.optimizer_name == "sgd":
            self.optimizers.append(torch.optim.SGD(params, lr=0.1))
        else:
            self.optimizers.append(torch.optim.AdamW(params, lr=1e-3))
        return self.optimizers[-1]

    def loader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH_SIZE, shuffle=True)


def make_job(epochs: int, out: Path, optimizer_name: str) -> tuple[Job, Stopwatch]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 64)
    y = (x @ torch.randn(64, 10)).argmax(dim=1)
    stopwatch = Stopwatch(epochs)
    return Job(TimedMLP(stopwatch), x, y, epochs, out, optimizer_name), stopwatch


def hand(job: Job) -> nn.Module:
    model, loss_fn = job.model, nn.CrossEntropyLoss()
    optimizer, loader = job.optimizer(model.parameters()), job.loader()
    model.train()
    for _ in range(job.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
    return model


def lean(job: Job) -> nn.Module:
    """By hand with no DataLoader: the floor for data that is already in memory."""
    model, loss_fn = job.model, nn.CrossEntropyLoss()
    optimizer = job.optimizer(model.parameters())
    model.train()
    for _ in range(job.epochs):
        for rows in torch.split(torch.randperm(SAMPLES), BATCH_SIZE):
            optimizer.zero_grad()
            loss = loss_fn(model(job.x[rows]), job.y[rows])
            loss.backward()
            optimizer.step()
    return model


def stoker(job: Job) -> nn.Module:
    import stoker

    recipe = stoker.Recipe(
        model=job.model,
        loss=nn.CrossEntropyLoss(),
        optimizer=job.optimizer,
        train=stoker.Loader(TensorDataset(job.x, job.y), BATCH_SIZE, shuffle=True),
    )
    model: nn.Module = stoker.fit(recipe, epochs=job.epochs, out=job.out / "run").model
    return model


def ignite(job: Job) -> nn.Module:
    from ignite.engine import create_supervised_trainer

    optimizer, loss_fn = job.optimizer(job.model.parameters()), nn.CrossEntropyLoss()
    create_supervised_trainer(job.model, optimizer, loss_fn).run(job.loader(), max_epochs=job.epochs)
    return job.model


def accelerate(job: Job) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loss_fn = nn.CrossEntropyLoss()
    model, optimizer, loader = accelerator.prepare(job.model, job.optimizer(job.model.parameters()), job.loader())
    model.train()
    for _ in range(job.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
    return job.model


def transformers(job: Job) -> nn.Module:
    from transformers import Trainer, TrainingArguments

    class WithLoss(nn.Module):
        """Trainer wants the loss from the model's forward and its inputs by name."""

        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.loss_fn = job.model, nn.CrossEntropyLoss()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.mlp(x)
            return {"loss": self.loss_fn(logits, labels), "logits": logits}

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        xs, ys = zip(*rows, strict=True)
        return {"x": torch.stack(xs), "labels": torch.stack(ys)}

    Trainer(
        model=WithLoss(),
        args=TrainingArguments(
            output_dir=str(job.out),
            num_train_epochs=job.epochs,
            per_device_train_batch_size=BATCH_SIZE,
            use_cpu=True,
        ),
        data_collator=collate,
        train_dataset=TensorDataset(job.x, job.y),
        optimizers=(job.optimizer(job.model.parameters()), None),
    ).train()
    return job.model


def lightning(job: Job) -> nn.Module:
    import lightning as L

    class LitMLP(L.LightningModule):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.loss_fn = job.model, nn.CrossEntropyLoss()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            loss: Tensor = self.loss_fn(self.mlp(x), y)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer(self.parameters())

    trainer = L.Trainer(max_epochs=job.epochs, accelerator="cpu", default_root_dir=job.out)
    trainer.fit(LitMLP(), job.loader())
    return job.model


@dataclass(frozen=True)
class Contestant:
    label: str
    train: Callable[[Job], nn.Module]
    package: str | None = None  # the distribution that brings it
    module: str | None = None


CONTESTANTS = {
    "hand": Contestant("hand-written loop, DataLoader", hand),
    "again": Contestant("the same again (noise)", hand),
    "lean": Contestant("hand-written loop, no DataLoader", lean),
    "stoker": Contestant("stoker.fit", stoker, "stoker", "stoker"),
    "ignite": Contestant("ignite Engine", ignite, "pytorch-ignite", "ignite"),
    "accelerate": Contestant("accelerate", accelerate, "accelerate", "accelerate"),
    "transformers": Contestant("transformers Trainer", transformers, "transformers", "transformers"),
    "lightning": Contestant("lightning Trainer", lightning, "lightning", "lightning"),
}
