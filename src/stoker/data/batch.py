"""Batches as trees of tensors: how samples are joined to one, how many it holds, how it is split."""

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from stoker.errors import UserError

Place = tuple[Any, ...]  # keys, field names and positions from the sample down to one of its parts
Column = Sequence[Any]  # the same part of every sample
Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
Leaf = Callable[[Column, Place], Any]  # what becomes of a column; CONTAINER: go on with its parts

CONTAINER = object()
_MASK_NAMES = {"input_ids": "attention_mask"}  # as the models of transformers call it


def map_tree(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `fn` to every leaf of nested tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Mapping):
        mapped = {key: map_tree(fn, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tree(fn, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tree(fn, value) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: map_tree(fn, getattr(tree, f.name)) for f in fields(tree) if f.init})
    return fn(tree)


def num_rows(batch: Any) -> int | None:
    """Count the samples of a batch; None where it holds no tensor with a leading dimension.

    It is that dimension of the first tensor. Where other parts disagree, it is the length of a list inside the batch,
    if all parts agree on that: one entry per sample, as in (list of images, list of dicts of boxes).
    """
    found: dict[int, bool] = {}
    for rows, of_tensor in _candidates(batch):
        found.setdefault(rows, of_tensor)
    for rows in found:
        if len(found) == 1 or _fits(batch, rows, top=True):
            return rows
    return next((rows for rows, of_tensor in found.items() if of_tensor), None)


def _parts_of(tree: Any) -> list[Any] | None:
    """Parts of a container; None for a leaf."""
    if isinstance(tree, Mapping):
        return list(tree.values())
    if isinstance(tree, list | tuple):
        return list(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, f.name) for f in fields(tree)]
    return None


def _is_listing(tree: Any) -> bool:
    return isinstance(tree, list | tuple) and not hasattr(tree, "_fields")


def _candidates(batch: Any, top: bool = True) -> Iterator[tuple[int, bool]]:
    """Yield what may be the number of samples, and whether a tensor says so: the first tensor, then lists' lengths."""
    if isinstance(batch, torch.Tensor):
        if batch.dim():
            yield batch.size(0), True
        return
    parts = _parts_of(batch) or []
    inner = [] if _plain(parts) else [found for part in parts for found in _candidates(part, top=False)]
    yield from [found for found in inner if found[1]][:1]
    yield from (found for found in inner if not found[1])
    if _is_listing(batch) and parts and (not top or all(_parts_of(part) is not None for part in parts)):
        yield len(parts), False


def _fits(tree: Any, rows: int, top: bool = False) -> bool:
    """Whether every tensor below has `rows` rows, or is in a list of `rows` entries."""
    if isinstance(tree, torch.Tensor):
        return tree.dim() == 0 or tree.size(0) == rows
    parts = _parts_of(tree)
    if parts is None:
        return True
    if _is_listing(tree) and not top and not _hold_rows(parts):
        return len(parts) == rows
    if all(_fits(part, rows) for part in parts):
        return True
    return _is_listing(tree) and len(parts) == rows and (not top or all(_parts_of(p) is not None for p in parts))


def _hold_rows(parts: Sequence[Any]) -> bool:
    """Whether one of them is a container, or a tensor with a leading dimension."""
    if _plain(parts):
        return False
    return any(p.dim() > 0 if isinstance(p, torch.Tensor) else _parts_of(p) is not None for p in parts)


def _plain(parts: Sequence[Any]) -> bool:
    """Whether all are strings or numbers: there may be thousands, too many to look at one by one."""
    return set(map(type, parts)) <= {str, bytes, int, float, bool, type(None)}


def split(batch: Any, microbatch: int | None) -> list[Any]:
    """Cut a batch into pieces of at most `microbatch` samples along the leading dimension of every tensor.

    Jagged nested tensors are cut too, and lists of one entry per sample; whatever else has no leading sample dimension
    goes to every piece.
    """
    rows = num_rows(batch) if microbatch is not None else None
    if microbatch is None or (rows is not None and rows <= microbatch):
        return [batch]
    if rows is None:
        raise UserError(
            f"a batch of type {type(batch).__name__} cannot be cut into microbatches of {microbatch}",
            why="it holds no tensor with a leading sample dimension",
            remedy="leave out --microbatch, or let collate return tensors (in tuples, lists, dicts or dataclasses)",
        )
    listed = _has_listed(batch, rows, top=True)
    return [_piece(batch, slice(s, s + microbatch), rows, listed, top=True) for s in range(0, rows, microbatch)]


