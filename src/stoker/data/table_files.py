"""Reading tables: CSV, Parquet and columns in memory, with the line of every row for messages."""

import codecs
import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stoker.errors import UserError, nearest

Indices = npt.NDArray[np.int64]
Convert = Mapping[str, Callable[[Any], Any]]

_BLOCK_ROWS = 4096  # rows that exist as Python lists at once
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE")

# How files begin that are often taken for text.
_MAGIC = {
    b"\xff\xfe": ("it begins as UTF-16 does", 'encoding="utf-16"'),
    b"\xfe\xff": ("it begins as UTF-16 does", 'encoding="utf-16"'),
    b"PAR1": ("it begins as a Parquet file does", "give it the suffix .parquet"),
    b"\x1f\x8b": ("it begins as a gzip file does", "unpack it: gunzip FILE"),
    b"PK\x03\x04": ("it begins as a zip file or an Excel sheet does", "unpack it, or save the sheet as CSV"),
}


@dataclass(frozen=True)
class Strings:
    """A column of texts: every distinct one once, and a code per row."""

    codes: npt.NDArray[np.int32]  # [rows]
    values: list[str]

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: Indices) -> "Strings":
        """Return the same column at some rows."""
        return Strings(self.codes[rows], self.values)

    def raw(self) -> list[Any]:
        """Return one text per row."""
        return [self.values[code] for code in self.codes.tolist()]


@dataclass(frozen=True)
class Numbers:
    """A column that came as numbers; nan where a value is missing."""

    values: npt.NDArray[Any]  # [rows], int64, uint64 or float64

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Indices) -> "Numbers":
        """Return the same column at some rows."""
        return Numbers(self.values[rows])

    def raw(self) -> list[Any]:
        """Return one number per row."""
        found: list[Any] = self.values.tolist()
        return found

    def strings(self) -> Strings:
        """Return the same column as texts: 3 and 3.0 are "3", nan is ""."""
        distinct, codes = np.unique(self.values, return_inverse=True)
        return Strings(codes.astype(np.int32), [_spelled(value) for value in distinct.tolist()])


Column = Strings | Numbers


@dataclass(frozen=True)
class Raw:
    """Columns as they were read, and where each row stands."""

    columns: dict[str, Column]
    files: tuple[str, ...]  # as the user wrote them; "" is a table in memory
    starts: Indices  # [files]: the first row of each
    lines: Indices  # [rows]: line of a text file, row of a Parquet file, both from 1; index of a table in memory
    unread: tuple[str, ...] = ()  # columns of a Parquet file that are ignored

    def place(self, row: int) -> str:
        """Where a row stands, e.g. "adult.csv, row 31000"."""
        file = self.files[int(np.searchsorted(self.starts, row, side="right")) - 1]
        return f"{file or 'the table'}, row {self.lines[row]}"


@dataclass(frozen=True)
class Layout:
    """How to read the files. See `stoker.data.table` for the fields."""

    names: tuple[str, ...] | None
    delimiter: str | None
    quote: str | None
    encoding: str
    ignored: frozenset[str]


def _spelled(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def numbers_of(texts: list[str]) -> npt.NDArray[np.float64]:
    """Parse numbers as people write them; nan for what is none ("nan", "inf", "1_000" and "1e999" are none)."""
    if set().union(*texts) <= _NUMBER_CHARACTERS:
        try:
            found = np.array([float(text) for text in texts], dtype=np.float64)
            return np.where(np.isinf(found), np.nan, found)
        except ValueError:
            pass
    found = np.array([float(text) if _NUMBER.fullmatch(text) else np.nan for text in texts], dtype=np.float64)
    return np.where(np.isinf(found), np.nan, found)


def read(source: Any, layout: Layout, convert: Convert) -> Raw:
    """Read a table: a path, several of one layout, or columns by name.

    Raises:
        UserError: what was found is no table; names the file and the line.
    """
    if hasattr(source, "keys"):
        raw = _in_memory(source, layout)
    else:
        paths = [source] if isinstance(source, str | Path) else list(source)
        raw = _joined([_read_file(Path(path), layout) for path in paths])
    for name, function in convert.items():
        if name in raw.columns:
            raw.columns[name] = _converted(raw, name, function)
    return raw


def _read_file(path: Path, layout: Layout) -> Raw:
    shown = str(path)
    if not path.exists():
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{shown} does not exist{nearest(path.name, there)}",
            remedy=f"check the path; it leads to {path.absolute()}",
        )
    if path.is_dir():
        raise UserError(
            f"{shown} is a folder", why="a table is a file", remedy=f'sorted(Path("{shown}").glob("*.csv"))'
        )
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return _read_parquet(path, layout)
        return _read_csv(path, layout)
    except PermissionError as error:
        raise UserError(f"{shown} may not be read", why=str(error), remedy=f"chmod u+r {shown}") from error


