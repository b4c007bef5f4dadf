"""The twin of recipe.py in plain PyTorch: given the same order of samples, it ends in the same bits."""

import math
from collections.abc import Callable, Sequence

import torch
from names_task import Classifier, Names, collate
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

WARMUP_STEPS = 100


def train(
    epochs: int = 6,
    steps: int | None = None,
    seed: int = 0,
    order: Callable[[int], Sequence[list[int]]] | None = None,
    width: int = 128,
    lr: float = 3e-3,
    batch_size: int = 64,
    data: str = "",
) -> tuple[nn.Module, list[float]]:
    names = Names("train", data)
    torch.manual_seed(seed)
    model = Classifier(len(names.codes), len(names.languages), width)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    total_steps = steps or epochs * -(-len(names) // batch_size)

    def factor(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / (WARMUP_STEPS + 1)
        return 0.5 * (1 + math.cos(math.pi * ((step - WARMUP_STEPS) / (total_steps - WARMUP_STEPS))))

    schedule = LambdaLR(optimizer, factor)
    losses: list[float] = []
    epoch = 0
    while len(losses) < total_steps:
        batches = order(epoch) if order else torch.randperm(len(names)).split(batch_size)
        for batch in batches[: total_steps - len(losses)]:
            x, y = collate([names[int(i)] for i in batch])
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        epoch += 1
    return model, losses


@torch.inference_mode()
def scores(model: nn.Module, data: str = "") -> tuple[float, float]:
    """Accuracy, and the mean recall of the languages."""
    names = Names("val", data)
    x, y = collate([names[i] for i in range(len(names))])
    hit = (model.eval()(x).argmax(1) == y).float()
    recalls = [hit[y == language].mean() for language in y.unique()]
    return hit.mean().item(), torch.stack(recalls).mean().item()


if __name__ == "__main__":
    model, losses = train()
    accuracy, recall = scores(model)
    print(f"{len(losses)} steps, last loss {losses[-1]:.4f}, val accuracy {accuracy:.2%}, mean recall {recall:.2%}")
