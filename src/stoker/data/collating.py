"""Collate functions: a list of samples becomes a batch. The default, padding with masks, and jagged tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from torch.utils.data._utils.collate import collate_numpy_array_fn, collate_tensor_fn, default_collate_fn_map

from stoker.data.batch import (
    CONTAINER,
    OWN_COLLATE,
    Allocate,
    CollateError,
    Column,
    Masked,
    Place,
    common_dtype,
    differing_kinds,
    empty,
    join_trees,
    kind_of,
    masked,
    padded,
    rectangles,
    where,
)
from stoker.errors import UserError, nearest
from stoker.recipe import TARGET_NAMES

__all__ = ["Allocate", "CollateError", "Pad", "Ragged", "collate", "masked", "pad", "ragged"]

Fields = Sequence[str | int] | Mapping[str | int, int | Sequence[int]]

_IGNORED = -100  # ignore_index of torch's cross entropy
_BESIDE_INPUT_IDS = ("token_type_ids", "position_ids")  # one attention_mask serves them all


def collate(samples: list[Any], out: Allocate | None = None) -> Any:
    """Batch samples as torch's default_collate does; also dataclasses, and what is None in every sample.

    Args:
        samples: B samples of one structure: tensors, arrays, numbers, strings, or tuples, lists, dicts, dataclasses.
        out: (shape, dtype) -> tensor: where given, every tensor of the batch is written into one of these.

    Raises:
        CollateError: samples that differ in structure, type or shape.
    """
    return join_trees(_some(samples), (), partial(_default, out))


def _some(samples: list[Any]) -> list[Any]:
    if not samples:
        raise UserError("a batch of no samples was to be collated", remedy="give collate at least one sample")
    return samples


def _default(out: Allocate | None, column: Column, place: Place) -> Any:
    """Batch a column of tensors, arrays, numbers, strings or None."""
    first = column[0]
    if first is None:
        if any(value is not None for value in column):
            raise differing_kinds(column, place)
        return None
    function = default_collate_fn_map.get(type(first))
    if function is None and type(first) in (tuple, dict, list):
        return CONTAINER
    if function is None:
        function = next((f for kind, f in default_collate_fn_map.items() if isinstance(first, kind)), None)
    if function is None:
        return CONTAINER
    try:
        if function is collate_tensor_fn:
            return _stack(column, out)
        if function is collate_numpy_array_fn:
            return _stack_arrays(column, out)
        batch = function(column, collate_fn_map=default_collate_fn_map)
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise _misfit(column, place, error) from error
    if out is not None and isinstance(batch, torch.Tensor) and not batch.is_nested:
        return out(tuple(batch.shape), batch.dtype).copy_(batch)
    return batch


def _stack(tensors: Any, out: Allocate | None) -> torch.Tensor:
    first = tensors[0]
    if first.layout is not torch.strided or first.is_nested:
        raise TypeError(f"tensors of layout {first.layout} cannot be stacked")
    if out is not None:
        with torch.no_grad():
            return torch.stack(tensors, out=out((len(tensors), *first.shape), common_dtype(tensors)))
    if get_worker_info() is not None:
        return collate_tensor_fn(tensors)  # type: ignore[no-any-return]  # into shared memory
    return torch.stack(tensors)


def _stack_arrays(arrays: Sequence[Any], out: Allocate | None) -> torch.Tensor:
    """Stack in numpy, five times faster, what numpy and torch promote alike: one dtype."""
    if out is None and set(map(type, arrays)) == {np.ndarray} and len({array.dtype for array in arrays}) == 1:
        return torch.from_numpy(np.stack(arrays))
    return _stack([_tensor(array) for array in arrays], out)


def _tensor(value: Any) -> torch.Tensor:
    """Tensor of a tensor or an array, sharing memory where torch can."""
    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = np.array(array, dtype=array.dtype.newbyteorder("="))
    return torch.as_tensor(array)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"shape {tuple(value.shape)}"
    return f"length {len(value)}" if isinstance(value, list | tuple) else kind_of(value)


def _misfit(column: Column, place: Place, error: Exception | str) -> CollateError:
    """Tell why a column makes no batch: which sample differs from the batch's first, and in what."""
    first = column[0]
    if any(kind_of(value) != kind_of(first) for value in column):
        return differing_kinds(column, place)
    for row, value in enumerate(column):
        if _described(value) != _described(first):
            return CollateError(
                f"{where(place)} has {_described(first)} in {{row 0}} and {_described(value)} in {{row {row}}}",
                (0, row),
                why="samples are stacked, which takes equal shapes",
                remedy=_remedy(first, value, place),
            )
    return CollateError(f"{where(place)} cannot be stacked: {error}", (0,), remedy=OWN_COLLATE)


