"""Tables encoded as their training rows were: tensors, and token ids where there are texts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stoker.data.table_encoder import (
    Category,
    Number,
    TableEncoder,
    and_more,
    as_float32,
    labels_of,
    read_numbers,
    refuse_missing,
    target_numbers,
    used,
)
from stoker.data.table_files import Indices
from stoker.data.tables import Table, chosen
from stoker.data.texts import Tokens, tokenise
from stoker.errors import UserError, nearest

# Ways in which one label is often spelled twice, as the user would write them in convert=.
_SPELLINGS: dict[str, Callable[[str], str]] = {
    'lambda s: s.rstrip(".")': lambda s: s.rstrip("."),
    "str.lower": str.lower,
    "str.upper": str.upper,
    "str.capitalize": str.capitalize,
}


@dataclass(frozen=True)
class Encoded:
    """The elements of all samples, the target last."""

    parts: tuple[torch.Tensor | Tokens, ...]

    def take(self, rows: Indices) -> "Encoded":
        """Return the same at some rows."""
        index = torch.from_numpy(rows)
        return Encoded(tuple(p.take(rows) if isinstance(p, Tokens) else p.index_select(0, index) for p in self.parts))


def encode(encoder: TableEncoder, table: Table) -> Encoded:
    """Encode all rows of a table.

    Raises:
        UserError: a column is absent, or a value is not what the training rows lead to expect; names its row.
    """
    parts: list[torch.Tensor | Tokens] = []
    numbers = [part for column in encoder.numbers for part in [_encode_number(encoder, column, table)]]
    indicators = [absent for column, (_, absent) in zip(encoder.numbers, numbers, strict=True) if column.missing]
    features = [*(values for values, _ in numbers), *indicators]
    codes = [_encode_category(encoder, column, table) for column in encoder.categories]
    if encoder.is_one_hot:
        shift = int(encoder.unknown == "code")  # code 0 is unknown: a row of zeros
        wide = [_one_hot(code - shift, len(c.values)) for code, c in zip(codes, encoder.categories, strict=True)]
        if features or wide:
            parts.append(torch.cat([*(column[:, None] for column in features), *wide], dim=1))
    else:
        parts += [torch.stack(columns, dim=1) for columns in (features, codes) if columns]
    parts += [_encode_text(encoder, name, table) for name in encoder.texts]
    if table.source.target is not None:
        parts.append(_encode_target(encoder, table))
    if not parts:
        raise UserError(
            "nothing of the table is left to train on",
            why=f"its columns are {table.kinds}",
            remedy="name a target=, or leave fewer columns out",
        )
    return Encoded(tuple(parts))


def _encode_number(encoder: TableEncoder, column: Number, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
    values, absent = read_numbers(table, column.name)
    if absent.any() and not column.missing and encoder.unknown == "error":
        row = int(np.argmax(absent))
        raise UserError(
            f"{table.file_of(row)}, column {column.name!r}: no value ({table.subset([row])[column.name][0]!r})",
            why="the training rows missed none here, so the model cannot know what to make of it",
            remedy='fit(unknown="code") takes the mean of the training rows; or leave such rows out with where()',
        )
    with np.errstate(over="ignore"):
        standard = np.where(absent, 0.0, (values - column.mean) / column.std)
    return as_float32(table, column.name, standard), torch.from_numpy(absent.astype(np.float32))


def _encode_category(encoder: TableEncoder, column: Category, table: Table) -> torch.Tensor:
    values, inverse = used(labels_of(table, column.name))
    first = int(encoder.unknown == "code")
    known = {value: code for code, value in enumerate(column.values, first)}
    codes = np.array([known.get(_or_none(v, table), -1) for v in values], dtype=np.int64)
    if (codes < 0).any() and encoder.unknown == "error":
        row = int(np.argmax(codes[inverse] < 0))
        shown = values[inverse[row]]
        hint = nearest(shown, [value for value in column.values if value is not None])
        raise UserError(
            f"{table.file_of(row)}, column {column.name!r}: unknown category {shown!r}{hint}",
            why=f"no training row has it; they have {_some(column.values)}",
            remedy='fit(unknown="code") reserves a code for it; '
            f'or table(types={{"{column.name}": "ignore"}}) where the column tells nothing',
        )
    return torch.from_numpy(np.maximum(codes, 0)[inverse])


def _or_none(value: str, table: Table) -> str | None:
    return None if value in table.source.missing else value


def _some(values: tuple[str | None, ...]) -> str:
    shown = ", ".join("missing values" if value is None else repr(value) for value in values[:10])
    return f"{shown}, and {len(values) - 10} more" if len(values) > 10 else shown


def _one_hot(codes: torch.Tensor, width: int) -> torch.Tensor:
    """float32 [rows, width] of codes; -1 is a row of zeros."""
    return (codes[:, None] == torch.arange(width)).float()


def _encode_text(encoder: TableEncoder, name: str, table: Table) -> Tokens:
    values, inverse = used(labels_of(table, name))
    tokens = tokenise(values, encoder.vocabulary, encoder.max_length)
    empty = (tokens.lengths == 0)[inverse]
    if empty.any():
        row = int(np.argmax(empty))
        raise UserError(
            f"{table.file_of(row)}, column {name!r}: {values[inverse[row]][:60]!r} has no token{and_more(empty)}",
            why="a sequence of length 0 has nothing to attend to or to average",
            remedy=f'leave such rows out, before fit: table.where(lambda row: bool(row["{name}"].strip()))',
        )
    return tokens.take(inverse)


def _encode_target(encoder: TableEncoder, table: Table) -> torch.Tensor:
    name = table.source.target
    if name != encoder.target or name is None:
        raise UserError(
            f"the table's target is {name!r}, the encoder was fitted on {encoder.target!r}",
            remedy=f"table(..., target={encoder.target!r})",
        )
    if encoder.classes is None:
        return target_numbers(table, name)
    labels = labels_of(table, name)
    refuse_missing(table, name, labels)
    values, inverse = used(labels)
    known = {value: code for code, value in enumerate(encoder.classes)}
    codes = np.array([known.get(value, -1) for value in values], dtype=np.int64)
    if (codes < 0).any():
        row = int(np.argmax(codes[inverse] < 0))
        shown = values[inverse[row]]
        way = next((way for way, mend in _SPELLINGS.items() if mend(shown) in known), "a function that gives a class")
        raise UserError(
            f"{table.file_of(row)}: unknown class {shown!r} of the target {name!r}"
            f"{nearest(shown, list(encoder.classes))}",
            why=f"the training rows have {_some(encoder.classes)}",
            remedy=f'table(..., convert={{"{name}": {way}}}), or leave such rows out with where()',
        )
    return torch.from_numpy(codes[inverse])


@dataclass(frozen=True)
class _Targetless:
    """Collates samples without a target: to `pad`, a sample's last element is one, and has no mask."""

    pad: Callable[..., Any]

    def __call__(self, samples: list[Any], out: Any = None) -> Any:
        return self.pad([(*sample, 0) for sample in samples], out)[:-1]


