"""Handwritten digits: the smallest complete recipe. `stoker train examples/digits/recipe.py --epochs 12`."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import stoker


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # [N, 1, 8, 8] in [0, 1]
    labels = torch.tensor(y)
    train, val = train_test_split(range(len(y)), test_size=0.2, random_state=0, stratify=y)
    return (images[train], labels[train]), (images[val], labels[val])


def build(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),  # [B, 2 * width, 4, 4]
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float()


def recipe(width: int = 32, lr: float = 2e-3, batch_size: int = 32) -> stoker.Recipe:
    """Classify 8x8 digits with a small convolutional network; a fifth of the images is held out."""
    train, val = digits()
    return stoker.Recipe(
        model=lambda: build(width),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
        schedule=stoker.cosine(),
        train=stoker.Loader(train, batch_size, shuffle=True),
        val=stoker.Loader(val),
        metrics={"accuracy": accuracy},
    )
