"""Splits: which samples are held out, as a function of the number of samples, the arguments and a seed of their own.

Every split is one assignment of samples to parts. Without groups it is dealt out class by class from a seeded
permutation, with quotas that are exact to one sample; with groups it is greedy, since groups cannot be cut.
"""

import itertools
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, Subset

from stoker.data.order import Indices, permute
from stoker.data.seeding import fold as key_of
from stoker.errors import UserError, nearest

_SPLIT = 0x5B117  # first element of the keys' paths: no run draws from the streams of a split

_Counts = npt.NDArray[np.int64]


def split(
    dataset: Any,
    val: float | int = 0.1,
    test: float | int | None = None,
    *,
    seed: int = 0,
    stratify: Any = None,
    groups: Any = None,
) -> tuple[Any, ...]:
    """Hold out samples at random: `train, val = split(data, 0.1)`, `train, val, test = split(data, 0.1, 500)`.

    Args:
        dataset: a map-style data set, a list, a tensor or array, a tuple or dict of them with one length, or a table.
        val: how much to hold out: a fraction of the samples (0.1) or a count (500).
        test: likewise, for a third part.
        seed: the split's own: another seed of the run leaves the held-out samples held out.
        stratify: one label per sample, a column's name, or True for `dataset.targets`: every class has its share of
            every part, exact to one sample (with `groups`, as near as whole groups allow).
        groups: one value per sample, or a column's name: samples of one group stay in one part. Parts are then as
            large as whole groups allow, dealt out greedily, the larger ones first.

    Returns:
        The train part, then what was held out, each of the dataset's own kind (tensors of tensors, a table of a
        table; a torch Subset of any other data set), its samples in the dataset's order.

    Raises:
        UserError: a part would be empty, labels or groups do not fit the samples, or a class has fewer members (with
            `groups`: is in fewer groups) than there are parts.
    """
    asked = {"val": val} if test is None else {"val": val, "test": test}
    for name, amount in asked.items():
        _check_amount(name, amount)
    parts = _Parts(dataset, partial(_sizes, asked), (*asked, "train"), _integer("seed", seed), stratify, groups)
    train, *held = (_take(dataset, partial(parts.of, i, False)) for i in (len(asked), *range(len(asked))))
    return train, *held


def folds(
    dataset: Any, k: int = 5, fold: int = 0, *, seed: int = 0, stratify: Any = None, groups: Any = None
) -> tuple[Any, Any]:
    """Cross-validation: the samples of fold `fold` of `k` are held out; over all folds, every sample once.

    Args:
        dataset: as `split` takes it.
        k: number of folds, whose sizes differ by one sample at most (with `groups`, by as much as groups force).
        fold: which one is held out, 0 to k-1.
        seed: the split's own.
        stratify: as `split` takes it.
        groups: as `split` takes it.

    Returns:
        (train, val), each of the dataset's own kind.

    Raises:
        UserError: as `split`; and `k` or `fold` out of range.
    """
    if _integer("k", k) < 2:
        raise UserError(f"{k} folds leave nothing to train on", remedy="k=2 or more")
    if not 0 <= _integer("fold", fold) < k:
        raise UserError(f"fold {fold} of {k}: folds are numbered from 0", remedy=f"fold=0 to fold={k - 1}")
    names = tuple(f"fold {i}" for i in range(k))
    parts = _Parts(dataset, partial(_equal_sizes, k), names, _integer("seed", seed), stratify, groups)
    return _take(dataset, partial(parts.of, fold, True)), _take(dataset, partial(parts.of, fold, False))


@dataclass(frozen=True)
class _Parts:
    """An assignment of samples to parts, computed when it is first asked for: a table is not read before."""

    dataset: Any
    sizes: Callable[[int], list[int]]  # number of samples -> samples a part
    names: tuple[str, ...]
    seed: int
    stratify: Any
    groups: Any

    def of(self, part: int, others: bool) -> Indices:
        """Indices of the samples in a part, or of all the others, ascending."""
        return np.flatnonzero((self.part_of == part) != others).astype(np.int64, copy=False)

    @cached_property
    def part_of(self) -> Indices:  # [n]
        n = _num_samples(self.dataset)
        sizes = self.sizes(n)
        key = key_of(self.seed, _SPLIT)
        codes, classes = _labels(self.dataset, self.stratify, "stratify", n)
        if self.groups is None:
            _check_members(np.bincount(codes, minlength=len(classes)), classes, len(sizes), "members")
            return _dealt(codes, len(classes), sizes, key)
        group_of, groups = _labels(self.dataset, self.groups, "groups", n)
        if len(groups) < len(sizes):
            raise UserError(
                f"{len(groups)} group{'s' * (len(groups) != 1)} cannot fill {len(sizes)} parts "
                f"({', '.join(self.names[:3])}{', ...' * (len(sizes) > 3)})",
                why="a group is never divided",
                remedy="use fewer parts, or a finer column for groups=",
            )
        return _grouped(group_of, codes, classes, sizes, key)


