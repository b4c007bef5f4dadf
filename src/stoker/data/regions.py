"""Batches in memory that two processes share, written by one and read by the other without a copy.

Each worker has one memory file, which grows by regions; a batch lies in one region, and the region is used again once
no tensor of that batch is alive in the reading process. So there are no page faults after the first batches, nothing in
/dev/shm (whose size in containers is often 64 MB), and nothing to clean up: a memory file ends with its processes.
"""

import ctypes
import io
import math
import mmap
import os
import pickle
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch

_ALIGN = 64  # bytes: a cache line, and a multiple of every dtype's size
_LEAST = 1 << 16  # bytes of a region
_MESSAGE = 1 << 15  # bytes of a message; a worker sends two before it waits


class Region(NamedTuple):
    """Part of a worker's memory file."""

    offset: int
    size: int


class _Spilled(NamedTuple):
    """A long message, itself in a region."""

    data: torch.Tensor  # uint8


def available() -> bool:
    """Whether this system has anonymous memory files (Linux)."""
    return hasattr(os, "memfd_create")


class Writer:
    """The worker's side: where collate puts its tensors, and how a batch becomes bytes.

    Without a memory file (`fd` None) everything goes into the bytes.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._end = 0  # of the file
        self._free: dict[Region, mmap.mmap] = {}
        self._lent: dict[Region, mmap.mmap] = {}
        self._usual = 0  # bytes that the largest batch so far needed
        self._regions: list[Region] = []  # of the batch at hand: one, but for the first batches and outsized ones
        self._memory: list[torch.Tensor] = []  # uint8, theirs
        self._used = 0  # bytes of the last of them
        self._needed = 0  # bytes of the batch at hand

    def begin(self, released: list[Region]) -> None:
        """Take back regions, and prepare one for the next batch."""
        for region in released:
            self._free[region] = self._lent.pop(region)
        self._usual = max(self._usual, self._needed)
        self._regions, self._memory, self._used, self._needed = [], [], 0, 0
        if self._usual:
            self._open(self._usual)

    def _open(self, num_bytes: int) -> None:
        fitting = [region for region in self._free if region.size >= num_bytes]
        if fitting:
            region = min(fitting, key=lambda r: r.size)
            memory = self._free.pop(region)
        else:
            for outgrown in self._free.values():
                outgrown.madvise(mmap.MADV_REMOVE)  # gives the pages back; the hole in the file costs nothing
            self._free.clear()
            assert self._fd is not None
            size = -(-max(num_bytes + num_bytes // 8, _LEAST) // mmap.PAGESIZE) * mmap.PAGESIZE
            region = Region(self._end, size)
            self._end += size
            os.ftruncate(self._fd, self._end)
            memory = mmap.mmap(self._fd, size, offset=region.offset)
        self._lent[region] = memory
        self._regions.append(region)
        self._memory.append(torch.frombuffer(memory, dtype=torch.uint8))
        self._used = 0

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor of the batch at hand."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._fd is None or not num_bytes:
            return torch.empty(shape, dtype=dtype)
        if not self._memory or self._used + num_bytes > len(self._memory[-1]):
            self._open(num_bytes)
        found = self._memory[-1][self._used : self._used + num_bytes].view(dtype).view(shape)
        aligned = -(-num_bytes // _ALIGN) * _ALIGN
        self._used += aligned
        self._needed += aligned
        return found

    def dump(self, value: Any) -> tuple[bytes, list[Region]]:
        """Encode a value; its dense CPU tensors lie in the regions that are returned."""
        data = _encode(value, self)
        if len(data) > _MESSAGE and self._fd is not None:  # more could fill the socket while nobody reads it
            data = _encode(_Spilled(torch.frombuffer(bytearray(data), dtype=torch.uint8)), self)
        return data, self._regions

    def place(self, tensor: torch.Tensor) -> tuple[int, int, torch.dtype, tuple[int, ...], tuple[int, ...]] | None:
        """Where a tensor lies (number of the region, offset), copied there if need be; None: it has to be pickled."""
        if self._fd is None or not _is_dense(tensor):
            return None
        for number, memory in enumerate(self._memory):
            if tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr():
                offset = tensor.data_ptr() - memory.data_ptr()
                return number, offset, tensor.dtype, tuple(tensor.shape), tensor.stride()
        return self.place(self.allocate(tuple(tensor.shape), tensor.dtype).copy_(tensor))


def _is_dense(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.nbytes > 0
        and not (tensor.is_nested or tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _encode(value: Any, writer: Writer) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, writer).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, writer: Writer) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self._writer = writer

    def persistent_id(self, obj: Any) -> Any:
        return self._writer.place(obj) if isinstance(obj, torch.Tensor) else None


class MemoryReader:
    """The main process's side: bytes and a region become a batch; the region is free when the batch is gone."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._maps: dict[Region, mmap.mmap] = {}
        self._released: deque[Region] = deque()  # filled from whichever thread drops the last tensor

    def load(self, data: bytes, regions: list[Region]) -> Any:
        """Decode a batch whose tensors are views of its regions."""
        storages = [self._lease(region) for region in regions]
        value = _Unpickler(io.BytesIO(data), storages).load()
        if isinstance(value, _Spilled):
            value = _Unpickler(io.BytesIO(value.data.numpy().tobytes()), storages).load()
        return value

    def released(self) -> list[Region]:
        """Regions whose batches are gone, each told once."""
        return [self._released.popleft() for _ in range(len(self._released))]

    def close(self) -> None:
        """Let go of the memory; batches that are still alive keep theirs."""
        self._maps.clear()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _lease(self, region: Region) -> torch.UntypedStorage:
        if region not in self._maps:
            assert self._fd is not None
            self._maps[region] = mmap.mmap(self._fd, region.size, offset=region.offset)
        lease = (ctypes.c_char * region.size).from_buffer(self._maps[region])
        weakref.finalize(lease, self._released.append, region).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8).untyped_storage()  # it keeps the lease alive


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, storages: list[torch.UntypedStorage]) -> None:
        super().__init__(buffer)
        self._storages = storages

    def persistent_load(self, pid: Any) -> torch.Tensor:
        number, offset, dtype, shape, stride = pid
        storage = self._storages[number]
        return torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, shape, stride)
