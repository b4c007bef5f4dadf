"""What a table's training rows teach: statistics, categories, classes, a vocabulary."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stoker.data.table_files import Indices, Numbers, Strings, numbers_of
from stoker.data.tables import Table
from stoker.data.texts import Tokenizer, tokenizer_for, tokenizer_of_state
from stoker.errors import UserError, nearest

if TYPE_CHECKING:
    from stoker.data.encoded_table import EncodedTable

_Floats = npt.NDArray[np.float64]
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Number:
    """Mean and standard deviation of a column's training rows, and whether some of them missed a value."""

    name: str
    mean: float
    std: float
    missing: bool


@dataclass(frozen=True)
class Category:
    """The values of a column's training rows, sorted; None, which comes last, is a missing value."""

    name: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class TableEncoder:
    """Encodes tables as the training rows were. `Table.fit` makes one; it is kept with every checkpoint.

    Args:
        name: unique in a recipe.
        numbers: columns of numbers.
        categories: columns of categories.
        texts: names of the columns of texts.
        tokenizer: cuts all texts into tokens.
        max_length: tokens that a text is cut to.
        target: name of the target's column.
        classes: the target's classes, sorted; None where it is a number, or there is none.
        is_one_hot: whether numbers and categories are one row of features.
        unknown: "error" or "code", see `Table.fit`.
    """

    name: str
    numbers: tuple[Number, ...]
    categories: tuple[Category, ...]
    texts: tuple[str, ...]
    tokenizer: Tokenizer | None
    max_length: int | None
    target: str | None
    classes: tuple[str, ...] | None
    is_one_hot: bool
    unknown: Literal["error", "code"]

    def __call__(self, table: Table) -> "EncodedTable":
        """Encode a table, at first use. Without a target of its own, its samples have none."""
        from stoker.data.encoded_table import EncodedTable

        return EncodedTable(table, self)

    @property
    def num_numbers(self) -> int:
        """Width of the numbers: one per column, and one more that says "missing" where training rows missed some."""
        return len(self.numbers) + sum(column.missing for column in self.numbers)

    @property
    def category_sizes(self) -> list[int]:
        """Number of codes of each category: the sizes of embeddings. With unknown="code", 0 is one of them."""
        return [len(column.values) + (self.unknown == "code") for column in self.categories]

    @property
    def num_features(self) -> int:
        """Width of the one-hot features."""
        if not self.is_one_hot:
            raise UserError(
                "num_features is of one-hot features",
                why="numbers and categories come apart: num_numbers and category_sizes",
                remedy="fit(one_hot=True)",
            )
        return self.num_numbers + sum(len(column.values) for column in self.categories)

    @property
    def num_classes(self) -> int:
        """Number of the target's classes."""
        if self.classes is None:
            is_number = f"the target {self.target!r} is a number" if self.target else "there is no target"
            raise UserError(f"{is_number}, and has no classes", remedy=f'types={{"{self.target}": "category"}}')
        return len(self.classes)

    @property
    def vocabulary(self) -> Tokenizer:
        """What cuts texts into tokens: `len()` is the number of ids, `encode` and `decode` go there and back."""
        if self.tokenizer is None:
            raise UserError("the table has no column of texts", remedy='types={"NAME": "text"}')
        return self.tokenizer

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "name": self.name,
            "numbers": [[c.name, c.mean, c.std, c.missing] for c in self.numbers],
            "categories": [[c.name, list(c.values)] for c in self.categories],
            "texts": list(self.texts),
            "tokenizer": self.tokenizer.state() if self.tokenizer is not None else None,
            "max_length": self.max_length,
            "target": self.target,
            "classes": list(self.classes) if self.classes is not None else None,
            "one_hot": self.is_one_hot,
            "unknown": self.unknown,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TableEncoder":
        """Encoder of a state."""
        return cls(
            name=state["name"],
            numbers=tuple(Number(*column) for column in state["numbers"]),
            categories=tuple(Category(name, tuple(values)) for name, values in state["categories"]),
            texts=tuple(state["texts"]),
            tokenizer=tokenizer_of_state(state["tokenizer"]) if state["tokenizer"] is not None else None,
            max_length=state["max_length"],
            target=state["target"],
            classes=tuple(state["classes"]) if state["classes"] is not None else None,
            is_one_hot=state["one_hot"],
            unknown=state["unknown"],
        )