def _remedy(first: Any, other: Any, place: Place) -> str:
    """Padding, as it must be written for this part of the sample; or resizing where it may be an image."""
    if isinstance(first, list) and _depth([first, other]):
        return "collate=stoker.data.pad()"
    if not isinstance(first, torch.Tensor | np.ndarray) or not first.ndim or first.ndim != other.ndim:
        return OWN_COLLATE
    resize = ", or resize them to one shape (torchvision.transforms.v2.Resize)" if first.ndim >= 2 else ""
    return f"{_pad_call([] if _automatic(first) else [(place, _differing(first, other))])}{resize}"


def _differing(first: Any, other: Any) -> tuple[int, ...]:
    return tuple(dim for dim in range(first.ndim) if first.shape[dim] != other.shape[dim])


def _pad_call(found: Sequence[tuple[Place, tuple[int, ...]]], function: str = "pad") -> str:
    """Write the argument that pads these places in these dimensions."""
    dims = {_name(place): varying for place, varying in found}
    simple = all(varying == (0,) for varying in dims.values())
    fields: Any = tuple(dims) if simple else dims
    return f"collate=stoker.data.{function if simple else 'pad'}({f'{fields=}' if dims else ''})"


def _name(place: Place) -> str | int:
    """What `fields=` must say to mean a place: its innermost key, or its position in the sample."""
    keys = [part for part in place if isinstance(part, str)]
    return keys[-1] if keys else place[0] if place else 0


def pad(
    value: float = 0,
    *,
    fields: Fields | str | int | None = None,
    values: Mapping[str | int, float] | None = None,
    multiple_of: int = 1,
    max_length: int | None = None,
    allow_empty: bool = False,
) -> "Pad":
    """Collate function that pads sequences to the longest of the batch and puts a mask beside each.

    A mask is bool [B, L], True where the sequence is. It is the entry "NAME_mask" of a dict ("attention_mask" for
    "input_ids"), the element after its sequence in a tuple or list, the field `NAME_mask` of a dataclass or
    namedtuple. A sample that is nothing but a sequence gives [padded, mask].

    Which parts are sequences does not depend on the batch: lists of numbers and tensors of rank 1 that are not of
    floating point, unless `fields` names them. All else is stacked, as by torch's default_collate.

    The target (a tuple's last element; an entry or field "target", "targets", "labels", "label" or "y") has no mask:
    its padding says as much, -100 for integers (which torch's cross entropy leaves out) and nan for floats. Nor have
    bool sequences, and those called "..._mask": they are masks, and padded with False.

    Args:
        value: what to pad with.
        fields: the sequences, by name or by position in the sample; all of them. A mapping says which dimensions of
            a sample vary, as in {"image": (1, 2)}, whose mask is [B, H, W]; otherwise it is the first.
        values: what to pad single ones with, by name or position; the target too.
        multiple_of: round the padded length (of the first dimension that varies) up to a multiple of this.
        max_length: cut longer sequences off.
        allow_empty: take sequences of length 0, whose mask is all False.

    Raises:
        UserError: arguments that do not go together.
        CollateError: (when called) a sequence of length 0, or shapes that differ where no padding was asked for.
    """
    if multiple_of < 1 or (max_length is not None and max_length < 1):
        raise UserError(f"pad(multiple_of={multiple_of}, max_length={max_length}): both must be at least 1")
    if max_length is not None and max_length % multiple_of:
        raise UserError(
            f"pad(max_length={max_length}) is no multiple of multiple_of={multiple_of}",
            remedy=f"max_length={-(-max_length // multiple_of) * multiple_of}",
        )
    return Pad(value, _fields(fields), dict(values or {}), multiple_of, max_length, allow_empty)


