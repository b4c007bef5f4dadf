"""Small recipes, one for each way in which a model can be called and answer."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stoker

WIDTH = 8


def data(rows: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()


def words(rows: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(1, 50, (3 + 5 * i % 11,), generator=generator) for i in range(rows)]
    return [{"input_ids": ids, "labels": ids[0] % 2} for ids in made]


def made(model: Any, samples: Any = None, val_samples: Any = None, **options: Any) -> stoker.Recipe:
    samples = data() if samples is None else samples
    val = data(32, seed=2) if val_samples is None else val_samples
    collate = stoker.data.pad() if isinstance(samples, list) else None
    if not {"loss", "step"} & set(options):
        options["loss"] = nn.CrossEntropyLoss()
    return stoker.Recipe(
        model=model,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        train=stoker.Loader(samples, 8, shuffle=True, collate=collate),
        val=stoker.Loader(val, 8, collate=collate) if val is not False else None,
        **options,
    )


def mlp() -> stoker.Recipe:
    return made(lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Linear(6, 2)), ema=0.5)


def conv() -> stoker.Recipe:
    return made(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, WIDTH)),
            nn.Conv1d(1, 4, 3),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * (WIDTH - 2), 2),
        )
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def tied() -> stoker.Recipe:
    ids = torch.randint(0, 20, (40, 5), generator=torch.Generator().manual_seed(3))
    return made(Tied, (ids, ids), (ids[:24].flip(1), ids[:24]), loss=lambda o, t: F.cross_entropy(o.mT, t))


class TimeFirst(nn.Module):
    """Its batch is the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][-1])


def step() -> stoker.Recipe:
    def turned(model: nn.Module, batch: list[Tensor]) -> Tensor:
        x = batch[0].unflatten(1, (WIDTH // 2, 2)).transpose(0, 1)
        return F.cross_entropy(model(x), batch[1])

    return made(TimeFirst, step=turned)


@dataclass
class Answer:
    logits: Tensor
    cache: Any = None
    nothing: Tensor | None = None


class Two(nn.Module):
    """Two inputs and a number by name; an answer of several parts in a kind of container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0, extra: Tensor) -> Any:
        logits = self.linear(x) * scale + extra["mean"] if isinstance(extra, dict) else self.linear(x + extra)
        if self.kind == "tuple":
            return logits, (logits.argmax(1), None)
        if self.kind == "dataclass":
            return Answer(logits, cache=object())
        return {"logits": logits, "best": logits.argmax(1), "x": x}


def two(kind: str) -> stoker.Recipe:
    def step(model: nn.Module, batch: list[Tensor]) -> Tensor:
        extra: Any = batch[0].flip(1) if kind == "tuple" else {"mean": batch[0].mean(1, keepdim=True)}
        output = model(batch[0], extra=extra, scale=2.0)
        logits = output[0] if kind == "tuple" else output.logits if kind == "dataclass" else output["logits"]
        return F.cross_entropy(logits, batch[1])

    return made(lambda: Two(kind), step=step)


def several() -> stoker.Recipe:
    return two("dict")


def pair() -> stoker.Recipe:
    return two("tuple")


def record() -> stoker.Recipe:
    return two("dataclass")


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 6), nn.Linear(6, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask[..., None].float()
        return self.head((self.embed(input_ids) * weights).sum(1) / weights.sum(1))


def lengths() -> stoker.Recipe:
    return made(Mean, words(), words(24))


def bert() -> stoker.Recipe:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    step = {"step": lambda model, batch: model(**batch).loss}
    return made(lambda: BertForSequenceClassification(config), words(), words(24), **step)


def whole() -> stoker.Recipe:
    return made(lambda: nn.Linear(WIDTH, 2), val_samples=False)


class Odd(nn.Module):
    """A linear layer with a habit."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.habit, self.linear = habit, nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.habit == "branch" and x.sum() > 0:
            return self.linear(-x)
        if self.habit == "fixed" and len(x) in (1, 4, 8):
            return self.linear(x)
        if self.habit == "noise":
            return self.linear(x + torch.randn_like(x))
        if self.habit == "false" and torch.compiler.is_exporting():
            return self.linear(x) + 1
        if self.habit == "warn":
            warnings.warn("the model's own", UserWarning, stacklevel=1)
        return self.linear(x)


def branch() -> stoker.Recipe:
    return made(lambda: Odd("branch"))


def fixed() -> stoker.Recipe:
    return made(lambda: Odd("fixed"))


def noise() -> stoker.Recipe:
    return made(lambda: Odd("noise"))


def false() -> stoker.Recipe:
    return made(lambda: Odd("false"))


def warn() -> stoker.Recipe:
    return made(lambda: Odd("warn"))


def parts() -> stoker.Recipe:
    return made(
        lambda: nn.ModuleDict({"part": nn.Linear(WIDTH, 2)}),
        step=lambda model, batch: F.cross_entropy(model["part"](batch[0]), batch[1]),
    )


def broken() -> stoker.Recipe:
    def step(model: nn.Module, batch: list[Tensor]) -> Tensor:
        if not model.training and not torch.is_grad_enabled():
            raise ValueError("no evaluation here")
        return F.cross_entropy(model(batch[0]), batch[1])

    return made(lambda: nn.Linear(WIDTH, 2), step=step, val_samples=False)


class Keeps(nn.Module):
    """State that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def keeps() -> stoker.Recipe:
    return made(Keeps)
