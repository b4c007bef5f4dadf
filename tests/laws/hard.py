"""A recipe with everything that makes resuming hard: dropout, BatchNorm, augmentation from three generators,
warm-up and cosine, an average of the weights, weighted sampling, and data that take a while to read."""

import random
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import stoker


class Augmented(Dataset):
    """Noise from torch, numpy and random on every sample."""

    def __init__(self, n: int, sleep_s: float) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(n, 12, generator=generator)
        self.y = torch.randint(0, 4, (n,), generator=generator)
        self.sleep_s = sleep_s

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.sleep_s)
        noise = torch.randn(12) + np.random.normal() + random.gauss(0, 1)
        return self.x[index] + 0.1 * noise, self.y[index]


class Stream(IterableDataset):
    """The same samples, one after the other, with no length and no state."""

    def __init__(self, samples: Augmented) -> None:
        self.samples = samples

    def __iter__(self):
        yield from (self.samples[i] for i in range(len(self.samples)))


def recipe(lr: float = 1e-2, n: int = 96, batch_size: int = 8, sleep_s: float = 0.0, sampling: str = "weighted"):
    data = Augmented(n, sleep_s)
    order = {
        "weighted": {"weights": np.linspace(0.5, 2.0, n)},
        "shuffled": {"shuffle": True},
        "sequential": {},
        "iterable": {},
        "own": {"sampler": torch.utils.data.RandomSampler(range(n), num_samples=2 * n, generator=torch.Generator())},
    }[sampling]
    return stoker.Recipe(
        model=lambda: nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
        ),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
        schedule=stoker.constant(10) if sampling == "iterable" else stoker.cosine(warmup_steps=10),
        train=stoker.Loader(Stream(data) if sampling == "iterable" else data, batch_size, **order),
        val=stoker.Loader(Augmented(20, sleep_s)),
        metrics={"accuracy": lambda output, target: (output.argmax(1) == target).float()},
        clip_norm=1.0,
        ema=0.9,
        early_stop=stoker.EarlyStop("val/loss", patience=50),
    )
