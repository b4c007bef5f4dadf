"""The twin of recipe.py in plain PyTorch: given the same order of samples, it ends in the same bits."""

from collections.abc import Callable, Sequence

import torch
from fashion_task import build, load
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR


def train(
    epochs: int = 6,
    steps: int | None = None,
    seed: int = 0,
    order: Callable[[int], Sequence[list[int]]] | None = None,
    width: int = 32,
    lr: float = 4e-3,
    batch_size: int = 128,
    data: str = "",
) -> tuple[nn.Module, list[float]]:
    x, y = load("train", data)
    torch.manual_seed(seed)
    model = build(width)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    total_steps = steps or epochs * -(-len(x) // batch_size)
    schedule = OneCycleLR(optimizer, lr, total_steps, cycle_momentum=False)
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
def accuracy(model: nn.Module, data: str = "") -> float:
    x, y = load("t10k", data)
    model.eval()
    hits = [(model(a).argmax(1) == b).sum() for a, b in zip(x.split(500), y.split(500), strict=True)]
    return sum(hits).item() / len(x)


if __name__ == "__main__":
    model, losses = train()
    print(f"{len(losses)} steps, last loss {losses[-1]:.4f}, test accuracy {accuracy(model):.2%}")
