"""Tables: rows of a CSV or Parquet file, read at first use, with a kind for every column."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from stoker.data.kept import kept
from stoker.data.table_files import (
    Column,
    Convert,
    Indices,
    Layout,
    Numbers,
    Raw,
    check_unique,
    numbers_of,
    read,
)
from stoker.errors import UserError, nearest

if TYPE_CHECKING:
    from stoker.data.table_encoder import TableEncoder

Kind = Literal["number", "category", "text", "ignore"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_INFERRED_FROM_ROWS = 1000
_TEXT_WORDS = 3  # a column of longer values, most of them distinct, is of texts
_OFTEN_MISSING = frozenset({"na", "n/a", "#n/a", "nan", "null", "none", "nil", "inf", "-inf", "?", "-", "--", ".", ""})


def table(
    source: Any,
    *,
    target: str | None = None,
    names: Sequence[str] | None = None,
    types: Mapping[str, Kind] | None = None,
    missing: Sequence[str] = ("", "?"),
    delimiter: str | None = None,
    quote: str | None = '"',
    encoding: str = "utf-8",
    convert: Convert | None = None,
) -> "Table":
    """Describe a table. It is read at first use, so that a run's model can be opened without its training data.

    Spaces around a value are dropped, and blank lines skipped.

    Args:
        source: path of a .csv, .tsv, .txt or .parquet file, several of one layout, or columns by name.
        target: the column to be learnt; None where there is none.
        names: names of the columns where the file has no header; else its first row is the header.
        types: kind of a column, "number", "category", "text" or "ignore". Kinds that are not given are inferred
            from the first 1000 values: "number" if all are numbers, "text" if most differ and have more than three
            words on average, else "category". So is the target's: class labels 0, 1, 2 need "category".
        missing: spellings of a missing value.
        delimiter: between fields; by default a tab for .tsv, and a comma.
        quote: around a field that holds a delimiter; None where quotes are just characters.
        encoding: of a text file. A byte order mark is dropped.
        convert: by column, a function of each value as it was read, applied before all else.

    Raises:
        UserError: the arguments contradict one another. What is wrong with the file is told at first use.
    """
    types, convert = dict(types or {}), dict(convert or {})
    for name, kind in types.items():
        if kind not in KINDS:
            raise UserError(
                f"types= says {name!r} is {kind!r}{nearest(str(kind), list(KINDS))}",
                remedy=f"one of {', '.join(map(repr, KINDS))}",
            )
    if target is not None and types.get(target) in ("text", "ignore"):
        raise UserError(
            f"the target {target!r} cannot be {types[target]!r}", remedy="a target is a number or a category"
        )
    for argument, value in (("delimiter", delimiter), ("quote", quote)):
        if value is not None and len(value) != 1:
            raise UserError(f"{argument}={value!r} is not one character", remedy='delimiter=";", for example')
    if isinstance(missing, str):
        raise UserError(f"missing={missing!r} is one string", remedy=f'missing=("", {missing!r})')
    if names is not None:
        check_unique(list(names), "names=")
        _check_known(list(names), target, types, convert, "names=")
    if isinstance(source, str | Path):
        source = Path(source)
    ignored = frozenset(name for name, kind in types.items() if kind == "ignore")
    layout = Layout(tuple(names) if names is not None else None, delimiter, quote, encoding, ignored)
    return Table(Source(source, layout, target, types, frozenset(missing), convert))


def _check_known(
    names: list[str], target: str | None, types: Mapping[str, Any], convert: Mapping[str, Any], where: str
) -> None:
    asked = [("target", target)] if target is not None else []
    for argument, name in [*asked, *(("types", name) for name in types), *(("convert", name) for name in convert)]:
        if name not in names:
            hint = "the file seems to have another delimiter" if len(names) == 1 else ""
            raise UserError(
                f"{argument}= names a column {name!r}, {where} has none{nearest(str(name), names)}",
                why=f"its columns are {', '.join(map(repr, names[:20]))}{'; ' if hint else ''}{hint}",
                remedy='delimiter=";" or "\\t"' if hint else "names=[...] where the file's first row is no header",
            )


class Source:
    """What a table is read from, read once however many tables show some of its rows."""

    def __init__(
        self,
        source: Any,
        layout: Layout,
        target: str | None,
        types: Mapping[str, Kind],
        missing: frozenset[str],
        convert: Convert,
    ) -> None:
        self._source, self._layout, self._types, self._convert = source, layout, types, convert
        self.target, self.missing = target, missing

    @cached_property
    def raw(self) -> Raw:
        """All of it.

        Raises:
            UserError: the file is no table, or lacks a column that was named.
        """
        raw = read(self._source, self._layout, self._convert)
        names = [*raw.columns, *raw.unread]
        where = raw.files[0] or "the table"
        _check_known(names, self.target, self._types if self._layout.names is None else {}, self._convert, where)
        return raw

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Kind of every column."""
        return {name: self._types.get(name) or self._infer(name, column) for name, column in self.raw.columns.items()}

    def _infer(self, name: str, column: Column) -> Kind:
        if isinstance(column, Numbers):
            return "number"
        present = np.array([value not in self.missing for value in column.values], dtype=bool)[column.codes]
        rows = np.flatnonzero(present)[:_INFERRED_FROM_ROWS]
        if not len(rows):
            raise UserError(
                f"{self.raw.place(0)}: column {name!r} has no value, here or in any other row",
                why=f"{sorted(self.missing)} are missing values",
                remedy=f'types={{"{name}": "ignore"}}',
            )
        codes = column.codes[rows]
        distinct = np.unique(codes)
        texts = [column.values[code] for code in distinct]
        bad = np.isnan(numbers_of(texts))
        if not bad.any():
            return "number"
        odd = [text for text, is_bad in zip(texts, bad, strict=True) if is_bad]
        if not bad.all() and all(text.lower() in _OFTEN_MISSING for text in odd):
            row = int(rows[np.argmax(codes == distinct[np.argmax(bad)])])
            raise UserError(
                f"{self.raw.place(row)}: column {name!r} holds {odd[0]!r}, its other values are numbers",
                why="whether that is a missing value or a category is not for a program to guess",
                remedy=f'missing={_tuple(self.missing | set(odd))}, or types={{"{name}": "category"}}',
            )
        num_words = np.array([len(text.split()) for text in texts])[np.searchsorted(distinct, codes)].mean()
        return "text" if num_words > _TEXT_WORDS and len(distinct) * 2 > len(codes) else "category"


