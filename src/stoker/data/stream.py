"""Iterable data: read in its own order by whatever number of processes, and found again on resume.

A stream is read by one reader (in the background, where there are workers); `lanes` of it, where the data set has
shards, by several. The order depends on the data and on `lanes`, never on workers or ranks.
"""

import copy
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
import torch

from stoker.data.batch import map_tree
from stoker.data.collating import Allocate, CollateError, collate
from stoker.data.generators import generators_of, reseed
from stoker.data.pool import Pool
from stoker.data.reader import Collate, Skipped
from stoker.data.seeding import COLLATE, SAMPLE, fold, seed_all
from stoker.errors import UserError

_PRINT_BYTES = 4096  # of each tensor of a sample, that its fingerprint covers
Augment = Callable[[Any], Any]

_END = object()
_ESTIMATE_S = 0.5  # of reading again, before it is said how long the rest will take


@dataclass(frozen=True)
class Place:
    """Where a lane stands between two samples. Plain values: a checkpoint keeps it."""

    position: int = 0  # samples read in the epoch
    shard: int = 0  # of the lane's
    state: Any = None  # the data set's own state_dict, or its iterator's, if they have one
    following: int | None = None  # fingerprint of the next sample; None at the end

    def tree(self) -> dict[str, Any]:
        """Return it as a dict for a checkpoint."""
        return dict(vars(self))


class Lane:
    """One reader's samples, in order; it always knows the next one, and so whether there is one."""

    def __init__(
        self,
        dataset: Any,
        augment: Augment | None,
        shards: Sequence[int],
        num_shards: int,
        key: tuple[int, ...],
        board: MutableSequence[int],
    ) -> None:
        parts = [dataset.shard(num_shards=num_shards, index=i) for i in shards] if num_shards > 1 else [dataset]
        self._augment = augment
        self._parts, self._key, self._board, self._name = parts, key, board, type(dataset).__name__
        self._iterator: Iterator[Any] = iter(())
        self._epoch = 0
        self._place = Place()
        self._generators: list[Any] = []
        self._next: Any = None
        self.ended = False

    def open(self, epoch: int, place: Place | None, *, trust: bool = False) -> None:
        """Begin an epoch, or go on at a place.

        Raises:
            UserError: read again, the stream gives other samples than it gave then.
        """
        self._epoch, self.ended = epoch, False
        if place is None:
            self._begin(0, 0)
            return
        if place.state is not None:
            untouched = _copy_of(self._parts[place.shard])
            self._begin(place.shard, place.position, place.state)
            if trust or self._place.following == place.following:
                return
            print(f"stoker: the state_dict of {self._name} does not go on where it was saved", file=sys.stderr)
            self._parts[place.shard] = untouched
        self._begin(0, 0)
        self._read_again(place.position)
        if not trust and self._place.following != place.following:
            raise UserError(
                f"{self._name} gave other samples when it was read again up to position {place.position}",
                why="the run would not go on where it was: the order must be a function of the epoch (set_epoch)",
                remedy="give the data set state_dict() and load_state_dict(); --force goes on with what comes",
            )

    def _begin(self, shard: int, position: int, state: Any = None) -> None:
        """Open a shard, at a state of its own where one is given, and read the sample that comes next."""
        self._open(shard, position, state or {})
        self._advance()

    def _open(self, shard: int, position: int, state: Mapping[str, Any]) -> None:
        dataset = self._parts[shard]
        self.ended, self._place = False, Place(position, shard)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch)
        # Hugging Face's generators are functions of seed and epoch, and copied before they are drawn from.
        foreign = type(dataset).__module__.startswith("datasets.")
        self._generators = generators_of(self._augment if foreign else (dataset, self._augment))
        self._seed(-1 - shard)
        if "dataset" in state:
            dataset.load_state_dict(state["dataset"])
        self._iterator = iter(dataset)
        if "iterator" in state:
            self._iterator.load_state_dict(state["iterator"])  # type: ignore[attr-defined]

    def _seed(self, position: int) -> None:
        """Seed all generators by position: steps reseed them in between, and a replay draws what was drawn before."""
        key = fold(*self._key, SAMPLE, self._epoch, position)
        seed_all(key)
        for generator in self._generators:
            reseed(generator, key)

    def _advance(self) -> None:
        """Note where the lane stands, then read the sample that comes next."""
        shard, position = self._place.shard, self._place.position
        state = self._state()
        self._board[0], self._board[1], self._board[2] = self._epoch, position, self._board[2] + 1
        self._seed(position)
        try:
            found = next(self._iterator, _END)
            self._next = found if found is _END or self._augment is None else self._augment(found)
        except Exception as error:
            error.add_note(f"while reading position {position} of {self._name} in epoch {self._epoch}")
            raise
        if found is not _END:
            self._place = Place(position, shard, state, fingerprint(self._next))
        elif shard + 1 < len(self._parts):
            self._begin(shard + 1, position)
        else:
            self.ended, self._place = True, Place(position, shard, state, None)

    def _state(self) -> Any:
        dataset = self._parts[self._place.shard]
        found = {}
        if hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict"):
            found["dataset"] = copy.deepcopy(dataset.state_dict())
        if self._iterator is not dataset and hasattr(self._iterator, "load_state_dict"):
            found["iterator"] = copy.deepcopy(self._iterator.state_dict())  # type: ignore[attr-defined]
        return found or None

    def _read_again(self, position: int) -> None:
        began, told = time.perf_counter(), False
        while self._place.position < position and not self.ended:
            self.sample()
            elapsed, done = time.perf_counter() - began, self._place.position
            if not told and (elapsed > _ESTIMATE_S or done == position):
                told = True
                rest = elapsed / done * (position - done)
                print(
                    f"stoker: reading {position} samples of {self._name} again to go on where the run was"
                    + (f", about {rest:.0f} s" if rest >= 1 else ""),
                    file=sys.stderr,
                )

    def sample(self) -> Any:
        """Hand out the next sample and read the one after it."""
        sample = self._next
        self._place = Place(self._place.position + 1, self._place.shard)
        self._advance()
        return sample

    @property
    def place(self) -> Place:
        """Where the lane stands: after the samples that were handed out."""
        return self._place


