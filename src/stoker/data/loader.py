"""Loader: what the recipe says about data. Feed: how a run draws batches from it, starting at any step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from stoker.data.feeds import Feed, IterableFeed, SampleFeed, TensorFeed, WholeFeed, WorkerFeed
from stoker.data.order import (
    Batches,
    Chunked,
    Listed,
    ListedBatches,
    Order,
    Sequential,
    Shuffled,
    batches_of_sampler,
    once,
    order_of_sampler,
    weighted,
)
from stoker.errors import UserError


class Sized(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Loader:
    """A dataset, its order and its global batch size.

    Args:
        dataset: any torch map-style or iterable Dataset, any sequence of samples, or plain tensors / arrays (a
            tensor, a tuple or a dict of them with one length): those are fetched a batch at a time.
        batch_size: samples per optimizer step over all devices. A `val` or `test` loader takes the train loader's.
        shuffle: a fresh permutation every epoch, a function of (seed, epoch).
        weights: one number per sample: draw len(dataset) samples with replacement in proportion to them.
        sampler: any torch Sampler or iterable of indices. Run once an epoch, its generators keyed by (seed, epoch).
        batch_sampler: likewise, yielding lists of indices; then `batch_size` and `drop_last` are its own.
        drop_last: leave out an epoch's last batch where it is smaller than the others.
        collate: list of samples -> batch (default: torch's default_collate).

    Raises:
        UserError: the arguments contradict one another, or do not fit the dataset.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        weights: Any = None,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[Any] | None = None,
        drop_last: bool = False,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        given = [
            name
            for name, value in {
                "shuffle": shuffle,
                "weights": weights is not None,
                "sampler": sampler is not None,
                "batch_sampler": batch_sampler is not None,
            }.items()
            if value
        ]
        if len(given) > 1:
            raise UserError(f"Loader got {' and '.join(given)}", remedy="each decides the order: give one of them")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(dataset, DataLoader):
            raise UserError(
                "Loader got a torch DataLoader",
                why="its order lives in an iterator that cannot be resumed",
                remedy="give its dataset: Loader(dataloader.dataset, batch_size, shuffle=True)",
            )
        self.dataset, self.batch_size, self.drop_last, self.collate = dataset, batch_size, drop_last, collate
        self._shuffle, self._weights, self._sampler, self._batch_sampler = (
            shuffle,
            weights,
            sampler,
            batch_sampler,
        )
        self.columns = None if collate else columns_of(dataset)
        self.iterable = self.columns is None and isinstance(dataset, IterableDataset)
        if self.iterable and given:
            raise UserError(f"{given[0]} does not apply to an IterableDataset", why="it decides its own order")
        if not self.iterable and self.columns is None and not hasattr(dataset, "__len__"):
            raise UserError(
                f"a {type(dataset).__name__} has no length",
                remedy="give it __len__ and __getitem__, or derive it from torch's IterableDataset",
            )
        self._cache: dict[tuple[int | None, bool], Batches] = {}

    def __len__(self) -> int:
        """Return the number of samples in the dataset (map-style and tensors)."""
        if self.columns is not None:
            return self.columns.num_rows
        if self.iterable:
            raise UserError(f"a {type(self.dataset).__name__} has no length")
        return len(self.dataset)

    @property
    def batches_itself(self) -> bool:
        """Whether a batch sampler decides the batches."""
        return self._batch_sampler is not None

    @property
    def varies(self) -> bool:
        """Whether only running the user's own sampler tells how many batches an epoch has."""
        plan = self.plan() if not self.iterable else None
        return isinstance(plan, ListedBatches) or (isinstance(plan, Chunked) and isinstance(plan.order, Listed))

    def plan(self, batch_size: int | None = None, *, evaluation: bool = False) -> Batches:
        """Batches of indices, with `batch_size` where the loader names none.

        For an evaluation, `batch_size` comes first, and every sample comes once: drop_last, shuffle and weights are
        the training's.
        """
        key = batch_size, evaluation
        if key not in self._cache:
            self._cache[key] = self._plan(batch_size, evaluation)
        return self._cache[key]

    def _plan(self, batch_size: int | None, evaluation: bool) -> Batches:
        if self._batch_sampler is not None:
            return batches_of_sampler(self._batch_sampler)
        n, size = len(self), (batch_size or self.batch_size if evaluation else self.batch_size or batch_size)
        if size is None:
            raise UserError("the loader has no batch size", remedy="stoker.Loader(dataset, 32, ...)")
        order: Order
        if self._weights is not None:
            if len(self._weights) != n:
                raise UserError(f"{len(self._weights)} weights for {n} samples", remedy="give one weight per sample")
            order = weighted(self._weights, n, replacement=True)
        elif self._sampler is not None:
            order = order_of_sampler(self._sampler, n)
        else:
            order = Shuffled(n, n) if self._shuffle else Sequential(n)
        return Chunked(once(order), size, False) if evaluation else Chunked(order, size, self.drop_last)

    def batches(self, seed: int, epoch: int) -> list[list[int]]:
        """Sample indices of every batch of an epoch, in the order in which a run with this seed trains on them."""
        plan = self.plan()
        return [batch.tolist() for batch in plan.take(seed, epoch, 0, plan.count(seed, epoch))]

    def indices(self, seed: int, epoch: int) -> list[int]:
        """Sample indices of an epoch in order."""
        return [index for batch in self.batches(seed, epoch) for index in batch]

    def feed(
        self,
        seed: int,
        *,
        batch_size: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        evaluation: bool = False,
    ) -> Feed:
        """Open the data for a run. An evaluation feed repeats epoch 0, so that evaluations are comparable."""
        collate = self.collate or default_collate
        if self.iterable:
            return IterableFeed(self.dataset, self.batch_size or batch_size or 1, self.drop_last, collate, seed)
        plan = self.plan(batch_size, evaluation=evaluation)
        if self.columns is not None:
            return TensorFeed(self.columns, plan, seed)
        if workers == 0:
            return SampleFeed(self.dataset, plan, collate, seed)
        return WorkerFeed(self.dataset, plan, collate, seed, workers, pin_memory=pin_memory, repeat=evaluation)


class Columns:
    """Tensors in memory with one row per sample: a batch is one gather, not a thousand ``__getitem__`` calls."""

    def __init__(self, tree: Any, tensors: list[torch.Tensor], rows: torch.Tensor | None = None) -> None:
        self._tree, self._tensors, self._rows = tree, tensors, rows
        self.num_rows = len(rows) if rows is not None else tensors[0].shape[0]
        self._devices = {tensor.device for tensor in tensors} - {torch.device("cpu")}

    def take(self, indices: torch.Tensor) -> Any:
        """Gather rows, as the tree the dataset was given in."""
        if self._rows is not None:
            indices = self._rows.index_select(0, indices)
        if self._devices:
            gathered = [tensor.index_select(0, indices.to(tensor.device)) for tensor in self._tensors]
        else:
            gathered = [tensor.index_select(0, indices) for tensor in self._tensors]
        if self._tree is tuple:
            return gathered  # a list, as default_collate makes of tuples
        if self._tree is None:
            return gathered[0]
        return dict(zip(self._tree, gathered, strict=True))

    def at(self, rows: list[int]) -> "Columns":
        """View of a subset of the rows."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return Columns(self._tree, self._tensors, index if self._rows is None else self._rows[index])


def columns_of(dataset: Any) -> Columns | None:
    """Columns of a TensorDataset, of a Subset of one, or of plain tensors and arrays; None for anything else."""
    if type(dataset) is TensorDataset:
        return Columns(tuple, list(dataset.tensors))
    if type(dataset) is Subset:
        base = columns_of(dataset.dataset)
        return base.at(list(dataset.indices)) if base is not None else None
    if isinstance(dataset, Dataset):
        return None
    tree: Any
    if isinstance(dataset, torch.Tensor | np.ndarray):
        tree, values = None, [dataset]
    elif isinstance(dataset, tuple) and dataset:
        tree, values = tuple, list(dataset)
    elif isinstance(dataset, Mapping) and dataset:
        tree, values = list(dataset), list(dataset.values())
    else:
        return None
    if not all(isinstance(value, torch.Tensor | np.ndarray) and value.ndim for value in values):
        return None
    tensors = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]
    lengths = {tensor.shape[0] for tensor in tensors}
    if len(lengths) > 1:
        raise UserError(
            f"the columns of a Loader have different lengths: {sorted(lengths)}",
            remedy="give tensors whose first dimension is the sample",
        )
    return Columns(tree, tensors)


def open_feed(source: Any, seed: int, **options: Any) -> Feed:
    """Feed of a Loader, or of an object that is itself the one batch of every epoch (a graph, say)."""
    return source.feed(seed, **options) if isinstance(source, Loader) else WholeFeed(source)


def check_source(source: Any, name: str, *, batch_size: int | None = None) -> None:
    """Refuse data that cannot be trained or evaluated on, naming the recipe's field.

    Raises:
        UserError: not a Loader, empty, or with fewer samples than the batch size.
    """
    if isinstance(source, DataLoader | Dataset):
        size = f", {source.batch_size}" if isinstance(source, DataLoader) else ", 32"
        inner = "dataloader.dataset" if isinstance(source, DataLoader) else "dataset"
        raise UserError(
            f"{name}= is a torch {type(source).__name__}",
            why="the order of samples must be a function of (seed, epoch, position) to be resumed exactly",
            remedy=f"{name}=stoker.Loader({inner}{size}, shuffle=True)",
        )
    if not isinstance(source, Loader) or source.iterable:
        return
    n = len(source)
    if n == 0:
        raise UserError(f"the {name} dataset is empty", remedy=f"check what {name}= is built from")
    if name == "train" and source.batch_size is None and not source.batches_itself:
        raise UserError("the train loader has no batch size", remedy="train=stoker.Loader(dataset, 32, shuffle=True)")
    if batch_size is not None and batch_size > n:
        raise UserError(
            f"batch_size {batch_size} is larger than the {name} dataset ({n} samples)",
            remedy=f"use batch_size={n} (one full batch per epoch) or less",
        )


def epoch_batches(source: Any, seed: int, epoch: int) -> int | None:
    """Number of batches in an epoch; None where only reading the data can tell."""
    if not isinstance(source, Loader):
        return 1
    return None if source.iterable else source.plan().count(seed, epoch)


def sample_ids(source: Any, seed: int, epoch: int, batch: int) -> list[int] | None:
    """Sample indices of one batch, recomputed from its position; None where there are none (iterable, full batch)."""
    if not isinstance(source, Loader) or source.iterable:
        return None
    found = source.plan().take(seed, epoch, batch, batch + 1)
    return found[0].tolist() if found else None
