"""pack: records as a few large buffers instead of many Python objects, so that forked workers share them.

Reading a Python object writes its reference count, so that a list of dicts is copied, page by page, into every worker
that reads it. A Packed holds about three objects per 65,536 values; a record is made when it is asked for.
"""

import io
import pickle  # in memory only, there and back: no file is ever read with it
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import accumulate, islice
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt
import torch

from stoker.errors import UserError

# A block is what is held as Python objects while packing. Its rows grow from the first to the last of these numbers
# as long as a block stays below the bytes: the first records tell how large the others will be.
_FIRST_ROWS, _MOST_ROWS, _BLOCK_BYTES = 64, 1 << 16, 32 << 20

_DEPTH = 4  # dicts in dicts that become columns; those further down, or without end, are pickled
_HOOKS = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")  # a class's own way of being copied

_MOST_FIELDS = 256  # above it, a record of columns is slower to read and holds more objects than a pickled one


class Column(Protocol):
    """The values of one field in one block."""

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        ...

    def get(self, row: int) -> Any:
        """Make the value of a row."""
        ...


@dataclass(frozen=True, slots=True)
class _Flat:
    """Numbers of one width."""

    values: "array[Any]"

    @property
    def nbytes(self) -> int:
        return len(self.values) * self.values.itemsize

    def get(self, row: int) -> Any:
        return self.values[row]


@dataclass(frozen=True, slots=True)
class _Truths:
    """A byte per bool."""

    values: bytes

    @property
    def nbytes(self) -> int:
        return len(self.values)

    def get(self, row: int) -> bool:
        return self.values[row] == 1


@dataclass(frozen=True, slots=True)
class _Rows:
    """A stack of arrays or tensors of one shape, or an array of numpy's scalars."""

    values: Any  # (rows, ...)
    read: Callable[[Any, int], Any]

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes)

    def get(self, row: int) -> Any:
        return self.read(self.values, row)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Values of any length behind one another in one buffer."""

    data: bytes
    ends: "array[int]"  # (rows + 1,): value i is data[ends[i] : ends[i + 1]]
    read: Callable[[bytes], Any]

    @property
    def nbytes(self) -> int:
        return len(self.data) + len(self.ends) * self.ends.itemsize

    def get(self, row: int) -> Any:
        return self.read(self.data[self.ends[row] : self.ends[row + 1]])


@dataclass(frozen=True, slots=True)
class _Gaps:
    """A column in which some values are None; below a None it holds anything."""

    present: bytes
    column: Column

    @property
    def nbytes(self) -> int:
        return len(self.present) + self.column.nbytes

    def get(self, row: int) -> Any:
        return self.column.get(row) if self.present[row] else None


@dataclass(frozen=True, slots=True)
class _Record:
    """Dicts, tuples, named tuples or dataclass instances of one shape: a column per field."""

    kind: type
    names: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns)

    def get(self, row: int) -> Any:
        values = [column.get(row) for column in self.columns]
        if self.kind is dict:
            return dict(zip(self.names, values, strict=True))
        if issubclass(self.kind, tuple):
            return tuple.__new__(self.kind, values)
        made = object.__new__(self.kind)  # as unpickling does: what __init__ once computed is in the fields
        made.__dict__.update(zip(self.names, values, strict=True))
        return made


class Packed(Sequence[Any]):
    """A read-only sequence of records. Every access makes the record anew, so that changing it changes nothing here.

    A slice, and `subset`, is a view: it shares the buffers.
    """

    __slots__ = ("_blocks", "_rows", "_starts")

    def __init__(self, blocks: list[Column], starts: list[int], rows: range | npt.NDArray[np.int64]) -> None:
        self._blocks, self._starts, self._rows = blocks, starts, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> "Packed": ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Packed(self._blocks, self._starts, self._rows[index])
        try:
            row = int(self._rows[index])
        except IndexError:
            raise IndexError(f"record {index} of {len(self):,}") from None
        block = bisect_right(self._starts, row) - 1
        return self._blocks[block].get(row - self._starts[block])

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self)):
            yield self[index]

    def __repr__(self) -> str:
        return f"Packed({len(self):,} records, {self.nbytes / 1e6:,.1f} MB)"

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers: all of them, in a view too."""
        return sum(block.nbytes for block in self._blocks)

    def subset(self, indices: Any) -> "Packed":
        """View of some of the records.

        Args:
            indices: their positions here, (n,) integers; a negative one counts from the end.

        Raises:
            IndexError: there is no such record.
        """
        picked = np.asarray(indices).astype(np.int64, casting="safe") if len(indices) else np.empty(0, np.int64)
        outside = picked[(picked < -len(self)) | (picked >= len(self))]
        if len(outside):
            raise IndexError(f"record {outside[0]} of {len(self):,}")
        picked = np.where(picked < 0, picked + len(self), picked)
        rows = self._rows
        chosen = rows.start + rows.step * picked if isinstance(rows, range) else rows[picked]
        return Packed(self._blocks, self._starts, chosen)


