"""Surnames: text. `stoker train examples/names/recipe.py --epochs 6`."""

import torch
from names_task import Classifier, Names, collate
from torch import Tensor, nn
from torchmetrics.classification import MulticlassRecall

import stoker


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float()


def recipe(width: int = 128, lr: float = 3e-3, batch_size: int = 64, data: str = "") -> stoker.Recipe:
    """Tell the language of a surname, of 18; half of the names are Russian, hence the mean recall as well."""
    train, val = Names("train", data), Names("val", data)
    num_languages = len(train.languages)
    return stoker.Recipe(
        model=lambda: Classifier(len(train.codes), num_languages, width),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
        schedule=stoker.cosine(warmup_steps=100),
        train=stoker.Loader(train, batch_size, shuffle=True, collate=collate),
        val=stoker.Loader(val, 512, collate=collate),
        metrics={"accuracy": accuracy, "recall": MulticlassRecall(num_languages, average="macro")},
    )
