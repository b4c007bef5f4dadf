"""The twin of recipe.py in plain PyTorch: given the same order of samples, it ends in the same bits."""

import math
from collections.abc import Callable, Sequence

import torch
from adult_task import Classifier, Split, load
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

WARMUP_STEPS = 100


def train(
    epochs: int = 6,
    steps: int | None = None,
    seed: int = 0,
    order: Callable[[int], Sequence[list[int]]] | None = None,
    width: int = 128,
    lr: float = 2e-3,
    batch_size: int = 128,
    data: str = "",
) -> tuple[nn.Module, list[float]]:
    (numbers, categories, rich), _, _, num_codes = load(data)
    torch.manual_seed(seed)
    model = Classifier(num_codes, width)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.3)
    total_steps = steps or epochs * -(-len(rich) // batch_size)

    def factor(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / (WARMUP_STEPS + 1)
        return 0.5 * (1 + math.cos(math.pi * ((step - WARMUP_STEPS) / (total_steps - WARMUP_STEPS))))

    schedule = LambdaLR(optimizer, factor)
    losses: list[float] = []
    epoch = 0
    while len(losses) < total_steps:
        batches = order(epoch) if order else torch.randperm(len(rich)).split(batch_size)
        for batch in batches[: total_steps - len(losses)]:
            loss = criterion(model(numbers[batch], categories[batch]), rich[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        epoch += 1
    return model, losses


@torch.inference_mode()
def error(model: nn.Module, split: Split) -> float:
    numbers, categories, rich = split
    return (model.eval()(numbers, categories).argmax(1) != rich).float().mean().item()


if __name__ == "__main__":
    model, losses = train()
    val, test = load()[1:3]
    print(f"{len(losses)} steps, last loss {losses[-1]:.4f}", end=", ")
    print(f"error {error(model, val):.2%} on val, {error(model, test):.2%} on test")