def pack(records: Iterable[Any]) -> Packed:
    """Store records compactly, for workers to share: ``list(pack(records)) == list(records)``, types included.

    Dicts (tuples, named tuples, dataclass instances) with the same fields become columns: numbers of the smallest
    width that holds them, text as UTF-8, equal-shaped arrays and tensors stacked. Everything else is kept as well,
    pickled value by value, which is larger and slower to read.

    Args:
        records: anything that can be gone through once, a generator too: no more than a block of at most 65,536
            records is held as Python objects. Or a data set with a length.

    Raises:
        UserError: it is no sequence of records, or one of them holds something that cannot be stored.
    """
    if isinstance(records, Packed):
        return records
    source = _iterate(records)
    blocks: list[Column] = []
    starts: list[int] = []
    total, limit = 0, _FIRST_ROWS
    while block := list(islice(source, limit)):
        try:
            blocks.append(_column(block))
        except _Refused as refused:
            raise _message(refused, total) from refused.__cause__
        starts.append(total)
        total += len(block)
        affordable = _BLOCK_BYTES * len(block) // max(blocks[-1].nbytes, 1)
        limit = max(1, min(4 * limit, affordable, _MOST_ROWS))
        block.clear()  # `islice` makes the next block's records while this name still holds the last ones
    return Packed(blocks, starts, range(total))


def _iterate(records: Any) -> Iterator[Any]:
    """Go through the records of a sequence, a generator or a map-style data set."""
    for unfit, remedy in (
        (isinstance(records, Mapping), "pack(mapping.values()), or pack(mapping.items()) to keep the keys"),
        (isinstance(records, str | bytes), "pack([text])"),
        (hasattr(records, "itertuples"), "pack(frame.to_dict('records'))"),
    ):
        if unfit:
            raise UserError(f"pack got a {type(records).__name__}", why="it wants records in a row", remedy=remedy)
    if hasattr(records, "__iter__"):
        return iter(records)
    if hasattr(records, "__len__") and hasattr(
        records, "__getitem__"
    ):  # torch's map-style data sets raise no IndexError
        return (records[index] for index in range(len(records)))
    raise UserError(f"pack got a {type(records).__name__}", why="it cannot be gone through", remedy="give it a list")


# ------------------------------------------------------------------ values to columns


def _column(values: list[Any], depth: int = _DEPTH) -> Column:
    """Store a block of values (at least one) in the most compact way that gives back the same values."""
    kinds = set(map(type, values))
    if len(kinds) == 2 and type(None) in kinds:
        (kind,) = kinds - {type(None)}
        if kind in (int, float, bool, str, bytes):
            present = bytes(value is not None for value in values)
            return _Gaps(present, _column([kind() if value is None else value for value in values]))
    if len(kinds) > 1:
        return _pickled(values)
    (kind,) = kinds
    make = _MAKERS.get(kind)
    if make is not None:
        made = make(values)
    elif issubclass(kind, np.generic):
        made = _numpy_scalars(values)
    else:
        made = _record(kind, values, depth) if depth else None
    return made if made is not None else _pickled(values)


def _ints(values: list[Any]) -> Column | None:
    low, high = min(values), max(values)
    for code in "bBhHiIqQ":  # 1, 2, 4, 8 bytes, with a sign and without
        bits = 8 * array(code).itemsize
        least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if code.islower() else (0, (1 << bits) - 1)
        if least <= low and high <= most:
            return _Flat(array(code, values))
    return None


def _floats(values: list[Any]) -> Column:
    return _Flat(array("d", values))


def _bools(values: list[Any]) -> Column:
    return _Truths(bytes(values))


def _nones(values: list[Any]) -> Column:
    return _Gaps(bytes(len(values)), _Truths(b""))


def _cut(parts: list[bytes], read: Callable[[bytes], Any]) -> _Cut:
    return _Cut(b"".join(parts), _offsets(list(accumulate(map(len, parts), initial=0))), read)


def _offsets(ends: list[int]) -> "array[int]":
    return array("I" if ends[-1] < 1 << 32 else "Q", ends)


def _texts(values: list[Any]) -> Column:
    return _cut([value.encode("utf-8", "surrogatepass") for value in values], _text)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _blobs(values: list[Any]) -> Column:
    return _cut(values, bytes)


