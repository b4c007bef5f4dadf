"""Fashion-MNIST: images. `stoker train examples/fashion/recipe.py --epochs 6`."""

import torch
from fashion_task import build, load
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import stoker


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float()


def recipe(width: int = 32, lr: float = 4e-3, batch_size: int = 128, data: str = "") -> stoker.Recipe:
    """Classify 28x28 pictures of clothes; scored on the 10,000 test images after every epoch."""
    return stoker.Recipe(
        model=lambda: build(width),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.05),
        schedule=lambda optimizer, total_steps: OneCycleLR(optimizer, lr, total_steps, cycle_momentum=False),
        train=stoker.Loader(load("train", data), batch_size, shuffle=True),
        val=stoker.Loader(load("t10k", data), 500),
        metrics={"accuracy": accuracy},
        best="val/accuracy",
        best_mode="max",
    )