def _copy_of(dataset: Any) -> Any:
    """A data set as it is before a state is loaded into it; itself, where it cannot be copied."""
    try:
        return copy.deepcopy(dataset)
    except Exception:  # an open file, say
        return dataset


def fingerprint(sample: Any) -> int:
    """Checksum of a sample's numbers and text, of the beginning of its tensors: tells other data, not tampering."""
    crc = 0

    def add(leaf: Any) -> Any:
        nonlocal crc
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
            flat = leaf.detach().reshape(-1)[:_PRINT_BYTES].cpu().contiguous()
            crc = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), crc)
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            crc = zlib.crc32(np.ascontiguousarray(leaf.reshape(-1)[:_PRINT_BYTES]).tobytes(), crc)
        elif isinstance(leaf, str | bytes | int | float | np.generic):
            crc = zlib.crc32(repr(leaf).encode("utf-8", "surrogatepass"), crc)
        return leaf

    map_tree(add, sample)
    return crc


class Taken(NamedTuple):
    """Samples of a batch from some lanes, or their batch."""

    samples: Any  # a list for each lane; or the batch, where one reader has it all
    num_samples: int
    ended: bool  # nothing is left in this epoch
    before: list[Place]  # where the lanes stood,
    places: list[Place]  # and where they stand after it


@dataclass(frozen=True)
class Finish:
    """Makes a batch of the lanes' samples: this rank's slice of them, collated."""

    collate: Collate
    seed: int
    rank: int
    ranks: int

    def __call__(self, samples: list[list[Any]], epoch: int, number: int, allocate: Allocate | None) -> Any:
        flat = list(chain(*samples))
        start, stop = self.rank * len(flat) // self.ranks, (self.rank + 1) * len(flat) // self.ranks
        if start == stop:
            return None
        try:
            if getattr(self.collate, "__module__", "") == "stoker.data.collating":
                return self.collate(flat[start:stop], allocate)  # type: ignore[call-arg]
            seed_all(fold(self.seed, COLLATE, epoch, number, self.rank))
            return self.collate(flat[start:stop])
        except CollateError as error:
            raise error.named(lambda row: f"sample {start + row} of batch {number}") from error