def _has_listed(tree: Any, rows: int, top: bool = False) -> bool:
    """Whether tensors come somewhere in a list of one entry per sample, which cannot be columns of the batch."""
    if _per_sample(tree, rows, False, top) and _hold_rows(tree):
        return True
    return any(_has_listed(part, rows) for part in _parts_of(tree) or [])


def _per_sample(tree: Any, rows: int, listed: bool, top: bool) -> bool:
    """Whether a list has one entry per sample. `listed`: others in the batch have, so it is likelier than columns."""
    if not _is_listing(tree) or len(tree) != rows:
        return False
    if not _hold_rows(tree):
        return not top
    if top:
        return all(_parts_of(part) is not None for part in tree) and not all(_fits(part, rows) for part in tree)
    return listed or not all(_fits(part, rows) for part in tree)


def _piece(tree: Any, cut: slice, rows: int, listed: bool, top: bool = False) -> Any:
    if isinstance(tree, torch.Tensor):
        if tree.dim() == 0 or tree.size(0) != rows:
            return tree
        return _piece_of_nested(tree, cut) if tree.is_nested else tree[cut]
    if _per_sample(tree, rows, listed, top):
        return tree[cut]
    if isinstance(tree, Mapping):
        pieces = {key: _piece(value, cut, rows, listed) for key, value in tree.items()}
        return pieces if type(tree) is dict else type(tree)(pieces)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_piece(part, cut, rows, listed) for part in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_piece(part, cut, rows, listed) for part in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        names = [f.name for f in fields(tree) if f.init]
        return replace(tree, **{name: _piece(getattr(tree, name), cut, rows, listed) for name in names})
    return tree


def _piece_of_nested(tensor: torch.Tensor, cut: slice) -> torch.Tensor:
    """Rows of a nested tensor, as a nested tensor of the same layout."""
    return torch.nested.as_nested_tensor(list(tensor.unbind()[cut]), layout=tensor.layout)