# ---------------------------------------------------------------- sizes


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name} must be an integer, got {value!r}")
    return int(value)


def _check_amount(name: str, amount: Any) -> None:
    number = isinstance(amount, int | float | np.integer | np.floating) and not isinstance(amount, bool)
    count = number and isinstance(amount, int | np.integer)
    if not number or not (amount >= 1 if count else 0 < amount < 1):
        raise UserError(
            f"{name}={amount!r} is neither a fraction of the samples nor a count of them",
            remedy=f"{name}=0.1 holds out a tenth, {name}=500 holds out 500 samples",
        )


def _sizes(asked: Mapping[str, Any], n: int) -> list[int]:
    """Samples of each part asked for, and of what is left; a fraction is rounded to the nearest count, half up."""
    sizes = []
    for name, amount in asked.items():
        size = int(amount)
        if not isinstance(amount, int | np.integer):  # 0.7 of 10 is 7: the decimal is meant, not its nearest double
            size = int(Fraction(repr(float(amount))) * n + Fraction(1, 2))
        if size == 0:
            raise UserError(f"{name}={amount} of {n} samples is none", remedy=f"{name}=1 or more holds out a count")
        sizes.append(size)
    rest = n - sum(sizes)
    if rest < 1:
        parts = " and ".join(f"{name}={amount}" for name, amount in asked.items())
        raise UserError(f"{parts} of {n} samples leave none to train on", remedy="hold out fewer")
    return [*sizes, rest]