def ragged(fields: Sequence[str | int] | str | int | None = None, *, allow_empty: bool = False) -> "Ragged":
    """Collate function that makes jagged nested tensors of sequences, without padding; the rest is stacked.

    Args:
        fields: the sequences, by name or position (default: as `pad` finds them). Their first dimension varies.
        allow_empty: take sequences of length 0.

    Raises:
        CollateError: (when called) a sequence of length 0, or shapes that differ where they must not.
    """
    return Ragged(_fields(fields), allow_empty)


def _fields(given: Fields | str | int | None) -> dict[str | int, tuple[int, ...]] | None:
    if given is None:
        return None
    if isinstance(given, str | int):
        given = (given,)
    if not isinstance(given, Mapping):
        return {name: (0,) for name in given}
    return {name: (dims,) if isinstance(dims, int) else tuple(dims) for name, dims in given.items()}


@dataclass
class _Call:
    """One batch on its way: which of its parts are sequences, and what did not fit."""

    fields: Mapping[str | int, tuple[int, ...]] | None
    join: Callable[["_Call", list[Any], tuple[int, ...], Place], Any]
    out: Allocate | None
    target: Place | None
    name: str  # of the function, for remedies
    num_elements: int  # of a sample that is a tuple: positions may count from its end
    places: list[Place] = field(default_factory=list)
    sequences: list[tuple[Place, tuple[int, ...]]] = field(default_factory=list)
    misfits: list[tuple[Place, tuple[int, ...], CollateError]] = field(default_factory=list)

    def leaf(self, column: Column, place: Place) -> Any:
        """Join a column of sequences; batch any other as the default does."""
        depth = _depth(column)
        if depth is None:
            found = _default(self.out, column, place)
            if found is not CONTAINER:
                self.places.append(place)
            return found
        self.places.append(place)
        items = list(column) if depth else [_tensor(value) for value in column]
        dims = self._dims(items[0], depth, place)
        if dims is not None:
            self.sequences.append((place, dims))
            return self.join(self, items, dims, place)
        try:
            return _default(self.out, [torch.tensor(i) for i in items] if depth else items, place)
        except CollateError as error:
            first, other = items[0], items[error.rows[-1]]
            if _described(first) == _described(other) or (not depth and first.dim() != other.dim()):
                raise  # padding would not mend it
            self.misfits.append((place, (0,) if depth else _differing(first, other), error))
        except ValueError:  # lists of lists of unequal length
            self.misfits.append((place, (0,), CollateError(f"{where(place)} is a list of unequal lists", (0,))))

    def _dims(self, first: Any, depth: int, place: Place) -> tuple[int, ...] | None:
        """Dimensions of a sample that vary; None for what is stacked."""
        found = (0,) if _automatic(first) else None
        if self.fields is not None:
            found = _named(self.fields, place, self.num_elements)
        if found is None or depth:
            return None if found is None else tuple(range(depth))
        rank = first.dim()
        if any(not -rank <= dim < rank for dim in found):
            raise UserError(
                f"fields= says that dimension {found[-1]} of {where(place)} varies, but it has {rank} dimensions"
            )
        return tuple(sorted({dim % rank for dim in found}))

    def check(self, tensors: list[torch.Tensor], dims: tuple[int, ...], place: Place, allow_empty: bool) -> None:
        """Refuse sequences of length 0, and those that differ in more than their varying dimensions."""
        first = tensors[0]
        others = [dim for dim in range(first.dim()) if dim not in dims]
        for row, tensor in enumerate(tensors):
            if tensor.dim() != first.dim() or any(tensor.shape[dim] != first.shape[dim] for dim in others):
                differing = _differing(first, tensor) if tensor.dim() == first.dim() else dims
                raise CollateError(
                    f"{where(place)} has {_described(first)} in {{row 0}} and {_described(tensor)} in {{row {row}}}",
                    (0, row),
                    why=f"only dimension {', '.join(map(str, dims))} of it may vary",
                    remedy=_pad_call([(place, tuple(sorted({*dims, *differing})))], self.name),
                )
            if not allow_empty and any(tensor.shape[dim] == 0 for dim in dims):
                raise CollateError(
                    f"{where(place)} of {{row {row}}} has length 0",
                    (row,),
                    remedy=f"leave such samples out, or collate=stoker.data.{self.name}(allow_empty=True)",
                )


