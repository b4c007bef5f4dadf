"""Loader: what the recipe says about data. Feed: how a run draws batches from it, starting at any step."""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset, IterableDataset

from stoker.data.batching import Bucketed, Sharded, balanced
from stoker.data.columns import Columns, Rows, columns_of
from stoker.data.feeds import Feed, SampleFeed, TensorFeed, WholeFeed, WorkerFeed
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
from stoker.data.reader import OnError, Reader
from stoker.data.stream import StreamFeed
from stoker.errors import UserError, nearest


class Augmented:
    """A data set and a function that changes its samples as they are read."""

    def __init__(self, dataset: Any, augment: Callable[[Any], Any]) -> None:
        self.dataset, self.augment = dataset, augment

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.augment(self.dataset[index])


class Loader:
    """A dataset, its order and its global batch size.

    Args:
        dataset: any torch map-style or iterable Dataset, any sequence of samples, or plain tensors / arrays (a
            tensor, a tuple or a dict of them with one length): those are fetched a batch at a time.
        batch_size: samples per optimizer step over all devices. A `val` or `test` loader takes the train loader's.
        shuffle: a fresh permutation every epoch, a function of (seed, epoch).
        lengths: one number per sample, or True for the data set's own `lengths`: batches are made of samples of
            similar length, which saves padding. With `shuffle`, of samples that are near one another in its order.
        weights: one number per sample: draw len(dataset) samples with replacement in proportion to them.
        balance: one label per sample, or True for the data set's own `targets`: likewise, every class equally often.
        sampler: any torch Sampler or iterable of indices. Run once an epoch, its generators keyed by (seed, epoch).
        batch_sampler: likewise, yielding lists of indices; then `batch_size` and `drop_last` are its own.
        drop_last: leave out an epoch's last batch where it is smaller than the others.
        collate: list of samples -> batch (default: the data set's own `collate`, else as torch's default_collate).
        augment: sample -> sample, applied to each as it is read, after the cache.
        cache: keep decoded samples, in "memory" (shared by all workers) or on "disk". What draws random numbers is
            done anew every time; files or code that change are noticed.
        on_error: "raise", or "skip" samples that cannot be read: they are counted, logged and reported.
        timeout_s: how long a worker may take over one sample before it is said to hang.
        lanes: for iterable data in shards (`num_shards`, `shard(num_shards=, index=)`): how many groups of shards are
            read side by side, each batch taking an equal part of every group that has samples left.

    Raises:
        UserError: the arguments contradict one another, or do not fit the dataset.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        lengths: Any = None,
        weights: Any = None,
        balance: Any = None,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[Any] | None = None,
        drop_last: bool = False,
        collate: Callable[[list[Any]], Any] | None = None,
        augment: Callable[[Any], Any] | None = None,
        cache: Literal["memory", "disk"] | None = None,
        on_error: OnError = "raise",
        timeout_s: float = 60.0,
        lanes: int = 1,
    ) -> None:
        self.dataset, self.batch_size, self.drop_last, self.collate = dataset, batch_size, drop_last, collate
        self._shuffle, self._lengths, self._weights, self._balance = shuffle, lengths, weights, balance
        self._sampler, self._batch_sampler = sampler, batch_sampler
        self._augment, self._cache_where = augment, cache
        self._on_error, self.timeout_s, self.lanes = on_error, timeout_s, lanes
        self._plans: dict[tuple[int | None, bool], Batches] = {}
        self._check()

    def _check(self) -> None:
        rivals = {
            "lengths": self._lengths is not None,
            "shuffle": self._shuffle and self._lengths is None,
            "weights": self._weights is not None,
            "balance": self._balance is not None,
            "sampler": self._sampler is not None,
            "batch_sampler": self._batch_sampler is not None,
            "batch_size": self.batches_itself and self.batch_size is not None,
            "drop_last": self.batches_itself and self.drop_last,
        }
        given = [name for name, value in rivals.items() if value]
        if len(given) > 1:
            raise UserError(f"Loader got {' and '.join(given)}", remedy="each decides the order: give one of them")
        self._check_words()
        if isinstance(self.dataset, DataLoader):
            raise UserError(
                "Loader got a torch DataLoader",
                why="its order lives in an iterator that cannot be resumed",
                remedy="give its dataset: Loader(dataloader.dataset, batch_size, shuffle=True)",
            )
        if self.iterable:
            self._check_stream(given)
        elif not hasattr(self.dataset, "__len__") and not hasattr(self.dataset, "columns"):
            raise UserError(
                f"a {type(self.dataset).__name__} has no length",
                remedy="give it __len__ and __getitem__, or derive it from torch's IterableDataset",
            )
        elif self.lanes > 1:
            raise UserError("lanes= is for iterable data", remedy="leave it out: --workers read a map-style data set")

    def _check_words(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("lanes", self.lanes)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.timeout_s <= 0:
            raise UserError(f"timeout_s must be more than 0, got {self.timeout_s}")
        for name, word, words in (
            ("on_error", self._on_error, ("raise", "skip")),
            ("cache", self._cache_where, (None, "memory", "disk")),
        ):
            if word not in words:
                listed = " or ".join(repr(w) for w in words)
                raise UserError(
                    f"Loader({name}={word!r}): {name} is {listed}{nearest(str(word), [str(w) for w in words])}"
                )

    def _check_stream(self, given: list[str]) -> None:
        others = {"cache": self._cache_where is not None, "on_error": self._on_error != "raise"}
        given = given + [name for name, value in others.items() if value]
        if given:
            raise UserError(
                f"{given[0]} does not apply to an IterableDataset", why="it decides its own order and samples"
            )
        shards = getattr(self.dataset, "num_shards", 1)
        if self.lanes > 1 and (self.lanes > shards or not hasattr(self.dataset, "shard")):
            raise UserError(
                f"lanes={self.lanes} of a {type(self.dataset).__name__} with {shards} shards",
                why="each lane reads shards of its own",
                remedy=f"lanes={shards}; shards are told by `num_shards` and given by `shard(num_shards=, index=)`",
            )

    @property
    def iterable(self) -> bool:
        """Whether the samples can only be had one after the other."""
        dataset = self.dataset
        return isinstance(dataset, IterableDataset) or (
            hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
        )

    @cached_property
    def columns(self) -> Columns | None:
        """The data as tensors, where nothing but their rows is asked for."""
        simple = self.collate is None and self._augment is None
        return self._columns if simple else None

    @cached_property
    def _columns(self) -> Columns | None:
        return None if self.iterable else columns_of(self.dataset)

    def __len__(self) -> int:
        """Return the number of samples in the dataset (map-style and tensors)."""
        if self.iterable:
            raise UserError(f"a {type(self.dataset).__name__} has no length")
        return self._columns.num_rows if self._columns is not None else len(self.dataset)

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

        For an evaluation, `batch_size` comes first, and every sample comes once: drop_last, shuffle, lengths and
        weights are the training's.
        """
        key = batch_size, evaluation
        if key not in self._plans:
            self._plans[key] = self._plan(batch_size, evaluation)
        return self._plans[key]

    def _plan(self, batch_size: int | None, evaluation: bool) -> Batches:
        if self._batch_sampler is not None:
            return batches_of_sampler(self._batch_sampler)
        n, size = len(self), (batch_size or self.batch_size if evaluation else self.batch_size or batch_size)
        if size is None:
            raise UserError("the loader has no batch size", remedy="stoker.Loader(dataset, 32, ...)")
        order = self._order(n)
        if evaluation:
            return Chunked(once(order), size, False)
        if self._lengths is not None:
            lengths = per_sample(self._own("lengths", self._lengths), "lengths", n)
            return Bucketed(lengths, size, self._shuffle, self.drop_last)
        return Chunked(order, size, self.drop_last)

    def _order(self, n: int) -> Order:
        if self._weights is not None:
            return weighted(per_sample(self._weights, "weights", n), n, replacement=True)
        if self._balance is not None:
            return balanced(per_sample(self._own("targets", self._balance), "labels", n))
        if self._sampler is not None:
            return order_of_sampler(self._sampler, n)
        return Shuffled(n, n) if self._shuffle else Sequential(n)

    def _own(self, attribute: str, given: Any) -> Any:
        """What was given, or for True what the data set tells; of plain tensors, the last is the target."""
        if given is not True:
            return given
        found = getattr(self.dataset, attribute, None)
        if found is None and attribute == "targets" and self._columns is not None:
            found = self._columns.last()
        if found is None:
            argument = {"lengths": "lengths", "targets": "balance"}[attribute]
            raise UserError(
                f"{argument}=True needs `{attribute}`, which a {type(self.dataset).__name__} does not have",
                remedy=f"{argument}=[...], with one value per sample",
            )
        return found

    def batches(self, seed: int, epoch: int, *, rank: int = 0, ranks: int = 1) -> list[list[int]]:
        """Sample indices of every batch of an epoch, in the order in which a run with this seed trains on them.

        With several `ranks`: of the slices that rank number `rank` reads, some of which may be empty.
        """
        plan = Sharded(self.plan(), rank, ranks) if ranks > 1 else self.plan()
        return [batch.tolist() for batch in plan.take(seed, epoch, 0, plan.count(seed, epoch))]

    def indices(self, seed: int, epoch: int, *, rank: int = 0, ranks: int = 1) -> list[int]:
        """Sample indices of an epoch in order."""
        return [index for batch in self.batches(seed, epoch, rank=rank, ranks=ranks) for index in batch]

    @cached_property
    def source(self) -> Any:
        """The map-style data set as it is read: cached, and then augmented, where that was asked for."""
        plain = self._columns is not None and not isinstance(self.dataset, Dataset)
        source: Any = Rows(self._columns) if plain and self._columns is not None else self.dataset
        if self._cache_where is not None:
            from stoker.data.caching import cached

            source = cached(source, self._cache_where)
        return Augmented(source, self._augment) if self._augment is not None else source

    def reader(self, seed: int) -> Reader:
        """Reads batches of a map-style data set."""
        collate = self.collate or getattr(self.dataset, "collate", None)
        return Reader(self.source, collate, seed, self._on_error)

    def feed(
        self,
        seed: int,
        *,
        batch_size: int | None = None,
        workers: int = 0,
        evaluation: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> Feed:
        """Open the data for a run. An evaluation feed repeats epoch 0, so that evaluations are comparable."""
        if self.iterable:
            return StreamFeed(
                self.dataset,
                self.batch_size or batch_size or 1,
                self.collate or getattr(self.dataset, "collate", None),
                seed,
                augment=self._augment,
                drop_last=self.drop_last and not evaluation,
                lanes=self.lanes,
                workers=workers,
                rank=rank,
                ranks=ranks,
                timeout_s=self.timeout_s,
                evaluation=evaluation,
            )
        plan = self.plan(batch_size, evaluation=evaluation)
        plan = Sharded(plan, rank, ranks) if ranks > 1 else plan
        if self.columns is not None:
            return TensorFeed(self.columns, plan, seed)
        reader = self.reader(seed)
        if workers == 0:
            return SampleFeed(reader, plan, seed)
        return WorkerFeed(reader, plan, seed, workers, timeout_s=self.timeout_s, repeat=evaluation)


def per_sample(values: Any, name: str, n: int) -> Any:
    """Check that there is one value per sample."""
    if not hasattr(values, "__len__") or len(values) != n:
        count = f"{len(values)} " if hasattr(values, "__len__") else ""
        raise UserError(f"{count}{name} for {n} samples", remedy=f"give one of the {name} per sample")
    return values


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