# ------------------------------------------------------------------ reading columns


class Floats(NamedTuple):
    """A column as numbers."""

    values: _Floats  # [rows], 0 where missing
    absent: _Mask  # [rows]


def read_numbers(table: Table, name: str) -> Floats:
    """Read a column as numbers.

    Raises:
        UserError: a value is none; names its row.
    """
    column, missing = table.column(name), table.source.missing
    if isinstance(column, Numbers):
        values = column.values.astype(np.float64)
        absent, bad = np.isnan(values), np.isinf(values)
    else:
        is_absent = np.array([value in missing for value in column.values], dtype=bool)
        parsed = np.zeros(len(column.values))
        parsed[~is_absent] = numbers_of([v for v, gone in zip(column.values, is_absent, strict=True) if not gone])
        values, absent = parsed[column.codes], is_absent[column.codes]
        bad = np.isnan(values)
    if bad.any():
        row = int(np.argmax(bad))
        shown = column.take(np.array([row])).raw()[0]
        raise UserError(
            f"{table.file_of(row)}, column {name!r}: {shown!r} is not a number{and_more(bad)}",
            why=f"the column is of numbers: inferred from its first 1000 values, or said by types=; {_listed(missing)}",
            remedy=f'missing=(..., "{shown}") if that stands for no value; types={{"{name}": "category"}}; '
            f'or convert={{"{name}": a function that gives a number}}',
        )
    return Floats(np.where(absent, 0.0, values), absent)


def labels_of(table: Table, name: str) -> Strings:
    """Read a column as texts."""
    column = table.column(name)
    return column if isinstance(column, Strings) else column.strings()


def and_more(bad: _Mask) -> str:
    """Clause that counts the other rows of a mask."""
    return f", as in {bad.sum() - 1} more" if bad.sum() > 1 else ""


def _listed(missing: frozenset[str]) -> str:
    return f"missing values are spelled {', '.join(map(repr, sorted(missing)))}" if missing else "none is ever missing"


def _ordered(values: set[str]) -> list[str]:
    """Sorted as numbers where all are numbers, so that labels "0", "1", ... "10" are their own codes."""
    ordered = sorted(values)
    numbers = numbers_of(ordered)
    return ordered if np.isnan(numbers).any() else [ordered[i] for i in np.argsort(numbers, kind="stable")]


def used(column: Strings) -> tuple[list[str], Indices]:
    """Return the distinct values that occur, and for each row which of them."""
    distinct, inverse = np.unique(column.codes, return_inverse=True)
    return [column.values[code] for code in distinct], inverse.astype(np.int64)


# ------------------------------------------------------------------ fitting


def fit(
    table: Table,
    name: str,
    *,
    tokenizer: Any,
    max_length: int | None,
    one_hot: bool,
    unknown: Literal["error", "code"],
) -> TableEncoder:
    """Learn from a table's rows. See `Table.fit`."""
    if unknown not in ("error", "code"):
        raise UserError(f"unknown={unknown!r}{nearest(str(unknown), ['error', 'code'])}", remedy='"error" or "code"')
    if not len(table):
        raise UserError("there are no rows to fit on", remedy="check how the training split was chosen")
    target = table.source.target
    kinds = {column: kind for column, kind in table.kinds.items() if column != target}
    texts = tuple(column for column, kind in kinds.items() if kind == "text")
    if not texts and (tokenizer is not None or max_length is not None):
        raise UserError(
            "tokenizer= and max_length= are for texts, and the table has no column of texts",
            why=f"its columns are {kinds}",
            remedy='types={"NAME": "text"}',
        )
    training_texts = [text for column in texts for text in labels_of(table, column).raw()]
    return TableEncoder(
        name=name,
        numbers=tuple(_fit_number(table, column) for column, kind in kinds.items() if kind == "number"),
        categories=tuple(_fit_category(table, column) for column, kind in kinds.items() if kind == "category"),
        texts=texts,
        tokenizer=tokenizer_for(tokenizer, training_texts, max_length) if texts else None,
        max_length=max_length,
        target=target,
        classes=_fit_classes(table, target) if target is not None else None,
        is_one_hot=one_hot,
        unknown=unknown,
    )


