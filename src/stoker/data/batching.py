"""Batches that are not just an order cut into pieces: of similar lengths, one rank's part, and balanced classes."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stoker.data.order import Batches, Indices, Order, Sequential, Shuffled, permute, weighted
from stoker.data.seeding import ORDER, fold
from stoker.errors import UserError

_WINDOWS_KEPT = 4  # blocks of batches are asked for one after the other: a window is computed once


@dataclass(frozen=True, eq=False)
class Bucketed:
    """Batches of samples of similar length, every sample once.

    The epoch's order is cut into windows of `window_batches` batches; a window is sorted by length (what came first
    stays first among equals) and cut into batches, whose order is shuffled. So a batch is a function of its window
    alone. The epoch's last batch is the smaller one, if any is; with `drop_last`, what would be in it is left out
    before anything is sorted, so that no length is likelier to be dropped.

    Args:
        lengths: one integer per sample (any array-like; a memory map is not read as a whole).
        batch_size: samples a batch.
        shuffle: order the samples anew every epoch (else the windows are those of the data's own order).
        drop_last: leave out what does not fill a batch.
        window_batches: batches per window: more save more padding, and leave less chance to what meets in a batch.

    Raises:
        UserError: lengths that are no row of integers.
    """

    lengths: Any
    batch_size: int
    shuffle: bool
    drop_last: bool
    window_batches: int = 100
    _order: Order = field(init=False, repr=False)
    _windows: dict[tuple[int, int, int], list[Indices]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        lengths = np.asanyarray(self.lengths)
        if lengths.ndim != 1 or (lengths.dtype.kind not in "iu" and len(lengths)):
            raise UserError(
                f"lengths must be one integer per sample, got shape {lengths.shape} of {lengths.dtype}",
                remedy="lengths=[len(tokens) for tokens in ...]",
            )
        if self.batch_size < 1 or self.window_batches < 1:
            raise UserError(f"batch_size ({self.batch_size}) and window_batches must be at least 1")
        n = len(lengths)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "_order", Shuffled(n, n) if self.shuffle else Sequential(n))

    def count(self, seed: int, epoch: int) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def take(self, seed: int, epoch: int, start: int, stop: int) -> list[Indices]:
        size = self.window_batches
        stop = min(stop, self.count(seed, epoch))
        found: list[Indices] = []
        for window in range(start // size, -(-stop // size)):
            first = window * size
            found += self._window(seed, epoch, window)[max(start - first, 0) : stop - first]
        return found

    def _window(self, seed: int, epoch: int, window: int) -> list[Indices]:
        key = seed, epoch, window
        found = self._windows.get(key)
        if found is None:
            found = self._sorted(*key)
            while len(self._windows) >= _WINDOWS_KEPT:
                self._windows.pop(next(iter(self._windows)), None)
            self._windows[key] = found
        return found

    def _sorted(self, seed: int, epoch: int, window: int) -> list[Indices]:
        size, n = self.batch_size, len(self.lengths)
        first = window * self.window_batches * size
        last = min(first + self.window_batches * size, n - n % size if self.drop_last else n)
        indices = self._order.take(seed, epoch, first, last)
        indices = indices[np.argsort(np.asarray(self.lengths[indices]), kind="stable")]
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        whole = len(indices) // size
        if not self.shuffle or whole < 2:
            return batches
        places = permute(np.arange(whole, dtype=np.int64), whole, fold(seed, ORDER, epoch, window))
        return [batches[place] for place in places] + batches[whole:]


@dataclass(frozen=True)
class Sharded:
    """Rank `rank`'s part of every global batch: all ranks' parts, in their order, are the batch.

    Parts differ by one sample at most; of a batch smaller than `ranks`, some are empty.
    """

    batches: Batches
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise UserError(f"rank {self.rank} of {self.ranks} ranks", why="ranks count from 0")

    def count(self, seed: int, epoch: int) -> int:
        return self.batches.count(seed, epoch)

    def take(self, seed: int, epoch: int, start: int, stop: int) -> list[Indices]:
        rank, ranks = self.rank, self.ranks
        whole = self.batches.take(seed, epoch, start, stop)
        return [batch[rank * len(batch) // ranks : (rank + 1) * len(batch) // ranks] for batch in whole]


def balanced(labels: Any, num_samples: int | None = None) -> Order:
    """Order that draws every class alike often, with replacement.

    Args:
        labels: one class per sample, integers or strings; a class is whatever occurs.
        num_samples: draws an epoch (default: as many as there are samples).

    Raises:
        UserError: labels that are no classes.
    """
    weights = _inverse_counts(labels)
    if num_samples is not None and num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}")
    return weighted(weights, len(weights) if num_samples is None else num_samples, replacement=True)


def _inverse_counts(labels: Any) -> npt.NDArray[np.float64]:
    """1 / (number of samples of the same class), one per sample."""
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu().numpy()
    elif not isinstance(labels, np.ndarray):  # numpy would make strings of a mixture
        labels = [label.item() if isinstance(label, torch.Tensor | np.generic) else label for label in labels]
        array = np.empty(len(labels), dtype=object)
        array[:] = labels
        labels = array
    if labels.ndim != 1 or not len(labels):
        hint = "labels.argmax(1), where a row is one-hot" if labels.ndim == 2 else "give one label per sample"
        raise UserError(f"labels must be one class per sample, got shape {labels.shape}", remedy=hint)
    if labels.dtype.kind in "biuUS":
        _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        return np.asarray(1.0 / counts[inverse])
    odd = next((i for i, label in enumerate(labels) if not isinstance(label, int | str | np.integer)), None)
    if odd is not None:
        raise UserError(
            f"label {odd} is {labels[odd]!r}, which is no class",
            why="classes are integers or strings; with other values, every sample might be one of its own",
            remedy="encode what is to be balanced as integers, missing ones too",
        )
    occurrences = Counter(labels.tolist())
    return np.asarray([1.0 / occurrences[label] for label in labels])
