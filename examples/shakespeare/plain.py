"""The twin of recipe.py in plain PyTorch: given the same order of samples, it ends in the same bits."""

import math
from collections.abc import Callable, Sequence

import torch
from shakespeare_task import GPT, groups, load, loss
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

WARMUP_STEPS, FINAL = 100, 0.1


def train(
    epochs: int = 1,
    steps: int | None = 2000,
    seed: int = 0,
    order: Callable[[int], Sequence[list[int]]] | None = None,
    layers: int = 4,
    heads: int = 4,
    width: int = 128,
    block: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 12,
    data: str = "",
) -> tuple[nn.Module, list[float]]:
    (x, y), _, num_codes = load(block, data)
    torch.manual_seed(seed)
    model = GPT(num_codes, block, layers, heads, width)
    optimizer = torch.optim.AdamW(groups(model, weight_decay), lr=lr, betas=(0.9, 0.99))
    total_steps = steps or epochs * -(-len(x) // batch_size)

    def factor(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / (WARMUP_STEPS + 1)
        done = (step - WARMUP_STEPS) / (total_steps - WARMUP_STEPS)
        return FINAL + (1 - FINAL) * (0.5 * (1 + math.cos(math.pi * done)))

    schedule = LambdaLR(optimizer, factor)
    losses: list[float] = []
    epoch = 0
    while len(losses) < total_steps:
        batches = order(epoch) if order else torch.randperm(len(x)).split(batch_size)
        for batch in batches[: total_steps - len(losses)]:
            value = loss(model(x[batch]), y[batch])
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
        epoch += 1
    return model, losses


@torch.inference_mode()
def val_loss(model: nn.Module, block: int = 64, data: str = "") -> float:
    """Mean over the whole validation split."""
    _, (x, y), _ = load(block, data)
    model.eval()
    sums = [loss(model(a), b).item() * len(a) for a, b in zip(x.split(128), y.split(128), strict=True)]
    return sum(sums) / len(x)


if __name__ == "__main__":
    model, losses = train()
    print(f"{len(losses)} steps, last loss {losses[-1]:.4f}, val loss {val_loss(model):.4f}")