# ------------------------------------------------------------------ CSV


def _read_csv(path: Path, layout: Layout) -> Raw:
    shown = str(path)
    delimiter = layout.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        with path.open(encoding=_codec(layout.encoding), newline="") as file, _fields_up_to(path.stat().st_size):
            reader = csv.reader(
                _without_nul(file, path),
                delimiter=delimiter,
                quotechar=layout.quote,
                quoting=csv.QUOTE_NONE if layout.quote is None else csv.QUOTE_MINIMAL,
                skipinitialspace=True,
                strict=True,
            )
            return _rows(_records(reader, shown, layout.quote), shown, delimiter, layout)
    except UnicodeError as error:  # UnicodeDecodeError counts within a block; UTF-16 without a mark is a bare one
        raise _misread(path, layout.encoding, error) from error


def _rows(records: Iterator["Record"], shown: str, delimiter: str, layout: Layout) -> Raw:
    first = next((record for record in records if len(record[1]) > 1 or record[1][0].strip()), None)
    if first is None:
        raise UserError(f"{shown} is empty", why="a table has at least one row", remedy="check how it was written")
    names = list(layout.names) if layout.names is not None else [name.strip() for name in first[1]]
    _check_names(names, shown, first, layout)
    if layout.names is not None:
        records = chain([first], records)
    columns, lines = _columns(_of_width(records, len(names), shown, delimiter), len(names))
    if not len(lines):
        raise UserError(
            f"{shown} has a header and no rows",
            remedy="check how it was written; if its only line holds data, name the columns with names=[...]",
        )
    return Raw(dict(zip(names, columns, strict=True)), (shown,), np.zeros(1, dtype=np.int64), lines)


