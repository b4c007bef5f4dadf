"""Handwritten digits: the smallest complete recipe. `stoker train examples/digits/recipe.py --epochs 10`."""

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


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def build(width: int) -> nn.Module:
    return nn.Sequential(
        *block(1, width),
        *block(width, width),
        nn.MaxPool2d(2),  # [B, width, 4, 4]
        *block(width, 2 * width),
        nn.MaxPool2d(2),  # [B, 2 * width, 2, 2]
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float()


def recipe(width: int = 32, lr: float = 3e-3, batch_size: int = 32) -> stoker.Recipe:
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
