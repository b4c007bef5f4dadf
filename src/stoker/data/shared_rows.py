"""Rows of one split that are also in another: a held-out score on them says nothing about new data.

Looked for at a run's start, so bounded in time: data that would have to be decoded is not looked at, and of very large
data only a part is, which the answer says.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Subset

from stoker.data.columns import Columns, columns_of
from stoker.data.order import Indices

_BUDGET_S = 0.3
_BYTES_PER_S = 2e9  # what hashing rows reads, measured 2-8 GB/s
_ROW_BYTES = 1024  # of a longer row, 8 runs of 128 bytes are hashed: candidates are compared in full anyway
_RUNS = 8
_CHUNK_BYTES = 1 << 20  # stays in the cache
_CHUNK_ROWS = 2048

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Shared:
    """What two data sets have in common, as far as it was looked at."""

    pairs: list[tuple[int, int]]  # (sample of the first, an equal sample of the second), one a sample of the second
    looked_at: tuple[int, int]  # how many samples of each were compared


def shared_rows(first: Any, second: Any, limit: int = 200_000, *, budget_s: float = _BUDGET_S) -> Shared | None:
    """Find the samples of `second` that are also in `first`.

    Rows of tensors and arrays are equal where all columns are, byte for byte (so nan equals nan); samples of lists and
    of tables where all they hold is; images where the files are, whatever their names. Subsets of any one data set
    share the samples that both select.

    Args:
        first: a data set, train usually.
        second: another, val or test.
        limit: samples of each that are looked at, evenly spread where there are more.
        budget_s: about how long it may take; what does not fit into it is not looked at.

    Returns:
        None where telling would mean reading and decoding the data.
    """
    first, second = _unwrapped(first), _unwrapped(second)
    deadline = time.perf_counter() + budget_s
    columns = columns_of(first), columns_of(second)
    if columns[0] is not None and columns[1] is not None:
        return _of_columns(columns[0], columns[1], limit, int(budget_s * _BYTES_PER_S))
    files = _files(first), _files(second)
    if files[0] is not None and files[1] is not None:
        return _of_files(files[0], files[1], limit, deadline)
    if columns == (None, None) and _in_memory(first) and _in_memory(second):
        return _of_samples(first, second, limit, deadline)
    return _of_one_base(first, second)


def shared_note(sources: Mapping[str, Any]) -> tuple[str, ...]:
    """Lines for the terminal about samples that a recipe's data sets share, none where all is well.

    Args:
        sources: data sets under "train", "val" and "test"; others are not looked at.
    """
    pairs = [(a, b) for a, b in (("train", "val"), ("train", "test"), ("val", "test")) if a in sources and b in sources]
    lines = []
    for a, b in pairs:
        found = shared_rows(sources[a], sources[b], budget_s=_BUDGET_S / len(pairs))
        if found is not None and found.pairs:
            lines.append(_line(found, a, b, sources))
    return tuple(lines)


def _line(found: Shared, a: str, b: str, sources: Mapping[str, Any]) -> str:
    sizes = len_of(sources[a]), len_of(sources[b])
    examples = ", ".join(f"{b} {j} = {a} {i}" for i, j in found.pairs[:2]) + ", ..." * (len(found.pairs) > 2)
    whole = found.looked_at == sizes
    seen = f"; {found.looked_at[0]:,} of {sizes[0]:,} {a} rows were looked at" * (found.looked_at[0] < sizes[0])
    return (
        f"{'' if whole else 'at least '}{len(found.pairs):,} of {found.looked_at[1]:,} {b} rows are also in {a} "
        f"({examples}{seen}): the score on them is no estimate"
    )


def len_of(dataset: Any) -> int:
    """Return the number of samples."""
    columns = columns_of(dataset)
    return columns.num_rows if columns is not None else len(dataset)


def _unwrapped(dataset: Any) -> Any:
    """Return what a wrapper that changes samples, not which they are (a cache, an augmentation), is around."""
    while hasattr(dataset, "__len__") and not isinstance(dataset, Subset):
        inner: Any = getattr(dataset, "dataset", None)
        if not hasattr(inner, "__len__") or len(inner) != len(dataset):
            break
        dataset = inner
    return dataset


def _spread(n: int, count: int) -> Indices:
    """`count` of n positions, evenly spread; all of them where there are no more."""
    return np.arange(n) if n <= count else np.arange(count) * n // count


# ---------------------------------------------------------------- tensors


_Bytes = npt.NDArray[np.uint8]


def _of_columns(first: Columns, second: Columns, limit: int, budget_bytes: int) -> Shared | None:
    if not first.num_rows or not second.num_rows:
        return Shared([], (first.num_rows, second.num_rows))
    layout = _layout(first)
    if layout is None or layout != _layout(second):
        return None  # other features, or encoded in another way
    row_bytes = sum(size for *_, size in layout)
    rows = min(limit, max(1, budget_bytes // sum(min(size, _ROW_BYTES) for *_, size in layout) // 2))
    chosen = _spread(first.num_rows, rows), _spread(second.num_rows, rows)
    a, b = (_hashes(columns, at) for columns, at in zip((first, second), chosen, strict=True))
    order = np.argsort(a, kind="stable")
    start = np.searchsorted(a[order], b)
    match = np.full(len(b), -1, dtype=np.int64)
    seen, most = len(b), max(1, budget_bytes // row_bytes // 2)
    for step in range(4):  # rows of equal hashes that differ are rare
        at = np.minimum(start + step, len(a) - 1)
        open_ = np.flatnonzero((match < 0) & (start + step < len(a)) & (a[order[at]] == b))
        if len(open_) > most:
            seen, open_ = min(seen, int(open_[most])), open_[:most]
        found = chosen[0][order[at[open_]]]
        equal = _equal(first, second, found, chosen[1][open_], row_bytes)
        match[open_[equal]] = found[equal]
    matched = np.flatnonzero(match[:seen] >= 0)
    return Shared(list(zip(match[matched].tolist(), chosen[1][matched].tolist(), strict=True)), (len(a), seen))


def _layout(columns: Columns) -> list[tuple[Any, ...]] | None:
    """(name, type, shape, bytes) of a row's parts; None where they are not plain tensors, or empty."""
    layout = []
    for name, tensor in _tensors(columns):
        if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
            return None
        layout.append((name, tensor.dtype, tensor.shape[1:], tensor.shape[1:].numel() * tensor.element_size()))
    return layout if sum(size for *_, size in layout) else None