def _fit_number(table: Table, name: str) -> Number:
    values, absent = read_numbers(table, name)
    present = values[~absent]
    if not len(present):
        raise UserError(
            f"column {name!r} has no value in any of the {len(table)} rows to fit on",
            remedy=f'types={{"{name}": "ignore"}}',
        )
    if present.min() == present.max():  # a deviation from rounding alone would blow up what follows
        return Number(name, float(present[0]), 1.0, bool(absent.any()))
    scale = 2.0 ** int(
        np.clip(np.frexp(np.abs(present).max())[1], -1021, 1021)
    )  # exact; squares of 1e200 would overflow
    scaled = present / scale
    mean = math.fsum(scaled) / len(scaled)  # exact sums: the same on every machine, in every order of the rows
    std = math.sqrt(math.fsum((scaled - mean) ** 2) / len(scaled))
    return Number(name, mean * scale, std * scale or 1.0, bool(absent.any()))


def _fit_category(table: Table, name: str) -> Category:
    values, _ = used(labels_of(table, name))
    present = {value for value in values if value not in table.source.missing}
    return Category(name, (*_ordered(present), *([None] if len(present) < len(set(values)) else [])))


def _fit_classes(table: Table, name: str) -> tuple[str, ...] | None:
    if table.kinds[name] == "number":
        target_numbers(table, name)
        return None
    labels = labels_of(table, name)
    refuse_missing(table, name, labels)
    classes = _ordered(set(used(labels)[0]))
    if len(classes) < 2:
        raise UserError(
            f"the target {name!r} is {classes[0]!r} in all {len(table)} rows to fit on",
            why="with one class there is nothing to tell apart",
            remedy="check the target=, and how the training split was chosen",
        )
    return tuple(classes)


def refuse_missing(table: Table, name: str, labels: Strings) -> None:
    """Refuse rows without a label."""
    gone = np.array([value in table.source.missing for value in labels.values], dtype=bool)[labels.codes]
    _refuse_absent(table, name, gone)


def _refuse_absent(table: Table, name: str, gone: _Mask) -> None:
    if gone.any():
        row = int(np.argmax(gone))
        shown = table.subset([row])[name][0]
        raise UserError(
            f"{table.file_of(row)}: the target {name!r} is missing ({shown!r}){and_more(gone)}",
            why=_listed(table.source.missing),
            remedy=f'leave such rows out: table.where(lambda row: row["{name}"] not in {sorted(table.source.missing)})'
            if shown == shown
            else f'leave such rows out: table.where(lambda row: row["{name}"] == row["{name}"])',
        )


def target_numbers(table: Table, name: str) -> torch.Tensor:
    """Read a target of numbers, float32 [rows], as they are."""
    values, absent = read_numbers(table, name)
    _refuse_absent(table, name, absent)
    return as_float32(table, name, values)


def as_float32(table: Table, name: str, values: _Floats) -> torch.Tensor:
    """Numbers [rows] of a column as a tensor, refused where one does not fit."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    outside = ~np.isfinite(found)
    if outside.any():
        row = int(np.argmax(outside))
        raise UserError(
            f"{table.file_of(row)}, column {name!r}: {table.subset([row])[name][0]} does not fit into float32",
            why="it ends beyond 3.4e38, after standardising with the training rows where it is not the target",
            remedy=f'convert={{"{name}": ...}} to another unit',
        )
    return torch.from_numpy(found)