def _collated(
    samples: list[Any],
    fields: Mapping[str | int, tuple[int, ...]] | None,
    values: Mapping[str | int, float],
    join: Callable[[_Call, list[Any], tuple[int, ...], Place], Any],
    out: Allocate | None,
    name: str,
) -> Any:
    first = _some(samples)[0]
    call = _Call(fields, join, out, _target(first), name, len(first) if isinstance(first, list | tuple) else 0)
    batch = join_trees(samples, (), call.leaf)
    if call.misfits:
        error = call.misfits[0][2]
        needed = [*call.sequences, *(misfit[:2] for misfit in call.misfits)]
        error.remedy = _pad_call(sorted(needed, key=lambda found: call.places.index(found[0])), call.name)
        raise error
    for told in [*(fields or {}), *values]:
        if not any(_named({told: True}, place, call.num_elements) for place in call.places):
            names = [str(part) for place in call.places for part in place]
            raise UserError(
                f"stoker.data.{name} is told of {told!r}, but the samples have no such part{nearest(str(told), names)}",
                remedy=f"they have {', '.join(where(place) for place in call.places)}",
            )
    return list(batch) if isinstance(batch, Masked) else batch


def _target(first: Any) -> Place | None:
    """Place of the target in a sample, as Recipe(loss=) finds it."""
    names = list(first) if isinstance(first, Mapping) else list(getattr(first, "_fields", ()))
    if is_dataclass(first) and not isinstance(first, type):
        names = [f.name for f in fields(first)]
    named = next(((name,) for name in TARGET_NAMES if name in names), None)
    if named is None and isinstance(first, list | tuple) and len(first) >= 2:
        return (names[-1],) if names else (len(first) - 1,)
    return named


def _named(given: Mapping[str | int, Any], place: Place, num_elements: int) -> Any:
    """What is given for a place or for something that it is part of; None if nothing is."""
    for name, value in given.items():
        outer = place[0] if place else 0
        if name in place if isinstance(name, str) else outer in (name, name + num_elements):
            return value
    return None


