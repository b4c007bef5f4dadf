"""Reads samples and collates them: seeded one by one, failures named by sample and file, or left out by policy."""

import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from stoker.data.collating import Allocate, CollateError, collate
from stoker.data.generators import generators_of, reseed
from stoker.data.seeding import COLLATE, SAMPLE, draws, fold, seed_all
from stoker.errors import UserError, told

OnError = Literal["raise", "skip"]
Collate = Callable[[list[Any]], Any]

_UNDRAWN = fold(0, SAMPLE)  # a seed that nobody chooses


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read and was left out."""

    epoch: int
    index: int
    reason: str  # names the file where it is known

    def __str__(self) -> str:
        return f"sample {self.index} in epoch {self.epoch}: {self.reason}"


class Portion(NamedTuple):
    """What reading one batch gives."""

    batch: Any
    skipped: tuple[Skipped, ...] = ()


class RemoteTraceback(Exception):
    """The traceback of an exception in another process, as text."""


@dataclass(frozen=True)
class Failure:
    """An exception in another process, in words: the exception itself may not survive the journey."""

    what: str
    why: str
    remedy: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Put an exception into words, with the user's own lines, or else the last ones."""
        text = "".join(traceback.format_exception(error))
        message = error if isinstance(error, UserError) else told(error, "reading the data")
        frames = traceback.extract_tb(error.__traceback__)[-2:]
        lines = "\n          ".join(f"at {f.filename}:{f.lineno}: {f.line}" for f in frames)
        why = message.why or ("" if isinstance(error, UserError) else lines)
        return cls(message.what, why, message.remedy, text)

    def raised(self) -> UserError:
        """Return the exception to raise here; its cause shows the other process's traceback."""
        error = UserError(self.what, why=self.why, remedy=self.remedy)
        error.__cause__ = RemoteTraceback(f'\n"""\n{self.traceback}"""')
        return error


