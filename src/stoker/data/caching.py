"""Decoded samples kept for the next epoch, in memory or on disk; what is random is done again every time.

What `dataset[i]` does before the first transform that draws is kept, the rest is applied to what was kept. Draws are
measured on every sample that is kept, so that none can be frozen.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch.utils.data import Subset

from stoker.data.determined import Probe, Unfit, named_files, probe
from stoker.data.fingerprint import fingerprint
from stoker.data.generators import States, generators_of
from stoker.data.reads import confirmed, recording, unchanged
from stoker.data.samplecodec import decode, encode
from stoker.data.samplestore import Disk, Entry, Memory, Store, memory_limit, tell
from stoker.errors import UserError

_FORMAT = 1  # of what is kept
_PROBES = 16  # samples that are looked at before any is kept
_DECODERS = ("PIL", "cv2", "librosa", "numpy", "soundfile", "torch", "torchaudio", "torchcodec", "torchvision")
_ENTRY_BYTES = 256  # beside a sample: its files and their states
_ABSENT = object()


def cached(
    dataset: Any, where: Literal["memory", "disk"], folder: Path | None = None, *, limit_bytes: int | None = None
) -> "Cached":
    """Keep the samples of a map-style data set once they are decoded; they stay the same, bit for bit.

    On disk they lie in one SQLite file in `folder`, for the runs to come and for any number of processes at once. They
    are found again by a hash of the data set's code and attributes (not of the transforms from the first random one
    on), and used if the files that a sample was read from are what they were. Deleting files there is safe at any time.

    Args:
        dataset: has `__len__` and `__getitem__`; a `transform` (or torchvision's `transforms`) of its own, or of the
            data set that it wraps as `.dataset`, may be random.
        where: "memory" (shared with forked workers, gone with the process) or "disk".
        folder: default $STOKER_CACHE/samples, else $XDG_CACHE_HOME/stoker/samples, else ~/.cache/stoker/samples.
        limit_bytes: the most memory to take (default: half of what may still be used).

    Raises:
        UserError: samples are random elsewhere than in the transform, differ from one reading to the next, or hold
            something that cannot be kept; or nobody can tell what they depend on.
    """
    if where not in ("memory", "disk"):
        raise UserError(f"cache={where!r}", remedy='cache="memory" or cache="disk"')
    base, indices = _without_subsets(dataset)
    probed = probe(base, _spread(len(dataset), indices))
    store: Store
    if where == "memory":
        limit = memory_limit() if limit_bytes is None else limit_bytes
        store = Memory(len(base), probed.sample_bytes + _ENTRY_BYTES, limit)
    else:
        versions = [(name, getattr(sys.modules[name], "__version__", "")) for name in _DECODERS if name in sys.modules]
        key = fingerprint([_FORMAT, versions, probed.split.keys, probed.split.source], type(base).__name__)
        store = Disk(folder or default_folder(), key[:40])
    return Cached(dataset, base, indices, probed, store)


def default_folder() -> Path:
    """Folder of the caches on disk."""
    chosen = os.environ.get("STOKER_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stoker"
    return (Path(chosen).expanduser() if chosen else home) / "samples"


class Cached:
    """A data set whose samples are decoded once. `dataset` is the one that it was made of."""

    def __init__(
        self, dataset: Any, base: Any, indices: npt.NDArray[np.int64] | None, probed: Probe, store: Store
    ) -> None:
        self.dataset = dataset
        self._base, self._indices, self._split, self._store = base, indices, probed.split, store
        self._common = probed.common
        self._generators = generators_of(dataset)  # here the Reader finds them, too
        self._live: set[int] = set()  # rows that turned out to be random throughout
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("classes", "collate", "file_of", "fitted", "lengths", "targets"):
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: int) -> Any:
        row = index if self._indices is None else int(self._indices[index])
        if row in self._live:
            return self._base[row]
        kept = self._kept(row)
        return self._fill(row) if kept is _ABSENT else self._split.finish(kept)

    def _kept(self, row: int) -> Any:
        entry = self._store.get(row)
        if entry is None:
            return _ABSENT
        try:
            reads = json.loads(entry.reads)
            if not unchanged(reads):
                renewed = confirmed(reads)
                if renewed is None:
                    return _ABSENT
                self._store.renew(row, entry, json.dumps(renewed))
            return decode(entry.header, entry.payload)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError):  # of a type that was not met yet, say
            return _ABSENT

    def _fill(self, row: int) -> Any:
        before = States.now(self._generators)
        unfit = ""
        with recording() as record:
            try:
                begun = self._split.begin(row)
            except Unfit as reason:
                begun, unfit = None, str(reason)
        if States.now(self._generators) != before:
            unfit = "it draws random numbers where the first samples drew none"
        if unfit:
            before.restore(self._generators)
            self._live.add(row)
            self._tell("live", f"sample {row} is decoded every time: {unfit}")
            return self._base[row]
        header, payload = encode(begun, f"sample {row}")
        reads = record.reads([*self._common, *named_files(self._base, row)])
        if reads is None:
            self._tell("changed", f"sample {row} is not kept: a file changed while it was read")
        else:
            self._store.put(row, Entry(json.dumps(reads), header, payload))
        return self._split.finish(decode(header, payload))  # as it will be from now on

    def _tell(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            tell(f"sample cache: {text} (said for the first such sample only)")


def _without_subsets(dataset: Any) -> tuple[Any, npt.NDArray[np.int64] | None]:
    """Data set below torch's Subsets, and the indices into it: splits of one data set share what is kept."""
    indices: npt.NDArray[np.int64] | None = None
    while type(dataset) is Subset:
        own = np.asarray(dataset.indices)
        if own.ndim != 1 or own.dtype.kind not in "iu":
            break
        indices = own.astype(np.int64) if indices is None else own.astype(np.int64)[indices]
        dataset = dataset.dataset
    return dataset, indices


def _spread(count: int, indices: npt.NDArray[np.int64] | None) -> list[int]:
    """Rows of some samples from all over the data set: folders come sorted by class."""
    places = np.unique(np.linspace(0, max(count - 1, 0), min(_PROBES, count)).astype(np.int64))
    return [int(row) for row in (places if indices is None else indices[places])]