def _tensors(columns: Columns) -> list[tuple[Any, torch.Tensor]]:
    """Columns with their names or positions, in an order that does not depend on a dict's."""
    names = columns.tree if isinstance(columns.tree, list) else range(len(columns.tensors))
    return sorted(zip(names, columns.tensors, strict=True), key=lambda column: str(column[0]))


def _bytes(columns: Columns, rows: Indices, cut: bool) -> list[_Bytes]:
    """Rows of every column as bytes, each [m, row bytes]; `cut`: of long rows only runs."""
    index = torch.from_numpy(rows)
    if columns.rows is not None:
        index = columns.rows[index]
    tensors = [tensor for _, tensor in _tensors(columns) if tensor.shape[1:].numel()]
    return [_rows_of(tensor, index.to(tensor.device), cut).view(torch.uint8).numpy() for tensor in tensors]


def _rows_of(tensor: torch.Tensor, index: torch.Tensor, cut: bool) -> torch.Tensor:
    width, size = tensor.shape[1:].numel(), tensor.element_size()
    tensor = tensor.detach()
    if not cut or width * size <= _ROW_BYTES:
        return tensor.index_select(0, index).cpu().reshape(len(index), width).contiguous()
    run = _ROW_BYTES // _RUNS // size
    starts = [(width - run) * i // (_RUNS - 1) for i in range(_RUNS)]
    if tensor.is_contiguous():  # gather the runs, not the rows
        flat = tensor.view(-1, width)
        return torch.cat([flat[:, s : s + run].index_select(0, index) for s in starts], dim=1).cpu()
    flat = tensor.index_select(0, index).reshape(len(index), width)
    return torch.cat([flat[:, s : s + run] for s in starts], dim=1).cpu()


def _hashes(columns: Columns, rows: Indices) -> _Hashes:
    """Hash of each row [m]: a linear one, at the speed of memory; equal hashes are looked into."""
    factors = np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, _ROW_BYTES // 8, dtype=np.uint64) * 2 + 1
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), _CHUNK_ROWS):
        mixed = hashes[start : start + _CHUNK_ROWS]
        for part in _bytes(columns, rows[start : start + _CHUNK_ROWS], cut=True):
            padded = np.pad(part, ((0, 0), (0, -part.shape[1] % 8))) if part.shape[1] % 8 else part
            words = padded.view(np.uint64)
            mixed += np.einsum("ij,j->i", words, factors[: words.shape[1]])
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes


def _equal(first: Columns, second: Columns, rows_a: Indices, rows_b: Indices, row_bytes: int) -> npt.NDArray[np.bool_]:
    """Whether the rows are equal in all columns, byte for byte [m]."""
    equal = np.ones(len(rows_a), dtype=bool)
    size = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes))
    for start in range(0, len(rows_a), size):
        part = slice(start, start + size)
        pairs = zip(_bytes(first, rows_a[part], False), _bytes(second, rows_b[part], False), strict=True)
        for a, b in pairs:
            equal[part] &= (a == b).all(axis=1)
    return equal


# ---------------------------------------------------------------- files


def _files(dataset: Any) -> Sequence[str] | None:
    """Path of every sample's file, where the data set has `samples` as an image folder has."""
    if isinstance(dataset, Subset):
        base = _files(dataset.dataset)
        return None if base is None else _Chosen(base, dataset.indices)
    samples = getattr(dataset, "samples", None)
    try:
        path, _ = samples[0]  # type: ignore[index]
        return _Firsts(samples) if isinstance(path, str) else None  # type: ignore[arg-type]
    except (TypeError, ValueError, IndexError, KeyError):
        return None


