"""The Adult census data and a network for mixed columns, shared by recipe.py and plain.py."""

import csv
import os
from pathlib import Path

import torch
from torch import Tensor, nn

import stoker

NUMERIC = ["age", "education-num", "capital-gain", "capital-loss", "hours-per-week"]
CATEGORICAL = [
    "workclass", "education", "marital-status", "occupation", "relationship", "race", "sex", "native-country",
]  # fmt: skip
COLUMNS = [
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
    "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
]  # fmt: skip
NUM_VAL = 3_256  # the last tenth of the training file

Split = tuple[Tensor, Tensor, Tensor]  # numbers [N, 5], categories [N, 8], income above 50K [N]


def folder(data: str = "") -> Path:
    root = data or os.environ.get("STOKER_DATA") or os.environ.get("STOKER_TEST_DATA")
    path = Path(root or Path(__file__).parent / "../../../shared/data").resolve() / "adult"
    for name in ("adult-train.csv", "adult-test.csv"):
        if not (path / name).is_file():
            raise stoker.UserError(
                f"the Adult data is not here: {path / name} does not exist",
                why="examples download nothing",
                remedy="put UCI's adult.data and adult.test, without comment lines, into FOLDER/adult as "
                "adult-train.csv and adult-test.csv, then pass data=FOLDER or set STOKER_DATA=FOLDER",
            )
    return path


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines, COLUMNS, skipinitialspace=True)
        return [row for row in rows if row["income"]]


def load(data: str = "") -> tuple[Split, Split, Split, list[int]]:
    """Train, val and test splits, and the number of codes of each category.

    Means, deviations and vocabularies come from the training rows alone; code 0 is for values not in them.
    "?" (missing) is a value like any other. fnlwgt is left out: it weighs the survey, and tells nothing of the person.
    """
    rows, test = read(folder(data) / "adult-train.csv"), read(folder(data) / "adult-test.csv")
    train, val = rows[:-NUM_VAL], rows[-NUM_VAL:]
    codes = {c: {v: i for i, v in enumerate(sorted({row[c] for row in train}), 1)} for c in CATEGORICAL}

    def numbers(split: list[dict[str, str]]) -> Tensor:
        x = torch.tensor([[float(row[c]) for c in NUMERIC] for row in split])
        x[:, 2:4] = x[:, 2:4].log1p()  # gains and losses: mostly 0, up to 99,999
        return x

    mean, deviation = numbers(train).mean(0), numbers(train).std(0)

    def tensors(split: list[dict[str, str]]) -> Split:
        categories = torch.tensor([[codes[c].get(row[c], 0) for c in CATEGORICAL] for row in split])
        rich = torch.tensor([row["income"].startswith(">50K") for row in split])  # the test file has ">50K."
        return (numbers(split) - mean) / deviation, categories, rich.long()

    return tensors(train), tensors(val), tensors(test), [len(codes[c]) + 1 for c in CATEGORICAL]


class Classifier(nn.Module):
    """An embedding per category, beside the numbers, into a small network."""

    def __init__(self, num_codes: list[int], width: int) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(n, min(8, (n + 1) // 2)) for n in num_codes)
        inputs = len(NUMERIC) + sum(table.embedding_dim for table in self.embed)
        self.body = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        embedded = [table(categories[:, i]) for i, table in enumerate(self.embed)]
        return self.body(torch.cat([numbers, *embedded], dim=1))