@dataclass
class Lanes:
    """Reads lanes in one process: work for a Pool of one worker, or called in the main process."""

    dataset: Any
    augment: Augment | None
    mine: list[int]  # numbers of the lanes
    quotas: list[int]  # samples of each of the lanes in a batch
    num_lanes: int
    seed: int
    epoch: int
    number: int  # of the next batch
    places: list[Place] | None  # where to begin; None: at the epoch's beginning
    repeat: bool
    trust: bool
    finish: Finish | None  # where one reader has all lanes
    _lanes: list[Lane] = field(default_factory=list)
    _open: bool = False

    def __call__(self, task: Any, allocate: Allocate | None, board: Any) -> Taken:
        if not self._open:
            self._begin(board)
        samples: list[list[Any]] = []
        before = [lane.place for lane in self._lanes]
        for lane, quota in zip(self._lanes, self.quotas, strict=True):
            samples.append([])
            while len(samples[-1]) < quota and not lane.ended:
                samples[-1].append(lane.sample())
        ended = all(lane.ended for lane in self._lanes)
        found = self.finish(samples, self.epoch, self.number, allocate) if self.finish else samples
        taken = Taken(found, sum(map(len, samples)), ended, before, [lane.place for lane in self._lanes])
        self.number += 1
        if ended:
            self.epoch, self.number = self.epoch if self.repeat else self.epoch + 1, 0
            self.places, self._open = None, False
        return taken

    def _begin(self, board: Any) -> None:
        if not self._lanes:
            shards = self.dataset.num_shards if self.num_lanes > 1 else 1
            for number in self.mine:
                key = (self.seed, number) if number else (self.seed,)
                mine = range(number, shards, self.num_lanes)
                self._lanes.append(Lane(self.dataset, self.augment, mine, shards, key, board))
        for i, lane in enumerate(self._lanes):
            lane.open(self.epoch, self.places[i] if self.places else None, trust=self.trust)
        self._open = True