class _Firsts(Sequence[str]):
    def __init__(self, samples: Sequence[tuple[str, Any]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        return self._samples[index][0]


class _Chosen(Sequence[str]):
    def __init__(self, base: Sequence[str], indices: Sequence[int]) -> None:
        self._base, self._indices = base, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._base[self._indices[index]]


def _of_files(first: Sequence[str], second: Sequence[str], limit: int, deadline: float) -> Shared:
    """Equal files: of one path, or of one size and content; only files whose sizes collide are read."""
    halfway = (time.perf_counter() + deadline) / 2
    size_b, looked_b = _sizes(second, limit, time.perf_counter() / 2 + halfway / 2)
    by_size: dict[int, list[int]] = {}
    for j, size in size_b.items():
        by_size.setdefault(size, []).append(j)
    size_a, looked_a = _sizes(first, limit, halfway)
    known: dict[str, bytes] = {}
    match: dict[int, int] = {}
    for done, (i, size) in enumerate(size_a.items()):
        if time.perf_counter() > deadline:
            looked_a = done
            break
        for j in by_size.get(size, ()):
            if j not in match and (first[i] == second[j] or _content(first[i], known) == _content(second[j], known)):
                match[j] = i
    return Shared([(match[j], j) for j in sorted(match)], (looked_a, looked_b))


def _sizes(paths: Sequence[str], limit: int, deadline: float) -> tuple[dict[int, int], int]:
    """Size of the files by index, of as many as there is time for; files that are absent have none."""
    sizes: dict[int, int] = {}
    looked = 0
    for i in _spread(len(paths), limit).tolist():
        if looked % 64 == 0 and time.perf_counter() > deadline:
            break
        looked += 1
        with suppress(OSError):  # reading it will say so, and of an empty file too
            sizes[i] = os.stat(paths[i]).st_size
            if not sizes[i]:
                del sizes[i]
    return sizes, looked


def _content(path: str, known: dict[str, bytes]) -> bytes:
    if path not in known:
        try:
            with open(path, "rb") as file:
                known[path] = blake2b(file.read(1 << 24), digest_size=16).digest()
        except OSError:
            known[path] = os.fsencode(path)  # equal to nothing else
    return known[path]


# ---------------------------------------------------------------- samples in memory, subsets


def _in_memory(dataset: Any) -> bool:
    """Whether reading a sample decodes nothing: a list, a subset of one, or stoker's own tables."""
    if isinstance(dataset, Subset):
        return _in_memory(dataset.dataset)
    return type(dataset) in (list, tuple) or callable(getattr(dataset, "columns", None))


def _of_samples(first: Any, second: Any, limit: int, deadline: float) -> Shared | None:
    halfway = (time.perf_counter() + deadline) / 2
    try:
        keys_b = _keys(second, limit, (time.perf_counter() + halfway) / 2)
        wanted = set(keys_b.values())
        where: dict[Any, int] = {}
        keys_a = _keys(first, limit, deadline)
        for i, key in keys_a.items():
            if key in wanted:
                where.setdefault(key, i)
    except TypeError:  # samples of a kind that cannot be compared
        return None
    return Shared([(where[key], j) for j, key in keys_b.items() if key in where], (len(keys_a), len(keys_b)))


def _keys(dataset: Any, limit: int, deadline: float) -> dict[int, Any]:
    keys: dict[int, Any] = {}
    for i in _spread(len(dataset), limit).tolist():
        if len(keys) % 64 == 0 and keys and time.perf_counter() > deadline:
            break
        keys[i] = _key(dataset[i])
    return keys


def _key(sample: Any) -> Any:
    """Something hashable that is equal for equal samples."""
    if sample is None or isinstance(sample, str | bytes | int):
        return type(sample).__name__, sample
    if isinstance(sample, float):
        return "float", np.float64(sample).tobytes()  # nan equals nan
    if isinstance(sample, torch.Tensor):
        data = sample.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(sample.dtype), tuple(sample.shape), blake2b(data, digest_size=16).digest()
    if isinstance(sample, np.ndarray | np.generic) and sample.dtype != object:
        return str(sample.dtype), sample.shape, blake2b(sample.tobytes(), digest_size=16).digest()
    if isinstance(sample, Mapping):
        return "mapping", tuple((name, _key(value)) for name, value in sorted(sample.items()))
    if isinstance(sample, list | tuple):
        return "sequence", tuple(_key(value) for value in sample)
    raise TypeError(type(sample).__name__)


def _of_one_base(first: Any, second: Any) -> Shared | None:
    """Samples that both select from one data set."""
    base_a, rows_a = _selected(first)
    base_b, rows_b = _selected(second)
    if base_a is not base_b:
        return None
    _, at_a, at_b = np.intersect1d(rows_a, rows_b, return_indices=True)
    pairs = sorted(zip(at_a.tolist(), at_b.tolist(), strict=True), key=lambda pair: pair[1])
    return Shared(pairs, (len(rows_a), len(rows_b)))


def _selected(dataset: Any) -> tuple[Any, Indices]:
    if isinstance(dataset, Subset):
        base, rows = _selected(_unwrapped(dataset.dataset))
        return base, rows[np.asarray(dataset.indices, dtype=np.int64)]
    return dataset, np.arange(len(dataset)) if hasattr(dataset, "__len__") else np.arange(0)
