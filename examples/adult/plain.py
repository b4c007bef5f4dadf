"""The twin of recipe.py in plain PyTorch: given the same order of samples, it ends in the same bits."""

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from stoker.data import split

NUMBERS = [0, 2, 4, 10, 11, 12]  # age, fnlwgt, education-num, capital-gain, capital-loss, hours-per-week
CATEGORIES = [1, 3, 5, 6, 7, 8, 9, 13]
INCOME = 14
WARMUP_STEPS = 100

Split = tuple[Tensor, Tensor]  # features [N, F], income above 50K [N]


def read(data: str, part: str) -> list[list[str]]:
    folder = data or os.environ.get("STOKER_DATA") or os.environ.get("STOKER_TEST_DATA") or "../shared/data"
    with (Path(folder) / f"adult/adult-{part}.csv").open(newline="", encoding="utf-8") as lines:
        return [row for row in csv.reader(lines, skipinitialspace=True) if row]


def load(data: str = "") -> tuple[Split, Split, Split]:
    """Train, val and test: standardised numbers, then one-hot categories, as the training rows have them."""
    known, test = read(data, "train"), read(data, "test")
    train, val = split(known, val=0.1, stratify=[row[INCOME] for row in known])

    scales = []
    for column in NUMBERS:
        values = [float(row[column]) for row in train]
        mean = math.fsum(values) / len(values)
        scales.append((mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))))
    codes: list[dict[str, int]] = []
    for column in CATEGORIES:  # "?" (missing) is a value like any other, and comes last
        values = sorted({row[column] for row in train}, key=lambda value: (value == "?", value))
        codes.append({value: code for code, value in enumerate(values)})

    def features(row: list[str]) -> Iterator[float]:
        for column, (mean, deviation) in zip(NUMBERS, scales, strict=True):
            yield (float(row[column]) - mean) / deviation
        for column, code_of in zip(CATEGORIES, codes, strict=True):
            hot = code_of.get(row[column])  # none is hot for a value that no training row has
            yield from (float(code == hot) for code in range(len(code_of)))

    def tensors(rows: Sequence[list[str]]) -> Split:
        rich = torch.tensor([row[INCOME].startswith(">50K") for row in rows])  # the test file has ">50K."
        return torch.tensor([list(features(row)) for row in rows]), rich.long()

    return tensors(train), tensors(val), tensors(test)


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
    x, y = load(data)[0]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, 2))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.3)
    total_steps = steps or epochs * -(-len(x) // batch_size)

    def factor(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / (WARMUP_STEPS + 1)
        return 0.5 * (1 + math.cos(math.pi * ((step - WARMUP_STEPS) / (total_steps - WARMUP_STEPS))))

    schedule = LambdaLR(optimizer, factor)
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
def error(model: nn.Module, part: Split) -> float:
    x, y = part
    return (model.eval()(x).argmax(1) != y).float().mean().item()


if __name__ == "__main__":
    model, losses = train()
    _, val, test = load()
    print(f"{len(losses)} steps, last loss {losses[-1]:.4f}", end=", ")
    print(f"error {error(model, val):.2%} on val, {error(model, test):.2%} on test")