class EncodedTable:
    """A data set of encoded rows: (numbers [n], categories [m], tokens [L] per column of texts, target).

    What the table has none of is left out; with one_hot=True a sample is (features [F], tokens..., target). Numbers
    are float32, codes and tokens int64, the target an int64 class or a float32 number.
    """

    lazy = True  # subset() takes a function that gives the indices, and calls it at first use

    def __init__(self, table: Table, encoder: TableEncoder, source: Callable[[], Encoded] | None = None) -> None:
        self.table, self.fitted = table, encoder
        self._source = source

    @cached_property
    def _encoded(self) -> Encoded:
        return self._source() if self._source is not None else encode(self.fitted, self.table)

    def __len__(self) -> int:
        """Return the number of rows. Encodes them all: once, and before data workers start."""
        return len(self._encoded.parts[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """One sample."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return tuple(part[index % len(self)] for part in self._encoded.parts)

    def columns(self) -> tuple[torch.Tensor, ...] | None:
        """All samples as tensors of one row each; None where there are texts."""
        if self.fitted.texts:
            return None
        return tuple(part for part in self._encoded.parts if isinstance(part, torch.Tensor))

    @property
    def lengths(self) -> Indices:
        """Number of tokens of every sample. Only where there are texts."""
        found = [part.lengths for part in self._encoded.parts if isinstance(part, Tokens)] if self.fitted.texts else []
        if not found:
            raise AttributeError("a table without texts has no lengths")
        total: Indices = np.sum(found, axis=0, dtype=np.int64)
        return total

    @property
    def targets(self) -> npt.NDArray[Any]:
        """Target of every sample."""
        if self.table.source.target is None:
            raise AttributeError("the table has no target")
        target = self._encoded.parts[-1]
        assert isinstance(target, torch.Tensor)
        return target.numpy()

    @property
    def classes(self) -> list[str]:
        """Names of the target's classes."""
        if self.fitted.classes is None:
            raise AttributeError("the target has no classes")
        return list(self.fitted.classes)

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        """What pads the texts of a batch and puts a mask beside each; None where there are none."""
        if not self.fitted.texts:
            return None
        from stoker.data.collating import pad

        if self.fitted.is_one_hot:
            first = int(bool(self.fitted.numbers or self.fitted.categories))
        else:
            first = bool(self.fitted.numbers) + bool(self.fitted.categories)
        fields = tuple(range(first, first + len(self.fitted.texts)))
        padding = pad(self.fitted.vocabulary.pad_id, fields=fields)
        return padding if self.table.source.target is not None else _Targetless(padding)

    def file_of(self, index: int) -> str:
        """Where a row stands, e.g. "adult.csv, row 31000"."""
        return self.table.file_of(index)

    def subset(self, indices: Any) -> "EncodedTable":
        """Return the same at some rows; see `Table.subset`."""

        def rows() -> Indices:
            return chosen(indices() if callable(indices) else indices, len(self))

        return EncodedTable(self.table.subset(rows), self.fitted, lambda: self._encoded.take(rows()))