def _equal_sizes(k: int, n: int) -> list[int]:
    if k > n:
        raise UserError(f"{n} samples cannot fill {k} folds", remedy=f"k={n} or less" if n > 1 else "give more samples")
    return [n // k + (i < n % k) for i in range(k)]


# ---------------------------------------------------------------- labels


def _labels(dataset: Any, given: Any, name: str, n: int) -> tuple[Indices, list[Any]]:
    """Class of every sample as a number (in the order in which they first occur), and the classes."""
    if given is None:
        return np.zeros(n, dtype=np.int64), [None]
    values = _values(dataset, given, name)
    if isinstance(values, str | bytes) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
        raise UserError(f"{name}= is a {type(values).__name__}, not one value per sample")
    if len(values) != n:
        raise UserError(f"{name}= has {len(values)} values for {n} samples", remedy="give one value per sample")
    found: dict[Any, int] = {}
    try:
        codes = np.fromiter((found.setdefault(v, len(found)) for v in _plain(values, name)), np.int64, n)
    except TypeError as error:
        raise UserError(
            f"{name}= has values that cannot be told apart: {error}", remedy="give one number or string per sample"
        ) from error
    for value in found:
        if (isinstance(value, float) and value != value) or (value is None and name == "groups"):
            sample = int(np.flatnonzero(codes == found[value])[0])
            raise UserError(
                f"{name}= is {value} at sample {sample}",
                why="a missing value says nothing about where the sample belongs",
                remedy="give these samples a value, or leave them out of the data",
            )
    return codes, list(found)


def _values(dataset: Any, given: Any, name: str) -> Any:
    if given is True:
        found = targets_of(dataset)
        if found is None:
            raise UserError(
                f"{name}=True, but a {type(dataset).__name__} has no attribute targets",
                remedy=f"{name}=labels, one per sample",
            )
        return found
    if not isinstance(given, str):
        return given
    try:
        return dataset[given]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        columns = [str(key) for key in dataset] if isinstance(dataset, Mapping) else []
        raise UserError(
            f"{name}={given!r} names no column of this {type(dataset).__name__}{nearest(given, columns)}",
            remedy=f"{name}=values, one per sample",
        ) from error


def targets_of(dataset: Any) -> Any:
    """One label per sample where the data set, or the one that a Subset is of, has `targets`; else None."""
    if isinstance(dataset, Subset):
        base = targets_of(dataset.dataset)
        if base is None:
            return None
        return base[np.asarray(dataset.indices)] if hasattr(base, "shape") else [base[i] for i in dataset.indices]
    return getattr(dataset, "targets", None)


def _plain(values: Any, name: str) -> Iterable[Any]:
    """Labels as Python values: tensors and arrays of one number are unequal to one another as keys."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if hasattr(values, "to_numpy"):  # pandas
        values = values.to_numpy()
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise UserError(
                f"{name}= has shape {list(values.shape)}", remedy=f"give one value per sample: [{values.shape[0]}]"
            )
        return values.tolist()  # type: ignore[no-any-return]
    return (_one(value, name) for value in values)


def _one(value: Any, name: str) -> Any:
    shape = getattr(value, "shape", None)
    if shape:
        raise UserError(f"{name}= holds {list(shape)} values for one sample", remedy="give one value per sample")
    return value if shape is None else value.item()


def _check_members(counts: _Counts, classes: list[Any], parts: int, unit: str) -> None:
    rare = np.flatnonzero(counts < parts)
    if classes == [None] or not len(rare):
        return
    named = ", ".join(f"{classes[c]!r} has {counts[c]}" for c in rare[:3]) + f" and {len(rare) - 3} more" * (
        len(rare) > 3
    )
    numbers = all(isinstance(c, float) for c in classes)
    raise UserError(
        f"stratify= needs at least {parts} {unit} of every class, one a part: {named}",
        why="these values look like measurements, not classes" if numbers else "",
        remedy="give the bin that each falls into, np.digitize(values, edges)"
        if numbers
        else "merge the rare classes in what stratify= is given, or leave stratify= out",
    )


# ---------------------------------------------------------------- assignment


def _dealt(codes: Indices, num_classes: int, sizes: list[int], key: int) -> Indices:
    """Part of every sample [n]: each class is dealt out in a seeded order, by quota."""
    n = len(codes)
    shuffled = permute(np.arange(n, dtype=np.int64), n, key)
    order = shuffled[np.argsort(codes[shuffled], kind="stable")] if num_classes > 1 else shuffled
    quotas = _quotas(np.bincount(codes, minlength=num_classes), sizes, key)
    parts = np.empty(n, dtype=np.int64)
    parts[order] = np.repeat(np.tile(np.arange(len(sizes)), num_classes), quotas.T.ravel())
    return parts


def _quotas(counts: _Counts, sizes: list[int], key: int) -> _Counts:
    """Samples of each class in each part [P, C]: every entry the exact share rounded up or down, sums as given.

    Controlled rounding: classes are visited in a seeded order, and what each has over goes to the parts that are owed
    most. That the sums come out is seen in every trial, not proven: should they not, another order is tried.
    """
    n, num_classes = int(counts.sum()), len(counts)
    exact = np.outer(np.asarray(sizes, dtype=np.int64), counts)  # in n-ths of a sample
    for attempt in itertools.count(1):
        quotas, over = exact // n, exact % n
        owed = np.zeros(len(sizes), dtype=np.int64)
        for c in permute(np.arange(num_classes, dtype=np.int64), num_classes, key_of(key, 1, attempt)):
            owed += over[:, c]
            extras = int(over[:, c].sum()) // n
            candidates = np.flatnonzero(over[:, c])
            chosen = candidates[np.argsort(-owed[candidates], kind="stable")[:extras]]
            quotas[chosen, c] += 1
            owed[chosen] -= n
        if not owed.any():
            break
    return quotas


def _grouped(group_of: Indices, codes: Indices, classes: list[Any], sizes: list[int], key: int) -> Indices:
    """Part of every sample [n], a group in one part.

    Groups are placed one by one where they bring sizes and classes nearest to the exact shares (least chi-square).
    Larger ones come first, in octaves: within a factor of two the order is the seed's, so that it matters which seed.
    """
    num_classes, num_groups, num_parts = len(classes), int(group_of.max()) + 1, len(sizes)
    held, entries = np.unique(group_of * num_classes + codes, return_counts=True)
    _check_members(np.bincount(held % num_classes, minlength=num_classes), classes, num_parts, "groups with a member")
    bounds = np.searchsorted(held, np.arange(num_groups + 1) * num_classes)
    group_sizes = np.bincount(group_of, minlength=num_groups)
    shuffled = permute(np.arange(num_groups, dtype=np.int64), num_groups, key_of(key, 2))
    order = shuffled[np.argsort(-np.frexp(group_sizes[shuffled])[1], kind="stable")]

    totals = np.append(np.bincount(codes, minlength=num_classes), len(codes))  # the last column is the parts' sizes
    wanted = np.outer(np.asarray(sizes) / len(codes), totals)  # [P, C+1]
    missing = wanted.copy()
    empty = np.ones(num_parts, dtype=bool)
    part_of_group = np.empty(num_groups, dtype=np.int64)
    for left, group in zip(range(num_groups, 0, -1), order, strict=True):
        mine = slice(bounds[group], bounds[group + 1])
        columns = np.append(held[mine] % num_classes, num_classes)
        adds = np.append(entries[mine], group_sizes[group])
        change = (adds * (adds - 2 * missing[:, columns]) / wanted[:, columns]).sum(1).round(6)  # ties stay ties
        part = int(np.argmin(np.where(empty, change, np.inf) if left == empty.sum() else change))
        part_of_group[group], empty[part] = part, False
        missing[part, columns] -= adds
    return part_of_group[group_of]


# ---------------------------------------------------------------- samples


def _num_samples(dataset: Any) -> int:
    if isinstance(dataset, Mapping) or _is_columns(dataset):
        columns = dict(dataset) if isinstance(dataset, Mapping) else dict(enumerate(dataset))
        lengths = {name: len(column) for name, column in columns.items() if hasattr(column, "__len__")}
        if len(lengths) < len(columns) or not lengths:
            raise UserError("a dict of columns has one tensor, array or list a column, each with one row per sample")
        if len(set(lengths.values())) > 1:
            raise UserError(
                "the columns have different lengths: " + ", ".join(f"{k!r} {n}" for k, n in lengths.items()),
                remedy="give columns whose first dimension is the sample",
            )
        n = next(iter(lengths.values()))
    else:
        n = len(dataset)
    if n == 0:
        raise UserError("there are no samples to split", remedy="check what the data set is built from")
    return n


def _is_columns(dataset: Any) -> bool:
    """Whether a tuple is one of tensors and arrays with a row per sample, as Loader takes it."""
    kinds = torch.Tensor | np.ndarray
    return isinstance(dataset, tuple) and bool(dataset) and all(isinstance(c, kinds) and c.ndim for c in dataset)


def _take(dataset: Any, select: Callable[[], Indices]) -> Any:
    """Return the samples that are selected, as the kind of thing that the dataset is."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "batch_size"):  # stoker's loader or torch's
        raise UserError(
            f"split got a {type(dataset).__name__}", remedy="split its data set, then make a Loader of each"
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UserError(
            f"a {type(dataset).__name__} has no length and cannot be split",
            remedy="split what it reads from, a list of its files say, and make a data set of each part",
        )
    if hasattr(dataset, "subset"):
        return dataset.subset(select if getattr(dataset, "lazy", False) is True else select())
    indices = select()
    if isinstance(dataset, Mapping):
        taken = {name: _rows(column, indices) for name, column in dataset.items()}
        return taken if type(dataset) is dict else type(dataset)(taken)  # type: ignore[call-arg]
    if _is_columns(dataset):
        parts = [_rows(column, indices) for column in dataset]
        return type(dataset)(*parts) if hasattr(dataset, "_fields") else tuple(parts)
    return _rows(dataset, indices)


def _rows(data: Any, indices: Indices) -> Any:
    if isinstance(data, torch.Tensor):
        if not data.ndim:
            raise UserError("a tensor without dimensions cannot be split")
        return data.index_select(0, torch.from_numpy(indices).to(data.device))
    if isinstance(data, np.ndarray):
        return data[indices]
    if hasattr(data, "iloc"):  # pandas
        return data.iloc[indices]
    if type(data) in (list, tuple):
        return type(data)(data[i] for i in indices.tolist())
    if type(data) is Subset:
        return Subset(data.dataset, array("q", (int(data.indices[i]) for i in indices.tolist())))
    return Subset(data, array("q", indices.tobytes()))  # Python ints when read, 8 bytes each: workers do not copy them
