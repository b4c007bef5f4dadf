"""Data order as arithmetic: the sample at position p of epoch e is a function of (seed, e, p).

No order keeps iterator state, so any position is reached in O(1) for the orders that can be computed position by
position (sequential, shuffled, with replacement, weighted), and in one pass over the indices, never over the data,
for those that cannot (weighted without replacement, a user's own sampler).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from stoker.data.seeding import ORDER, fold, isolated, seed_all
from stoker.errors import UserError

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_FEISTEL_ROUNDS = 16  # fewer leave some orders of 5 or 6 samples likelier than others


def _scramble(words: _Words, key: int) -> _Words:
    """One SplitMix64 output per 64-bit word."""
    z = (words ^ np.uint64(key)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(positions: Indices, n: int, key: int) -> Indices:
    """Images of `positions` (any shape, values in [0, n)) under a pseudo-random permutation of range(n).

    A generalised Feistel network over Z_a x Z_b, a*b >= n, with cycle walking (Black & Rogaway, "Ciphers with
    arbitrary finite domains", 2002). a*b exceeds n by less than sqrt(n)+1, so a second walk is rare.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    a_, b_, half = np.uint64(a), np.uint64(b), np.uint64(32)
    keys = [fold(key, i) for i in range(_FEISTEL_ROUNDS)]

    def walk(x: _Words) -> _Words:
        left, right = x // b_, x % b_
        for i in range(0, _FEISTEL_ROUNDS, 2):
            left = (left + (_scramble(right, keys[i]) >> half)) % a_
            right = (right + (_scramble(left, keys[i + 1]) >> half)) % b_
        return left * b_ + right

    out = walk(positions.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = walk(out[outside])
    return out.astype(np.int64)


def uniform(positions: Indices, key: int) -> npt.NDArray[np.float64]:
    """Independent draws from [0, 1), one per position, 53 bits each."""
    words = _scramble(positions.astype(np.uint64), key) >> np.uint64(11)
    return words.astype(np.float64) * 2.0**-53


class Order(Protocol):
    """An epoch's sequence of sample indices."""

    def length(self, seed: int, epoch: int) -> int:
        """Return the number of samples in the epoch."""
        ...

    def take(self, seed: int, epoch: int, start: int, stop: int) -> Indices:
        """Return the sample indices at positions [start, stop) of the epoch."""
        ...


@dataclass(frozen=True)
class Sequential:
    """0, 1, 2, ... n-1, or `indices` in their order."""

    n: int

    def length(self, seed: int, epoch: int) -> int:
        return self.n

    def take(self, seed: int, epoch: int, start: int, stop: int) -> Indices:
        return np.arange(start, stop, dtype=np.int64)


@dataclass(frozen=True)
class Shuffled:
    """A fresh permutation of range(n) every epoch, cut off after `num_samples`."""

    n: int
    num_samples: int

    def length(self, seed: int, epoch: int) -> int:
        return self.num_samples

    def take(self, seed: int, epoch: int, start: int, stop: int) -> Indices:
        return permute(np.arange(start, stop, dtype=np.int64), self.n, fold(seed, ORDER, epoch))


@dataclass(frozen=True)
class Among:
    """Another order over positions in `indices` (torch's SubsetRandomSampler)."""

    indices: Indices
    order: Order

    def length(self, seed: int, epoch: int) -> int:
        return self.order.length(seed, epoch)

    def take(self, seed: int, epoch: int, start: int, stop: int) -> Indices:
        return self.indices[self.order.take(seed, epoch, start, stop)]


@dataclass(frozen=True)
class Weighted:
    """Draws with replacement, index i with probability weights[i] / sum(weights)."""

    weights: npt.NDArray[np.float64]
    num_samples: int
    _cumulative: npt.NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        cumulative = np.cumsum(self.weights)
        object.__setattr__(self, "_cumulative", cumulative / cumulative[-1])

    def length(self, seed: int, epoch: int) -> int:
        return self.num_samples

    def take(self, seed: int, epoch: int, start: int, stop: int) -> Indices:
        draws = uniform(np.arange(start, stop, dtype=np.int64), fold(seed, ORDER, epoch))
        return np.searchsorted(self._cumulative, draws, side="right").astype(np.int64)


@dataclass(frozen=True)
class Listed:
    """An order that can only be computed for a whole epoch at once."""

    epoch: Callable[[int, int], Indices]  # (seed, epoch) -> the epoch's indices

    def length(self, seed: int, epoch: int) -> int:
        return len(self.epoch(seed, epoch))

    def take(self, seed: int, epoch: int, start: int, stop: int) -> Indices:
        return self.epoch(seed, epoch)[start:stop]


def _without_replacement(weights: npt.NDArray[np.float64], num_samples: int, seed: int, epoch: int) -> Indices:
    """Distinct indices, drawn one after the other in proportion to the weights that are left.

    Exponential keys: Efraimidis & Spirakis, "Weighted random sampling with a reservoir", 2006.
    """
    u = uniform(np.arange(len(weights), dtype=np.int64), fold(seed, ORDER, epoch))
    with np.errstate(divide="ignore"):
        keys = np.log(u) / weights  # a weight of 0 gives -inf: never among the first num_samples
    return np.argsort(-keys, kind="stable")[:num_samples].astype(np.int64)


def _sampled(sampler: Iterable[Any], seed: int, epoch: int) -> Indices:
    return np.asarray([int(i) for i in run_sampler(sampler, seed, epoch)], dtype=np.int64)


def _batch_sampled(sampler: Iterable[Any], seed: int, epoch: int) -> list[Indices]:
    return [np.asarray(batch, dtype=np.int64) for batch in run_sampler(sampler, seed, epoch)]


def run_sampler(sampler: Iterable[Any], seed: int, epoch: int) -> list[Any]:
    """Everything a sampler yields in an epoch, as a function of (seed, epoch)."""
    key = fold(seed, ORDER, epoch)
    parts: list[Any] = [sampler, getattr(sampler, "sampler", None)]  # a batch sampler has one of its own inside
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        if isinstance(getattr(part, "generator", None), torch.Generator):
            part.generator.manual_seed(key)
    with isolated():
        seed_all(key)
        return list(sampler)


class Batches(Protocol):
    """An epoch's sequence of batches of sample indices."""

    def count(self, seed: int, epoch: int) -> int:
        """Return the number of batches in the epoch."""
        ...

    def take(self, seed: int, epoch: int, start: int, stop: int) -> list[Indices]:
        """Return the batches [start, stop) of the epoch."""
        ...


@dataclass(frozen=True)
class Chunked:
    """An order cut into batches of `batch_size`; the last one may be smaller unless `drop_last`."""

    order: Order
    batch_size: int
    drop_last: bool

    def count(self, seed: int, epoch: int) -> int:
        whole, rest = divmod(self.order.length(seed, epoch), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def take(self, seed: int, epoch: int, start: int, stop: int) -> list[Indices]:
        size = self.batch_size
        first, last = start * size, min(stop * size, self.order.length(seed, epoch))
        flat = self.order.take(seed, epoch, first, last)
        return [flat[i : i + size] for i in range(0, len(flat), size)]


@dataclass(frozen=True)
class ListedBatches:
    """Batches as a user's own batch sampler yields them."""

    epoch: Callable[[int, int], list[Indices]]  # (seed, epoch) -> the epoch's batches

    def count(self, seed: int, epoch: int) -> int:
        return len(self.epoch(seed, epoch))

    def take(self, seed: int, epoch: int, start: int, stop: int) -> list[Indices]:
        return self.epoch(seed, epoch)[start:stop]


def batches_of_sampler(sampler: Iterable[Any]) -> Batches:
    """Batches of a user's batch sampler, which is run once an epoch."""
    return ListedBatches(lru_cache(maxsize=1)(partial(_batch_sampled, sampler)))


def weighted(weights: Any, num_samples: int, replacement: bool) -> Order:
    """Order that draws indices in proportion to `weights` (n non-negative numbers, not all zero)."""
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise UserError(
            f"weights must be a row of non-negative numbers with a positive sum, got shape {w.shape}",
            remedy="give one finite weight >= 0 per sample",
        )
    if replacement:
        return Weighted(w, num_samples)
    drawable = int((w > 0).sum())
    if num_samples > drawable:
        raise UserError(
            f"{num_samples} samples asked for without replacement, but only {drawable} have a weight above 0",
            remedy="sample with replacement, or ask for fewer",
        )
    return Listed(lru_cache(maxsize=1)(partial(_without_replacement, w, num_samples)))


def once(order: Order) -> Order:
    """Every sample that an order draws from, once, in the data's own order; a user's own sampler as it is."""
    if isinstance(order, Among):
        return Among(order.indices, once(order.order))
    if isinstance(order, Shuffled):
        return Sequential(order.n)
    return Sequential(len(order.weights)) if isinstance(order, Weighted) else order


def order_of_sampler(sampler: Any, n: int) -> Order:
    """Arithmetic order equivalent to one of torch's own samplers; any other sampler is run once an epoch."""
    from torch.utils.data import sampler as torch_samplers
    from torch.utils.data.distributed import DistributedSampler

    kind = type(sampler)
    if kind is torch_samplers.SequentialSampler:
        return Sequential(len(sampler))
    if kind is torch_samplers.RandomSampler:
        if sampler.replacement:
            return Weighted(np.ones(n), sampler.num_samples)
        if sampler.num_samples <= n:
            return Shuffled(n, sampler.num_samples)
    if kind is torch_samplers.SubsetRandomSampler:
        indices = np.asarray(sampler.indices, dtype=np.int64)
        return Among(indices, Shuffled(len(indices), len(indices)))
    if kind is torch_samplers.WeightedRandomSampler:
        return weighted(sampler.weights, sampler.num_samples, sampler.replacement)
    if kind is DistributedSampler:  # sharding is the plan's business: keep the order, drop the shard
        return Shuffled(n, n) if sampler.shuffle else Sequential(n)
    return Listed(lru_cache(maxsize=1)(partial(_sampled, sampler)))
