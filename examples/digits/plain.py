"""The twin of recipe.py in plain PyTorch: given the same order of samples, it ends in the same bits."""

import math
from collections.abc import Callable, Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


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


def train(
    epochs: int = 10,
    steps: int | None = None,
    seed: int = 0,
    order: Callable[[int], Sequence[list[int]]] | None = None,
    width: int = 32,
    lr: float = 3e-3,
    batch_size: int = 32,
) -> tuple[nn.Module, list[float]]:
    (x, y), _ = digits()
    torch.manual_seed(seed)
    model = build(width)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    total_steps = steps or epochs * -(-len(x) // batch_size)
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * (step / total_steps))))
    losses: list[float] = []
    epoch = 0
    while len(losses) < total_steps:
        batches = order(epoch) if order else torch.randperm(len(x)).split(batch_size)
        for batch in batches[: total_steps - len(losses)]:
            loss = criterion(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        epoch += 1
    return model, losses


@torch.inference_mode()
def accuracy(model: nn.Module) -> float:
    _, (x, y) = digits()
    return (model.eval()(x).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    model, losses = train()
    print(f"{len(losses)} steps, last loss {losses[-1]:.4f}, held-out accuracy {accuracy(model):.2%}")