def masked(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the values that are real, and how many: what a loss over padded sequences returns.

    What is masked reaches neither the sum nor the gradient with respect to `values`, be it nan.

    Args:
        values: [B, L], [B, L, D], ...: a loss per token, say, with reduction="none".
        mask: bool [B, L], or as many leading dimensions of `values` as it has.

    Raises:
        UserError: shapes that do not go together.
    """
    if mask.dim() == 0 or mask.shape != values.shape[: mask.dim()]:
        raise UserError(
            f"a mask of shape {tuple(mask.shape)} does not fit values of shape {tuple(values.shape)}",
            why="the mask's dimensions must be the first of the values'",
            remedy='compute the values with reduction="none"',
        )
    trailing = values.shape[mask.dim() :]
    mask = mask.to(values.device).bool()
    real = torch.where(mask.reshape(*mask.shape, *(1 for _ in trailing)), values, 0)
    half = values.dtype in (torch.float16, torch.bfloat16)
    return real.sum(dtype=torch.float32 if half else None), mask.sum() * trailing.numel()


def rectangles(lists: Sequence[Sequence[Any]], depth: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Tensors of lists (of lists ...) of numbers, and which of each was there: None for all."""
    if depth == 1:
        array = np.array(list(chain.from_iterable(lists)) or np.zeros(0, dtype=np.int64))  # 4x torch.tensor's speed
        if array.dtype.kind not in "biuf":
            raise UserError("a list holds a number that fits no tensor: integers have 64 bits at most")
        flat = torch.from_numpy(array)
        flat = flat.to(torch.get_default_dtype()) if array.dtype.kind == "f" else flat
        return [(tensor, None) for tensor in flat.split([len(part) for part in lists])]
    inner = rectangles(list(chain.from_iterable(lists)), depth - 1)
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    dims, start = tuple(range(depth - 1)), 0
    for part in lists:
        parts, start = inner[start : start + len(part)], start + len(part)
        empty = torch.zeros((0,) * depth, dtype=torch.bool)  # of a dtype that gives way to any
        found.append(
            padded(parts, dims, common_dtype([p[0] for p in parts]), 1, 0, None, None) if parts else (empty, empty)
        )
    return found


def padded(
    parts: Sequence[Any],
    dims: tuple[int, ...],
    dtype: torch.dtype,
    multiple_of: int,
    fill: float,
    out: Allocate | None,
    mask_out: Allocate | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensor [B, *shape] of B padded parts (tensor, mask or None), and its mask [B, *the varying dimensions]."""
    tensors = [part[0] for part in parts]
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    shape[dims[0]] = -(-shape[dims[0]] // multiple_of) * multiple_of
    batch = (out or empty)((len(parts), *shape), dtype)
    mask = (mask_out or empty)((len(parts), *(shape[dim] for dim in dims)), torch.bool)
    with torch.no_grad():
        batch.fill_(fill)
        if dims == (0,):
            lengths = torch.tensor([tensor.shape[0] for tensor in tensors])
            torch.lt(torch.arange(shape[0]), lengths[:, None], out=mask)
            with suppress(NotImplementedError):  # uint16, float8
                batch.masked_scatter_(mask.view(*mask.shape, *(1 for _ in shape[1:])), torch.cat(tensors).to(dtype))
                return batch, mask
        mask.zero_()
        for row, (tensor, known) in enumerate(parts):
            there = mask[row][tuple(slice(tensor.shape[dim]) for dim in dims)]
            there.copy_(known) if known is not None else there.fill_(True)
            batch[row][tuple(map(slice, tensor.shape))] = tensor
        if any(known is not None for _, known in parts):  # lists of lists, padded with 0 so far
            batch[~mask] = fill
    return batch, mask


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Allocate in ordinary memory."""
    return torch.empty(shape, dtype=dtype)


def common_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Type that torch.stack promotes to."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


# ------------------------------------------------------------------ samples to a batch


class CollateError(UserError):
    """Samples that make no batch. `rows` are the positions in the batch of those that the message is about.

    In `text` and `why`, "{row 3}" stands for the sample at position 3, however it will be called.
    """

    def __init__(self, text: str, rows: Sequence[int], *, why: str = "", remedy: str = "") -> None:
        self.rows, self._text, self._why = tuple(rows), text, why
        super().__init__(_naming(text, _nth), why=_naming(why, _nth), remedy=remedy)

    def named(self, name: Callable[[int], str]) -> UserError:
        """Return the same error with the samples called as `name(position in the batch)` calls them."""
        return UserError(_naming(self._text, name), why=_naming(self._why, name), remedy=self.remedy)


def _nth(row: int) -> str:
    return f"sample {row} of the batch"


def _naming(text: str, name: Callable[[int], str]) -> str:
    return re.sub(r"\{row (\d+)\}", lambda found: name(int(found[1])), text)


class Masked(NamedTuple):
    """A padded column; the mask goes into the container that the column is part of."""

    values: torch.Tensor
    mask: torch.Tensor


def join_trees(column: Column, place: Place, leaf: Leaf) -> Any:
    """Batch a column part by part."""
    found = leaf(column, place)
    if found is not CONTAINER:
        return found
    first = column[0]
    if isinstance(first, Mapping):
        entries = {key: join_trees(_entries(column, key, place), (*place, key), leaf) for key in first}
        return _mapping(first, entries)
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **_parts(column, [f.name for f in fields(first) if f.init], place, leaf))
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(**_parts(column, list(first._fields), place, leaf))
    if isinstance(first, Sequence):
        try:
            columns = list(zip(*column, strict=True))
        except (TypeError, ValueError) as error:
            raise differing_kinds(column, place) from error
        return _sequence(first, [join_trees(part, (*place, i), leaf) for i, part in enumerate(columns)])
    raise differing_kinds(column, place)


def _entries(column: Column, key: Any, place: Place) -> list[Any]:
    try:
        return [sample[key] for sample in column]
    except (KeyError, TypeError, IndexError) as error:
        row = next((i for i, s in enumerate(column) if not isinstance(s, Mapping) or key not in s), 0)
        if not isinstance(column[row], Mapping):
            raise differing_kinds(column, place) from error
        inside = f" in {where(place)}" if place else ""
        raise CollateError(
            f"{{row {row}}} has no {key!r}{inside}; {{row 0}} has",
            (0, row),
            remedy="let every sample have the same keys (None in all of them is allowed)",
        ) from error


def _parts(column: Column, names: list[str], place: Place, leaf: Leaf) -> dict[str, Any]:
    """Batched fields of a dataclass or namedtuple, masks in the fields `NAME_mask`."""
    if any(type(sample) is not type(column[0]) for sample in column):
        raise differing_kinds(column, place)
    found = {name: join_trees([getattr(s, name) for s in column], (*place, name), leaf) for name in names}
    for name, value in list(found.items()):
        if isinstance(value, Masked):
            mask_name = _mask_name(name)
            if mask_name not in found:
                raise UserError(
                    f"the mask of {where((*place, name))} has no place in a {type(column[0]).__name__}",
                    remedy=f"give the class a field `{mask_name}: torch.Tensor | None = None`",
                )
            found[name] = value.values
            if found[mask_name] is None:
                found[mask_name] = value.mask
    return found


def _mask_name(name: str) -> str:
    return _MASK_NAMES.get(name, f"{name}_mask")


def _mapping(first: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """Batched entries in a mapping of the samples' kind, with what else it carries, as torch does it."""
    batch: dict[Any, Any] = {}
    for key, value in entries.items():
        if isinstance(value, Masked):
            batch[key] = value.values
            if (mask_name := _mask_name(str(key))) not in entries:  # else the samples bring their own
                batch[mask_name] = value.mask
        else:
            batch[key] = value
    if type(first) is dict:
        return batch
    try:
        if isinstance(first, MutableMapping):
            clone = copy(first)
            clone.update(batch)
            return clone
        return type(first)(batch)  # type: ignore[call-arg]
    except TypeError:
        return batch


def _sequence(first: Sequence[Any], parts: list[Any]) -> Any:
    """Batched elements in a list, or in a sequence of the samples' kind, as torch does it."""
    flat = list(chain.from_iterable(part if isinstance(part, Masked) else (part,) for part in parts))
    if isinstance(first, list | tuple) and type(first) in (list, tuple):
        return flat
    try:
        if isinstance(first, MutableSequence) and len(flat) == len(first):
            clone = copy(first)
            for i, part in enumerate(flat):
                clone[i] = part
            return clone
        return flat if isinstance(first, tuple) else type(first)(flat)  # type: ignore[call-arg]
    except TypeError:
        return flat


def where(place: Place) -> str:
    """Place in the sample in words, innermost first: "'boxes' of element 1"."""
    words = [f"element {part}" if isinstance(part, int) else repr(part) for part in place]
    return " of ".join(reversed(words)) or "what the data set returns"


def kind_of(value: Any) -> str:
    """Type of a value, in words."""
    if value is None:
        return "None"
    name = "tensor" if isinstance(value, torch.Tensor) else type(value).__name__.replace("ndarray", "array")
    return f"an {name}" if name[0].lower() in "aeio" else f"a {name}"


OWN_COLLATE = "let the data set return tensors, arrays or numbers, or give Loader(collate=...) a function of your own"


def differing_kinds(column: Column, place: Place) -> CollateError:
    """Tell which sample is not of the kind of the batch's first; or that its kind cannot be batched."""
    for row, value in enumerate(column):
        if kind_of(value) != kind_of(column[0]):
            return CollateError(
                f"{where(place)} is {kind_of(column[0])} in {{row 0}} and {kind_of(value)} in {{row {row}}}",
                (0, row),
                remedy="let every sample have the same structure, or give Loader(collate=...) a function of your own",
            )
    if not isinstance(column[0], list | tuple):
        return CollateError(
            f"{where(place)} is {kind_of(column[0])}, which has no batched form", (0,), remedy=OWN_COLLATE
        )
    row = next((row for row, value in enumerate(column) if len(value) != len(column[0])), 0)
    return CollateError(
        f"{where(place)} has length {len(column[0])} in {{row 0}} and {len(column[row])} in {{row {row}}}",
        (0, row),
        remedy="collate=stoker.data.pad()" if _is_numbers(column[0] or column[row]) else OWN_COLLATE,
    )


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, int | float) for part in value)