def _tuple(texts: Any) -> str:
    return "(" + ", ".join(f'"{text}"' for text in sorted(texts)) + ",)"


class Table:
    """Some rows of a source. `stoker.data.table` makes one; `fit` learns from its rows how to encode them."""

    lazy = True  # subset() takes a function that gives the indices, and calls it at first use

    def __init__(self, source: Source, select: Callable[[], Indices] | None = None) -> None:
        self.source, self._select = source, select

    @cached_property
    def _rows(self) -> Indices | None:
        return self._select() if self._select is not None else None

    def __len__(self) -> int:
        """Return the number of rows. Reads the file."""
        return len(self._rows) if self._rows is not None else len(self.source.raw.lines)

    def __getitem__(self, name: str) -> list[Any]:
        """One column: a text per row, "" where there was nothing; numbers where they came as numbers."""
        return self.column(name).raw()

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self.source.raw.columns)

    @property
    def kinds(self) -> dict[str, Kind]:
        """Kind of every column, given or inferred."""
        return dict(self.source.kinds)

    def column(self, name: str) -> Column:
        """One column as it is stored.

        Raises:
            UserError: there is none of that name.
        """
        if not isinstance(name, str):
            raise UserError(
                f"{name!r} was asked of a table, which has columns, not samples",
                remedy="encode it: encode = train.fit(), then stoker.Loader(encode(train), 32)",
            )
        columns = self.source.raw.columns
        if name not in columns:
            raise UserError(
                f"{self.source.raw.files[0] or 'the table'} has no column {name!r}{nearest(str(name), list(columns))}",
                remedy=f"one of {', '.join(map(repr, columns))}",
            )
        return columns[name] if self._rows is None else columns[name].take(self._rows)

    def file_of(self, index: int) -> str:
        """Where a row stands, e.g. "adult.csv, row 31000", as an editor counts lines."""
        return self.source.raw.place(int(self._rows[index]) if self._rows is not None else index)

    def subset(self, indices: Any) -> "Table":
        """Return the same table at some rows.

        Args:
            indices: row numbers from 0, or a function that gives them, called at first use.
        """
        return Table(self.source, lambda: self._chosen(indices() if callable(indices) else indices))

    def where(self, predicate: Callable[[dict[str, Any]], Any]) -> "Table":
        """Return the rows for which `predicate` is true. It is called at first use.

        Args:
            predicate: called with a row, a value by name as `table[name]` gives them.
        """
        return Table(self.source, lambda: self._chosen(self._matching(predicate)))

    def _matching(self, predicate: Callable[[dict[str, Any]], Any]) -> list[int]:
        columns = [self[name] for name in self.names]
        rows = (dict(zip(self.names, values, strict=True)) for values in zip(*columns, strict=True))
        return [i for i, row in enumerate(rows) if predicate(row)]

    def _chosen(self, indices: Any) -> Indices:
        return chosen(indices, len(self)) if self._rows is None else self._rows[chosen(indices, len(self))]

    def fit(
        self,
        name: str = "table",
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        one_hot: bool = False,
        unknown: Literal["error", "code"] = "error",
    ) -> "TableEncoder":
        """Learn from these rows, and no others, how to encode a table: call the result on each split.

        While a run's weights are opened, what its checkpoint holds under `name` is taken instead, and nothing read.

        Args:
            name: unique in a recipe.
            tokenizer: for columns of texts: "word" (the default) or "character" learns a vocabulary from them; or a
                `stoker.data.Vocabulary`, or a tokenizer of transformers or tokenizers.
            max_length: tokens that a text is cut to.
            one_hot: samples are (features, target): numbers and one-hot categories in one row.
            unknown: a category that these rows do not have, or a missing number where they miss none. "error"
                refuses it. "code" encodes the category as 0, a code that no known one has (in one-hot features: all
                zeros), and the number as the mean.

        Raises:
            UserError: the file is no table, a value is not of its column's kind, or the arguments do not fit it.
        """
        from stoker.data.table_encoder import TableEncoder, fit

        state = kept(name)
        if state is not None:
            return TableEncoder.from_state(state)
        return fit(self, name, tokenizer=tokenizer, max_length=max_length, one_hot=one_hot, unknown=unknown)


def chosen(indices: Any, n: int) -> Indices:
    """Row numbers as an array, refused where they lead outside of `n` rows."""
    found = np.asarray(indices)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
        raise UserError(
            f"rows were chosen by {found.dtype} of shape {found.shape}", remedy="give one whole number per row, from 0"
        )
    found = found.astype(np.int64)
    if len(found) and (found.min() < 0 or found.max() >= n):
        wrong = int(found[(found < 0) | (found >= n)][0])
        raise UserError(f"row {wrong} was chosen of a table with {n}", remedy=f"rows are numbered from 0 to {n - 1}")
    return found