class Reader:
    """Reads and collates batches; sample (epoch, index) draws from generators seeded by (seed, epoch, index).

    Seeding costs 8 us a sample, more than many samples do. Where the first batch's samples drew nothing, the
    generators are seeded once a batch and looked at after it; should a sample have drawn after all, that batch is
    read again with a seed for every sample, and so is all that follows.
    """

    def __init__(self, dataset: Any, collate_fn: Collate | None, seed: int, on_error: OnError = "raise") -> None:
        self.dataset = dataset
        self._collate, self._seed, self._on_error = collate_fn or collate, seed, on_error
        # stoker's own collate functions can write into memory that they are given; and they draw nothing
        self._own_collate = getattr(self._collate, "__module__", "") == "stoker.data.collating"
        self._own_generators = generators_of(dataset)
        self._bulk = getattr(dataset, "__getitems__", None)
        self._undrawn: tuple[float, float, float] | None = None  # draws after that seed, if the first batch drew none
        self._known = bool(self._own_generators)
        self.board: Any = [0, 0, 0]  # epoch, index and number of the sample that is being read, for whoever watches

    def batch(self, epoch: int, indices: Sequence[int], allocate: Allocate | None = None) -> Portion:
        """Read and collate.

        Raises:
            UserError: the samples do not fit together, or every one of them failed.
        """
        if not indices:
            return Portion(None)
        samples, read, skipped = self.read(epoch, indices)
        return Portion(self.join(epoch, read, samples, allocate), skipped)

    def read(self, epoch: int, indices: Sequence[int]) -> tuple[list[Any], Sequence[int], tuple[Skipped, ...]]:
        """Read samples: those that can be read, their indices, and those that were left out."""
        if self._on_error == "skip":
            return self._read_what_can_be(epoch, indices)
        return self._read(epoch, indices), indices, ()

    def join(self, epoch: int, indices: Sequence[int], samples: list[Any], allocate: Allocate | None) -> Any:
        """Collate samples; a collate function that draws, to mix samples say, is keyed by the first.

        Raises:
            UserError: the samples do not fit together.
        """
        try:
            if self._own_collate:
                return self._collate(samples, allocate)  # type: ignore[call-arg]
            self._seed_generators(fold(self._seed, COLLATE, epoch, indices[0]))
            return self._collate(samples)
        except CollateError as error:
            raise error.named(lambda row: self.name(indices[row])) from error

    def name(self, index: int) -> str:
        """Sample and, where the data set tells it, its file."""
        file = file_of(self.dataset, index)
        return f"sample {index} ({file})" if file else f"sample {index}"

    def _seed_generators(self, key: int) -> None:
        seed_all(key)
        for generator in self._own_generators:
            reseed(generator, key)

    def _read(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        if self._undrawn is not None:
            seed_all(_UNDRAWN)
            samples = self._get(epoch, indices)
            if draws() == self._undrawn:
                return samples
            self._undrawn = None
        if self._known or torch.cuda.is_initialized():  # a CUDA generator's draws are not looked at
            return [self._keyed(epoch, index) for index in indices]
        self._known = True
        return self._first_batch(epoch, indices)

    def _first_batch(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        samples, drawn = [], False
        for index in indices:
            samples.append(self._keyed(epoch, index))
            after = draws()
            seed_all(fold(self._seed, SAMPLE, epoch, index))
            drawn = drawn or after != draws()
        if not drawn:
            seed_all(_UNDRAWN)
            self._undrawn = draws()
        return samples

    def _keyed(self, epoch: int, index: int) -> Any:
        self._seed_generators(fold(self._seed, SAMPLE, epoch, index))
        return self._get(epoch, [index])[0]

    def _read_what_can_be(self, epoch: int, indices: Sequence[int]) -> tuple[list[Any], list[int], tuple[Skipped, ...]]:
        samples, read, skipped = [], [], []
        for index in indices:
            try:
                samples.append(self._keyed(epoch, index))
                read.append(index)
            except Exception as error:
                what = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                file = file_of(self.dataset, index)
                skipped.append(Skipped(epoch, index, f"{file}: {what}" if file and file not in what else what))
        if not samples:
            raise UserError(
                f"no sample of a batch of {len(indices)} could be read",
                why="\n          ".join(map(str, skipped[:3])),
                remedy="on_error='skip' leaves single bad samples out; here the data set itself seems to be wrong",
            )
        return samples, read, tuple(skipped)

    def _get(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        board, dataset, samples = self.board, self.dataset, []
        board[0] = epoch
        if self._bulk is not None and len(indices) > 1:
            board[1], board[2] = indices[0], board[2] + 1
            try:
                return list(self._bulk(list(indices)))
            except Exception:  # reading one by one tells which it was; if none fails, it is as good
                self._bulk = None
        for index in indices:
            board[1], board[2] = index, board[2] + 1
            try:
                samples.append(dataset[index])
            except BaseException as error:
                error.add_note(f"while reading {self.name(index)} in epoch {epoch}")
                if isinstance(error, UserError) and f"sample {index}" not in error.what:
                    where = f" ({self.name(index)}, epoch {epoch})"
                    raise UserError(error.what + where, why=error.why, remedy=error.remedy) from error
                raise
        return samples


def file_of(dataset: Any, index: int) -> str | None:
    """File (and row) that a sample comes from, by the conventions of stoker's and torchvision's data sets."""
    with suppress(Exception):  # only a name for a message: whatever fails here must not hide the message
        for _ in range(8):
            if callable(tell := getattr(dataset, "file_of", None)):
                return str(tell(index))
            for attribute in ("samples", "imgs", "paths", "files", "filenames", "image_paths"):
                listed = getattr(dataset, attribute, None)
                if isinstance(listed, list | tuple) and len(listed) == len(dataset):
                    found = listed[index]
                    found = found[0] if isinstance(found, list | tuple) and found else found
                    if isinstance(found, str | os.PathLike):
                        return str(found)
            inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
            if inner is None or (indices is None and len(inner) != len(dataset)):
                return None
            index = index if indices is None else int(indices[index])
            dataset = inner
    return None
