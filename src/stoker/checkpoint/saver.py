"""Saving beside the training: the loop waits while its state is copied, the rest happens on a thread."""

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

from stoker.checkpoint.store import MODEL, Files, Snapshot, Store
from stoker.errors import UserError
from stoker.naming import names

ON_FULL_DISK = ("continue", "wait", "stop")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ALIGNED = 64  # bytes: what vectorised copies like
_LOOK_S = 1.0  # between looks whether there is room now


class Staging:
    """Host memory that states are copied into: allocated once, again where a state has grown; pinned beside a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._layout: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._places: list[torch.Tensor] = []

    def reserve(self, size_bytes: int, *, pinned: bool = False) -> None:
        """Have room for a state of that size."""
        if size_bytes > len(self._buffer):
            self._layout, self._places = [], []
            self._buffer = torch.empty(0, dtype=torch.uint8)  # first, so that both are never there at once
            self._buffer = _allocate(size_bytes, pinned=pinned)

    def begin(self, saved: Snapshot) -> "Staged":
        """Copy a snapshot's tensors, but for those that stay as they are until `Staged.finish` has copied them, too.

        The copies are views of one buffer, and valid until the next call.
        """
        named = [(name, tensor) for content in saved.files.values() for name, tensor in content.items()]
        tensors = [tensor for _, tensor in named]
        devices = self._lay_out(tensors)
        pairs = list(zip(self._places, tensors, strict=True))
        later = [name in saved.steady and not devices and tensor.is_contiguous() for name, tensor in named]
        now = [pair for pair, wait in zip(pairs, later, strict=True) if not wait]
        with torch.no_grad():
            torch._foreach_copy_([place for place, _ in now], [tensor for _, tensor in now], non_blocking=True)
        if devices:
            torch.accelerator.synchronize()
        found = iter(self._places)
        files = {name: {key: next(found) for key in content} for name, content in saved.files.items()}
        return Staged(replace(saved, files=files), [pair for pair, wait in zip(pairs, later, strict=True) if wait])

    def stage(self, saved: Snapshot) -> Snapshot:
        """Return the snapshot with copies of its tensors, all of them."""
        staged = self.begin(saved)
        staged.finish()
        return staged.snapshot

    def _lay_out(self, tensors: list[torch.Tensor]) -> bool:
        """Find places for tensors; return whether some of them are on a device."""
        layout = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        pinned = any(device.type != "cpu" for _, _, device in layout)
        if layout == self._layout:
            return pinned
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
        self.reserve(sum(sizes), pinned=pinned)
        begins = [0, *accumulate(sizes)]
        cut = [self._buffer[begin : begin + t.nbytes] for begin, t in zip(begins, tensors, strict=False)]
        self._places = [place.view(t.dtype).view(t.shape) for place, t in zip(cut, tensors, strict=True)]
        self._layout = layout
        return pinned


class Staged:
    """A snapshot with copies of its tensors; those that are left to `finish` must not change before it has returned."""

    def __init__(self, snapshot: Snapshot, left: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.snapshot = snapshot
        self._left = [(place, tensor, tensor._version) for place, tensor in left]

    def finish(self) -> str | None:
        """Copy what is left, on any thread; name a weight that should be finite and is not.

        Raises:
            UserError: something that was left has changed meanwhile.
        """
        for place, tensor, _ in self._left:  # not by torch, whose threads are busy with the training
            ctypes.memmove(place.data_ptr(), tensor.data_ptr(), tensor.nbytes)
        if any(tensor._version != version for _, tensor, version in self._left):
            raise UserError(
                "the optimizer's state was changed outside of its step",
                why="a checkpoint would have kept some of it as it was before, some as it was after",
                remedy="change it in an on_step function, which is called between two steps",
            )
        self._left = []
        weights = self.snapshot.files[MODEL]
        return next((name for name in weights if name in self.snapshot.finite and not _is_finite(weights[name])), None)


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype in (torch.float32, torch.float64):
        # A sum is not finite if a term is not, and much faster than a search; numpy's leaves torch's threads alone.
        with np.errstate(all="ignore"):
            if np.isfinite(tensor.numpy().sum()):
                return True
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _allocate(size: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    if not hasattr(mmap, "MADV_DONTFORK"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)  # data workers would make every later save copy it page by page
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    ctypes.memset(buffer.data_ptr(), 0, size)  # have the pages now: on the saver's thread, beside the first steps
    return buffer


class Saver:
    """Writes checkpoints of one run on a thread, at most one at a time.

    Args:
        store: where they go.
        on_full_disk: what a full disk means after everything that retention gives up is gone: "continue" trains on
            and says so, "wait" pauses until there is room, "stop" ends the run.
    """

    def __init__(self, store: Store, on_full_disk: str = "continue") -> None:
        self.store, self.on_full_disk = store, on_full_disk
        self.warn: Callable[[str], None] = print
        self.interrupted: Callable[[], bool] = lambda: False  # whether a signal asks the run to end
        self.took_s = 0.0  # of the last save, on both threads
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stoker-save", initializer=_stand_back)
        self._write: Future[None] | None = None
        self._copy: Future[str | None] | None = None
        self._ready: Future[None] = Future()  # the memory that was reserved
        self._ready.set_result(None)
        self._job: _Job | None = None
        self._paused_at = -1  # step at which it was said that the run waits
        self._missing: tuple[Snapshot, OSError] | None = None  # the newest, if it could not be written

    def save(self, saved: Snapshot, events: int) -> None:
        """Take a copy of a state and begin to write it; first see the save before through.

        Args:
            saved: refers to tensors that may change as soon as this returns.
            events: descriptor of the event log, to be on disk before the checkpoint that remembers its length.

        Raises:
            UserError: the save before has failed, or something in the state cannot be saved.
        """
        self.settle()
        began = time.perf_counter()
        refuse_dtypes(saved.files)
        self._ready.exception()  # two allocations at once would take twice the memory
        self._job = None  # it holds the copies before, whose memory may have to be allocated anew
        staged = self._staging.begin(saved)
        self._copy = self._thread.submit(staged.finish)
        self._job = _Job(self.store, staged.snapshot, events, began, self._copy)
        self._write = self._thread.submit(self._job)

    def copied(self) -> str | None:
        """Wait until the state may change: what an optimizer keeps is copied beside a step's forward and backward pass.

        Returns:
            the name of a weight that is not finite: the checkpoint is not written then.

        Raises:
            UserError: the state has changed before.
        """
        copy, self._copy = self._copy, None
        return copy.result() if copy is not None else None

    def reserve(self, size_bytes: int, *, pinned: bool) -> None:
        """Have memory for copies of about that size ready, without waiting for it."""
        self._ready = self._thread.submit(self._staging.reserve, size_bytes + size_bytes // 64, pinned=pinned)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._write is not None and not self._write.done()

    @property
    def failed(self) -> bool:
        """Whether a write has failed that nobody has been told of."""
        return self._write is not None and self._write.done() and self._write.exception() is not None

    def settle(self, *, last: bool = False) -> None:
        """See the write in flight through; where it fails, do what `on_full_disk` says.

        Args:
            last: no other save will follow, so that to go on without this one is no choice.

        Raises:
            UserError: it has failed, and the run cannot go on.
        """
        while self._write is not None and self._job is not None:
            error = self._write.exception()
            self._write, self.took_s = None, self._job.took_s
            if error is None:
                self._missing = None
            elif not isinstance(error, OSError):
                raise error
            elif self.again(self._job.saved, error, last=last):
                self._write = self._thread.submit(self._job)
        if last and self._missing is not None:
            self.again(*self._missing, last=True)

    def again(self, saved: Snapshot, error: OSError, *, last: bool = False) -> bool:
        """Decide on something of a save that could not be written: whether to try again, after a moment's wait.

        Raises:
            UserError: it ends the run.
        """
        latest = self.store.latest()
        kept = latest.name if latest is not None else "the start"
        full = error.errno in FULL
        self._missing = replace(saved, files={}), error  # without the copies, which the next save overwrites
        if full and self.on_full_disk == "continue" and not last:
            self.warn(f"could not save step {saved.step}: {error}. Training goes on; a kill now goes back to {kept}")
            return False
        if full and self.on_full_disk == "wait" and not self.interrupted():
            if self._paused_at != saved.step:
                self._paused_at = saved.step
                self.warn(f"paused at step {saved.step}: {error}. It goes on when there is room in {self.store.folder}")
            time.sleep(_LOOK_S)
            return True
        self._missing = None  # told now
        raise UserError(
            f"cannot write checkpoint {self.store.folder / saved.name}: {error}",
            why="the disk is full, or its quota is used up" if full else "",
            remedy=f"{'make room' if full else 'mend that'}, then run the same command again; it goes on from {kept}",
        ) from error

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()


def _stand_back() -> None:
    """Let this thread run where the training leaves a core idle: it computes on all of them in turns."""
    with suppress(AttributeError, OSError):  # a thread's own priority is Linux's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


@dataclass
class _Job:
    """One checkpoint to write."""

    store: Store
    saved: Snapshot
    events: int
    began: float
    copy: Future[str | None]
    took_s: float = 0.0

    def __call__(self) -> None:
        try:
            if self.copy.result() is not None:
                return  # weights that are not finite never replace good ones
            os.fsync(self.events)
            while True:
                try:
                    self.store.write(self.saved)
                    return
                except OSError as error:
                    if error.errno not in FULL or not self.store.make_room(self.saved):
                        raise
        finally:
            self.took_s = time.perf_counter() - self.began


def refuse_dtypes(files: Files) -> None:
    """Refuse tensors that the file format has no name for.

    Raises:
        UserError: naming the tensor.
    """
    for content in files.values():
        for name, tensor in content.items():
            if tensor.dtype in (torch.complex128, torch.complex32) or tensor.is_quantized:
                raise UserError(
                    f"cannot save {name}: safetensors has no {str(tensor.dtype).removeprefix('torch.')}",
                    remedy="keep it as torch.view_as_real(tensor), or as another type",
                )


def tensors_of(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """Tensors of a module's state dict, by names free of wrappers."""
    return names.tensors(module)