def _arrays(values: list[Any]) -> Column | None:
    first = values[0]
    if first.dtype.hasobject or any(v.dtype != first.dtype or v.shape != first.shape for v in values):
        return None
    stack = np.empty((len(values), *first.shape), first.dtype)  # np.stack would turn the bytes of '>f8' round
    for row, value in enumerate(values):
        stack[row] = value
    return _Rows(stack, _array)


def _array(stack: Any, row: int) -> Any:
    return stack[row, ...].copy()


def _numpy_scalars(values: list[Any]) -> Column | None:
    dtype = values[0].dtype
    if dtype.kind not in "biufcmM" or any(value.dtype != dtype for value in values):
        return None
    return _Rows(np.array(values, dtype), _numpy_scalar)


def _numpy_scalar(stack: Any, row: int) -> Any:
    return stack[row]


def _tensors(values: list[Any]) -> Column | None:
    first = values[0]
    if not all(_is_plain(v) and v.dtype == first.dtype and v.shape == first.shape for v in values):
        return None
    return _Rows(torch.stack(values), _tensor)


def _tensor(stack: Any, row: int) -> Any:
    return stack[row].clone()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is nothing but its numbers."""
    special = tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.layout is torch.strided and not special


_MAKERS: dict[type, Callable[[list[Any]], Column | None]] = {
    int: _ints,
    float: _floats,
    bool: _bools,
    type(None): _nones,
    str: _texts,
    bytes: _blobs,
    np.ndarray: _arrays,
    torch.Tensor: _tensors,
}


# ------------------------------------------------------------------ records


def _record(kind: type, values: list[Any], depth: int) -> Column | None:
    """Columns of values that have the same fields; None where they are no records, or differ."""
    names = _names(kind, values[0])
    if names is None or len(names) > _MOST_FIELDS:
        return None
    if kind is dict:
        if any(tuple(value) != names for value in values) or {type(key) for value in values for key in value} - {str}:
            return None  # {True: ...} == {1: ...}, and a numpy string equals a plain one
        fields_ = [[value[name] for value in values] for name in names]
    elif issubclass(kind, tuple):
        if any(len(value) != len(names) or getattr(value, "__dict__", None) for value in values):
            return None
        fields_ = [[value[i] for value in values] for i in range(len(names))]
    else:
        if any(tuple(value.__dict__) != names for value in values):
            return None
        fields_ = [[value.__dict__[name] for value in values] for name in names]
    return _Record(kind, names, tuple(_column(field, depth - 1) for field in fields_))


def _names(kind: type, value: Any) -> tuple[str, ...] | None:
    """Field names of a record; None for a value that is no record, or that says itself how it is to be copied."""
    if kind is dict:
        return tuple(value)
    if kind is tuple:
        return tuple(map(str, range(len(value))))
    if any(getattr(kind, hook, None) is not getattr(object, hook, None) for hook in _HOOKS):
        return None
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return tuple(kind._fields)
    if is_dataclass(kind) and kind.__new__ is object.__new__ and hasattr(value, "__dict__"):
        return tuple(field.name for field in fields(kind))
    return None


# ------------------------------------------------------------------ everything else


class _Refused(Exception):
    """A value that cannot be pickled: its row in the block."""

    def __init__(self, row: int, value: Any) -> None:
        super().__init__(row)
        self.row, self.value = row, value


def _pickled(values: list[Any]) -> Column:
    buffer, ends = io.BytesIO(), [0]
    pickler = _Pickler(buffer, protocol=5)
    for row, value in enumerate(values):
        pickler.clear_memo()
        try:
            pickler.dump(value)
        except Exception as error:
            raise _Refused(row, value) from error
        ends.append(buffer.tell())
    return _Cut(buffer.getvalue(), _offsets(ends), pickle.loads)


class _Pickler(pickle.Pickler):
    """Stores a tensor's own numbers: torch stores all of the storage that a tensor is a view of, and 1 kB more.

    And numpy's strings whole: numpy's own way loses a NUL at their end.
    """

    def reducer_override(self, value: Any) -> Any:
        if type(value) in (np.str_, np.bytes_):
            return type(value), (value[:],)  # a slice is a plain str or bytes
        if type(value) is not torch.Tensor or not _is_plain(value):
            return NotImplemented
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return _restored, (data, value.dtype, tuple(value.shape))


def _restored(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _message(refused: _Refused, start: int) -> UserError:
    return UserError(
        f"record {start + refused.row:,} cannot be packed: {refused.__cause__}",
        why=f"it holds a {type(refused.value).__name__} that cannot be stored as bytes",
        remedy="pack numbers, text, arrays, lists and dicts; open files, functions and the like where a sample is read",
    )