def _codec(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise UserError(
            f"encoding={encoding!r} is none that Python knows", remedy='encoding="utf-8", "latin-1" or "cp1252"'
        ) from error
    return "utf-8-sig" if name == "utf-8" else name  # drops a byte order mark


def _hint(data: bytes) -> tuple[str, str]:
    """Why a file may not be text, and what to do about it."""
    return next((hint for magic, hint in _MAGIC.items() if data.startswith(magic)), ("", ""))


def _misread(path: Path, encoding: str, error: UnicodeError) -> UserError:
    """Say where a file is not in its encoding; reads it again to count."""
    data = path.read_bytes()
    why, remedy = _hint(data)
    where, reason = str(path), str(error)
    try:
        data.decode(_codec(encoding))
    except UnicodeDecodeError as found:
        line = data.count(b"\n", 0, found.start) + 1
        where = f"{path}, row {line}: byte 0x{data[found.start]:02x} at position {found.start}"
        reason = found.reason
    return UserError(
        f"{where} is not {encoding}",
        why=why or reason,
        remedy=remedy or 'name the encoding that it was written in: encoding="latin-1", "cp1252" or "utf-16"',
    )


def _without_nul(file: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if "\0" in line:
            with path.open("rb") as binary:
                why, remedy = _hint(binary.read(8))
            raise UserError(
                f"{path}, row {number}: a NUL byte, where text was expected",
                why=why or "the file is binary, damaged, or in another encoding",
                remedy=remedy
                or f"encoding=\"utf-16\" where every other byte is NUL; else: tr -d '\\000' < {path} > clean.csv",
            )
        yield line


@contextmanager
def _fields_up_to(size_bytes: int) -> Iterator[None]:
    """Let a field be as long as the file: the csv module stops at 131,072 characters, and a text may be longer."""
    before = csv.field_size_limit(max(size_bytes, 131_072))
    try:
        yield
    finally:
        csv.field_size_limit(before)


Record = tuple[int, list[str]]  # line on which it begins, from 1; its fields


def _records(reader: Any, shown: str, quote: str | None) -> Iterator[Record]:
    """Every line that is not blank."""
    line = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{shown}, row {line}: quotes that do not match ({error})",
                why=f"a field that begins with {quote} must end with {quote}, and one within it be doubled",
                remedy="quote=None where the file's quotes are just characters; else mend the line",
            ) from error
        if fields:
            yield line, fields
        line = reader.line_num + 1


def _of_width(records: Iterator[Record], width: int, shown: str, delimiter: str) -> Iterator[Record]:
    for line, fields in records:
        if len(fields) == width:
            yield line, fields
        elif len(fields) > 1 or fields[0].strip():  # not a line of spaces
            raise UserError(
                f"{shown}, row {line}: {_counted(len(fields), 'field')}, expected {width}",
                why=f"fields are what {delimiter!r} separates; this row begins {_short(delimiter.join(fields))!r}",
                remedy="quote a value that holds the delimiter; quote=None where quotes are just characters; "
                "delimiter= where it is another one",
            )


def _columns(records: Iterator[Record], width: int) -> tuple[list[Strings], Indices]:
    indexes: list[defaultdict[str, int]] = [defaultdict() for _ in range(width)]
    for index in indexes:
        index.default_factory = index.__len__  # a value not seen before gets the next code
    codes: list[list[npt.NDArray[np.int32]]] = [[] for _ in range(width)]
    lines: list[Indices] = []
    while block := list(islice(records, _BLOCK_ROWS)):
        lines.append(np.fromiter((line for line, _ in block), np.int64, len(block)))
        for index, parts, fields in zip(indexes, codes, zip(*(f for _, f in block), strict=True), strict=True):
            parts.append(np.fromiter(map(index.__getitem__, fields), np.int32, len(block)))
    if not lines:
        return [Strings(np.zeros(0, np.int32), []) for _ in range(width)], np.zeros(0, np.int64)
    columns = [Strings(np.concatenate(p), [v.strip() for v in i]) for i, p in zip(indexes, codes, strict=True)]
    return columns, np.concatenate(lines)


def _check_names(names: Sequence[str], shown: str, first: Record, layout: Layout) -> None:
    line, fields = first
    if len(fields) != len(names):
        raise UserError(
            f"names= holds {_counted(len(names), 'name')}, {shown}, row {line} {_counted(len(fields), 'field')}",
            why=f"the row begins {_short(', '.join(fields))!r}",
            remedy="give one name per column; delimiter= where it is another one",
        )
    if layout.names is not None and [field.strip() for field in fields] == list(names):
        raise UserError(
            f"{shown}, row {line} holds the names that names= gives", remedy="leave names= out: the file has a header"
        )
    check_unique(names, f"{shown}, row {line}" if layout.names is None else "names=")


def check_unique(names: Sequence[str], where: str) -> None:
    """Refuse two columns of one name."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(
                f"{where}: columns {list(names).index(name) + 1} and {i + 1} are both called {name!r}",
                remedy="rename one of them; a first row that holds data needs names=[...]",
            )


# ------------------------------------------------------------------ Parquet and columns in memory


def _read_parquet(path: Path, layout: Layout) -> Raw:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path} is a Parquet file, and pyarrow is not installed", remedy="pip install 'stoker[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            found = file.read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        raise UserError(
            f"{path} is no Parquet file that can be read",
            why=str(error).partition("\n")[0],
            remedy="write it again; a text file needs another suffix, .csv or .tsv",
        ) from error
    if not found.num_rows:
        raise UserError(f"{path} has no rows", remedy="check how it was written")
    names = list(layout.names or found.column_names)
    if len(names) != found.num_columns:
        raise UserError(
            f"names= holds {_counted(len(names), 'name')}, {path} {_counted(found.num_columns, 'column')}",
            remedy="leave names= out: a Parquet file has names of its own",
        )
    check_unique(names, str(path))
    columns = {
        name: _of_arrow(found.column(i), name, str(path)) for i, name in enumerate(names) if name not in layout.ignored
    }
    lines = np.arange(1, found.num_rows + 1, dtype=np.int64)
    unread = tuple(name for name in names if name in layout.ignored)
    return Raw(columns, (str(path),), np.zeros(1, dtype=np.int64), lines, unread)


def _of_arrow(column: Any, name: str, shown: str) -> Column:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_integer(kind) and not column.null_count:
        return Numbers(column.to_numpy())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return Numbers(column.cast(pa.float64(), safe=False).to_numpy())
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise UserError(
            f"{shown}: column {name!r} holds {kind}",
            why="a column is of numbers, categories or texts",
            remedy=f'types={{"{name}": "ignore"}}',
        )
    texts = column.cast(pa.string()).fill_null("").combine_chunks().dictionary_encode()
    distinct = _strings(texts.dictionary.to_pylist())
    return distinct.take(texts.indices.to_numpy().astype(np.int64))


def _in_memory(source: Any, layout: Layout) -> Raw:
    names = [str(name) for name in source.keys()]  # noqa: SIM118  (a data frame iterates over names as well, not all do)
    check_unique(names, "the table")
    columns = {name: _column(source[key], name) for name, key in zip(names, source.keys(), strict=True)}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"the columns have different lengths: {lengths}", remedy="give one value per row to each")
    num_rows = next(iter(lengths.values()), 0)
    if not num_rows:
        raise UserError("the table has no rows", remedy="check what it is built from")
    if layout.names is not None:
        raise UserError("names= is for files without a header", remedy="leave it out: the columns have names")
    return Raw(columns, ("",), np.zeros(1, dtype=np.int64), np.arange(num_rows, dtype=np.int64))


def _column(values: Any, name: str) -> Column:
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.zeros((0, 0))
    if array.ndim != 1:
        raise UserError(
            f"column {name!r} of the table has {array.ndim} dimensions",
            remedy="give one number or text per row; whole tensors go to stoker.Loader as they are",
        )
    if array.dtype.kind in "iu":
        return Numbers(array.astype(np.uint64 if array.dtype.kind == "u" else np.int64))
    if array.dtype.kind == "f":
        return Numbers(array.astype(np.float64))
    return _strings(list(values) if array.dtype.kind != "U" else array.tolist())


def _strings(values: Sequence[Any]) -> Strings:
    """Texts of any values; None and nan are ""."""
    index: dict[str, int] = {}
    texts = ("" if _is_nothing(value) else str(value).strip() for value in values)
    codes = np.fromiter((index.setdefault(text, len(index)) for text in texts), np.int32, len(values))
    return Strings(codes, list(index))


def _is_nothing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA is neither equal nor unequal to itself
        return True


def _converted(raw: Raw, name: str, function: Callable[[Any], Any]) -> Column:
    column = raw.columns[name]
    values: list[Any] = column.values if isinstance(column, Strings) else column.raw()
    found = []
    for code, value in enumerate(values):
        try:
            found.append(function(value))
        except Exception as error:
            row = int(np.argmax(column.codes == code)) if isinstance(column, Strings) else code
            raise UserError(
                f"{raw.place(row)}: convert= of column {name!r} raised {type(error).__name__}: {error}",
                why=f"it was given {_short(value)!r}",
                remedy="let it take every value of the column, missing ones too",
            ) from error
    converted = _strings(found)
    return converted.take(column.codes.astype(np.int64)) if isinstance(column, Strings) else converted


def _joined(raws: list[Raw]) -> Raw:
    """Rows of several files one after the other."""
    if not raws:
        raise UserError("no file was given", remedy="check what the list of paths is built from")
    if len(raws) == 1:
        return raws[0]
    first = raws[0]
    for raw in raws[1:]:
        if list(raw.columns) != list(first.columns):
            odd = sorted(set(raw.columns) ^ set(first.columns)) or "their order"
            raise UserError(
                f"{raw.files[0]} and {first.files[0]} have different columns: {odd}",
                remedy="give files of one layout",
            )
    columns = {name: _concatenated([raw.columns[name] for raw in raws]) for name in first.columns}
    starts = np.cumsum([0, *(len(raw.lines) for raw in raws[:-1])])
    files = tuple(raw.files[0] for raw in raws)
    return Raw(columns, files, starts, np.concatenate([raw.lines for raw in raws]), first.unread)


def _concatenated(parts: list[Column]) -> Column:
    numbers = [part.values for part in parts if isinstance(part, Numbers)]
    if len(numbers) == len(parts):
        return Numbers(np.concatenate(numbers))
    index: dict[str, int] = {}
    codes = []
    for part in parts:
        strings = part if isinstance(part, Strings) else part.strings()
        moved = [index.setdefault(value, len(index)) for value in strings.values]
        codes.append(np.asarray(moved, dtype=np.int32)[strings.codes])
    return Strings(np.concatenate(codes), list(index))


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _short(value: Any) -> Any:
    return f"{value[:57]}..." if isinstance(value, str) and len(value) > 60 else value