class StreamFeed:
    """An iterable data set, in its own order; each rank takes its slice of every batch.

    Args:
        dataset: anything that can be iterated over, again for every epoch.
        lanes: 1, or how many groups of the data set's shards are read side by side: each batch takes an equal part
            from every lane that has samples left, and workers share the lanes.
        workers: 0 reads in this process, else up to one process for each lane.
        evaluation: every epoch is epoch 0.

    Raises:
        UserError: more lanes than a batch has samples.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate_fn: Collate | None,
        seed: int,
        *,
        augment: Augment | None = None,
        drop_last: bool = False,
        lanes: int = 1,
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        timeout_s: float = 60.0,
        evaluation: bool = False,
    ) -> None:
        if lanes > batch_size:
            raise UserError(f"lanes={lanes} in batches of {batch_size}", remedy=f"lanes={batch_size} or fewer")
        self._dataset, self._batch_size, self._seed, self._drop_last = dataset, batch_size, seed, drop_last
        self._augment, self._num_lanes, self._workers = augment, lanes, min(workers, lanes)
        self._timeout_s, self._repeat = timeout_s, evaluation
        readers = max(self._workers, 1)
        self._dealt = [list(range(i * lanes // readers, (i + 1) * lanes // readers)) for i in range(readers)]
        self._quotas = [(i + 1) * batch_size // lanes - i * batch_size // lanes for i in range(lanes)]
        self._finish = Finish(collate_fn or collate, seed, rank, ranks)
        self.skipped: list[Skipped] = []
        self._at: tuple[int, int] | None = None  # epoch and batch that come next,
        self._places: tuple[list[Place], bool] | None = None  # where that is, and whether to take it on trust
        self._was_cut = False
        self._used: tuple[list[Place], bool] | None = None  # before the batch that is being fetched
        self._sources: list[Callable[[], Taken]] = []
        self._alive: dict[int, list[Place]] = {}  # sources that have samples left in the epoch,
        self._ends: dict[int, list[Place]] = {}  # and where each of all of them stands
        self._ahead: list[Taken] = []  # batches that were read and not handed out
        self._pools: list[Pool] = []

    def state(self, epoch: int, batch: int) -> Any:
        """Where the lanes stand before that batch, the next one, with what it will begin with; None after a cut."""
        if self._places is None and not batch and not self._ahead and not self._was_cut:  # between two epochs
            self._at = epoch, batch
            self._ahead.append(self._take(epoch, batch))
        places = self._ahead[0].before if self._ahead else self._places[0] if self._places else None
        return [place.tree() for place in places] if places else None

    def restore(self, state: Any, *, force: bool = False) -> None:
        """Let the epoch that is asked for first go on where `state` was; `force`: whatever it finds."""
        if state is not None:
            self._places = self._used = [Place(**place) for place in state], force

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, bool]]:
        """Yield batches from batch `start` on; without a restored state, what is before it is read and dropped."""
        if self._at is not None and self._at != (epoch, start):
            self._places = None
        if self._at != (epoch, start):
            self._shut()
        self._at, number, last = (epoch, start), start, False
        while not last:
            self._used = self._places
            try:
                batch, last = self._next(epoch, number)
            except BaseException:
                self._shut()  # whoever asks again shall not find the rest of a stream that broke
                raise
            if batch is None:
                return
            number += 1
            self._at = ((epoch if self._repeat else epoch + 1), 0) if last else (epoch, number)
            self._places = None if last else (batch.places, False)
            yield batch.samples, last

    def _next(self, epoch: int, number: int) -> tuple[Taken | None, bool]:
        """The next batch and whether it is the epoch's last; None where the stream has no whole batch."""
        taken = self._ahead.pop(0) if self._ahead else self._take(epoch, number)
        if number == 0 and taken.ended and not taken.num_samples:
            raise UserError(f"the {type(self._dataset).__name__} yielded no sample in epoch {epoch}")
        if not self._drop_last or taken.ended:
            return (None if self._drop_last and taken.num_samples < self._batch_size else taken), taken.ended
        following = self._take(epoch, number + 1)
        short = following.ended and following.num_samples < self._batch_size
        if not short:
            self._ahead.append(following)
        return taken, short

    def _take(self, epoch: int, number: int) -> Taken:
        """Read a batch from all the sources that have samples left in the epoch."""
        if not self._sources:
            self._open(epoch, number)
        if len(self._sources) == 1:
            return self._sources[0]()
        if not self._alive:
            self._alive = {i: [Place()] * len(mine) for i, mine in enumerate(self._dealt)}
            self._ends = dict(self._alive)
        samples, count, before = [], 0, dict(self._ends)
        for i in list(self._alive):
            taken = self._sources[i]()
            samples += taken.samples
            count += taken.num_samples
            before[i], self._ends[i] = taken.before, taken.places
            if taken.ended:
                del self._alive[i]
        batch = self._finish(samples, epoch, number, None)
        places = [list(chain(*(found[i] for i in range(len(self._dealt))))) for found in (before, self._ends)]
        return Taken(batch, count, not self._alive, *places)

    def _open(self, epoch: int, number: int) -> None:
        """Open the readers where the run goes on: at a restored place, or by reading again what came before."""
        places, trust = self._places or (None, False)
        if places is None and number:
            places, trust = [Place(number * quota) for quota in self._quotas], True
        if places is not None and len(places) != self._num_lanes:
            raise UserError(
                f"the run read its stream in {len(places)} lanes, the recipe has lanes={self._num_lanes}",
                remedy=f"set lanes={len(places)} again",
            )
        for mine in self._dealt:
            work = Lanes(
                self._dataset,
                self._augment,
                mine,
                [self._quotas[lane] for lane in mine],
                self._num_lanes,
                self._seed,
                epoch,
                number,
                [places[lane] for lane in mine] if places else None,
                self._repeat,
                trust,
                self._finish if len(self._dealt) == 1 else None,
            )
            if self._workers:
                pool = Pool(work, repeat(()), 1, self._timeout_s, lambda position: f"the sample at position {position}")
                self._pools.append(pool)
                self._sources.append(partial(next, pool))
            else:
                self._sources.append(partial(work, (), None, [0, 0, 0]))

    def _shut(self) -> None:
        """Release the readers; what they have read ahead is read again."""
        pools, self._pools, self._sources = self._pools, [], []
        self._alive, self._ahead = {}, []
        for pool in pools:
            pool.close()

    def cut(self, epoch: int, batch: int) -> None:
        """Stand before a batch, which may have arrived or is still to be asked for, and read nothing more."""
        self._shut()
        if self._at != (epoch, batch):  # it has arrived
            self._places = self._used
        self._was_cut = True

    def close(self) -> None:
        """Release the workers."""
        self._shut()
        self._at = self._places = None