def _automatic(value: Any) -> bool:
    """Whether a part is a sequence, where nobody says which are."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 1 and not value.is_floating_point() and not value.is_complex()
    return value.ndim == 1 and value.dtype.kind in "biu" if isinstance(value, np.ndarray) else isinstance(value, list)


def _depth(column: Column) -> int | None:
    """0 for tensors and arrays of numbers, 1 for lists of numbers, 2 for lists of those, ...; None for all else."""
    if isinstance(column[0], list):
        depth = _list_depth(column)
        return depth - 1 if depth is not None and all(isinstance(value, list) for value in column) else None
    for value in column:
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_nested:
                return None
        elif not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
            return None
    return 0


def _list_depth(nested: Sequence[Any]) -> int | None:
    kinds = set(map(type, nested))
    if all(issubclass(kind, int | float | np.number | np.bool_) for kind in kinds):
        return 1
    if not all(issubclass(kind, list | tuple) for kind in kinds):
        return None
    inner = {_list_depth(part) for part in nested if part} or {1}
    depth = inner.pop()
    return depth + 1 if depth is not None and not inner else None


@dataclass(frozen=True)
class Pad:
    """See `pad`."""

    value: float
    fields: Mapping[str | int, tuple[int, ...]] | None
    values: Mapping[str | int, float]
    multiple_of: int
    max_length: int | None
    allow_empty: bool

    def __call__(self, samples: list[Any], out: Allocate | None = None) -> Any:
        """Batch samples, padding what is a sequence."""
        return _collated(samples, self.fields, self.values, self._join, out, "pad")

    def _join(self, call: _Call, items: list[Any], dims: tuple[int, ...], place: Place) -> Any:
        parts: list[Any] = rectangles(items, len(dims)) if isinstance(items[0], list) else [(t, None) for t in items]
        if self.max_length is not None:
            parts = [tuple(_cut(x, dims[0], self.max_length) for x in part) for part in parts]
        tensors = [part[0] for part in parts]
        call.check(tensors, dims, place, self.allow_empty)
        dtype = common_dtype(tensors)
        if place == call.target and dtype in (torch.uint8, torch.uint16, torch.uint32):
            dtype = torch.int64
        fill = self._fill(dtype, place, call)
        name = place[-1] if place and isinstance(place[-1], str) else ""
        if place == call.target or dtype is torch.bool or name.endswith("_mask") or name in _BESIDE_INPUT_IDS:
            return padded(parts, dims, dtype, self.multiple_of, fill, call.out, None)[0]
        return Masked(*padded(parts, dims, dtype, self.multiple_of, fill, call.out, call.out))

    def _fill(self, dtype: torch.dtype, place: Place, call: _Call) -> float:
        fill = _named(self.values, place, call.num_elements)
        name = str(place[-1]) if place else ""
        if fill is not None:
            pass
        elif place == call.target and dtype is torch.bool:
            raise UserError(
                f"{where(place)} is the target, of varying length and bool: padding could not be told from it",
                remedy="give it as integers (padded with -100) or as floats (padded with nan)",
            )
        elif place == call.target:
            fill = float("nan") if dtype.is_floating_point else _IGNORED
        else:
            fill = 0 if dtype is torch.bool or name.endswith("_mask") else self.value
        if dtype.is_floating_point or dtype.is_complex:
            return float(fill)
        low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if not float(fill).is_integer() or not low <= fill <= high:
            raise UserError(f"{where(place)} is of {dtype}, which cannot hold the padding {fill}")
        return int(fill)


def _cut(tensor: Any, dim: int, length: int) -> Any:
    return tensor.narrow(dim, 0, min(length, tensor.shape[dim])) if tensor is not None else None


@dataclass(frozen=True)
class Ragged:
    """See `ragged`."""

    fields: Mapping[str | int, tuple[int, ...]] | None
    allow_empty: bool

    def __call__(self, samples: list[Any], out: Allocate | None = None) -> Any:
        """Batch samples, sequences as jagged nested tensors."""
        return _collated(samples, self.fields, {}, self._join, out, "ragged")

    def _join(self, call: _Call, items: list[Any], dims: tuple[int, ...], place: Place) -> Any:
        if dims != (0,):
            raise UserError(
                f"{where(place)} varies in more than its first dimension: a jagged tensor cannot hold it",
                remedy="collate=stoker.data.pad() can",
            )
        tensors = [part[0] for part in rectangles(items, 1)] if isinstance(items[0], list) else items
        call.check(tensors, dims, place, self.allow_empty)
        lengths = [tensor.shape[0] for tensor in tensors]
        allocate, dtype = call.out or empty, common_dtype(tensors)
        with torch.no_grad():
            values = torch.cat(tensors, out=allocate((sum(lengths), *tensors[0].shape[1:]), dtype))
            offsets = allocate((len(tensors) + 1,), torch.int64)
            offsets.copy_(torch.tensor([0, *lengths]).cumsum(0))
        return torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths))
