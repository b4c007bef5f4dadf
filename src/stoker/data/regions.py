"""Batches in memory that two processes share, written by one and read by the other without a copy.

Each worker has one memory file. A large tensor lies in a region of it, which is used again once that tensor and all
views of it are gone in the reading process. So there are no page faults after the first batches, nothing in /dev/shm
(whose size in containers is often 64 MB), and nothing to clean up: a memory file ends with its processes.
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

_SMALL = 1 << 14  # bytes; a tensor below it travels in the message: kept labels must not keep images
_SEGMENT = 1 << 24  # bytes, at least, by which a file grows: a mapping each, and so a file descriptor
_MESSAGE = 1 << 15  # bytes of a message; a worker sends two before it waits
_SPARE = 4  # batches as large as the largest, for which memory may lie idle
_WASTE = 2  # a region is used again for tensors down to this part of its size


class Region(NamedTuple):
    """Part of a worker's memory file."""

    segment: int  # its offset in the file,
    segment_size: int
    offset: int  # in the segment
    size: int


class _Spilled(NamedTuple):
    """A long message, itself in a region."""

    data: torch.Tensor  # uint8


def available() -> bool:
    """Whether this system has anonymous memory files (Linux)."""
    return hasattr(os, "memfd_create")


class Segments:
    """A memory file as one process sees it: a few mappings, made when they are needed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._maps: dict[int, mmap.mmap] = {}

    def of(self, region: Region) -> mmap.mmap:
        """The mapping in which a region lies."""
        found = self._maps.get(region.segment)
        if found is None:
            found = self._maps[region.segment] = mmap.mmap(self._fd, region.segment_size, offset=region.segment)
        return found


class Writer:
    """The worker's side: where collate puts its tensors, and how a batch becomes bytes.

    Without a memory file (`fd` None) everything goes into the bytes.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._segments = Segments(fd) if fd is not None else None
        self._end = self._size = self._used = 0  # of the file; of its last segment; how much of that is given out
        self._free: list[Region] = []
        self._empty: set[Region] = set()  # free, and without pages
        self._largest = 0  # bytes of the largest batch
        self._begun: dict[int, tuple[Region, torch.Tensor]] = {}  # by address, of the batch at hand
        self._sent: dict[Region, int] = {}  # of the batch at hand: its place in the message

    def begin(self, released: list[Region]) -> None:
        """Take back regions, and those that were allocated for the last batch but are not part of it."""
        self._free += released
        self._free += [region for region, _ in self._begun.values() if region not in self._sent]
        self._largest = max(self._largest, sum(region.size for region, _ in self._begun.values()))
        self._begun, self._sent = {}, {}
        if sum(region.size for region in self._free if region not in self._empty) > _SPARE * self._largest:
            self._give_back()

    def _give_back(self) -> None:
        """Return the pages of regions that are of no use now: batches that vary in size leave them behind."""
        for region in self._free:
            if region not in self._empty and self._segments is not None:
                self._segments.of(region).madvise(mmap.MADV_REMOVE, region.offset, region.size)
                self._empty.add(region)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor of the batch at hand."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._segments is None or num_bytes < _SMALL:
            return torch.empty(shape, dtype=dtype)
        region = self._region(num_bytes)
        memory = torch.frombuffer(self._segments.of(region), dtype=torch.uint8, count=region.size, offset=region.offset)
        self._begun[memory.data_ptr()] = region, memory
        return memory[:num_bytes].view(dtype).view(shape)

    def _region(self, num_bytes: int) -> Region:
        fitting = [region for region in self._free if num_bytes <= region.size <= _WASTE * num_bytes]
        if fitting:
            region = min(fitting, key=lambda r: r.size)
            self._free.remove(region)
            self._empty.discard(region)
            return region
        size = -(-(num_bytes + num_bytes // 8) // mmap.PAGESIZE) * mmap.PAGESIZE  # the next may be a little larger
        if self._used + size > self._size:
            assert self._fd is not None
            self._end += self._size
            self._size, self._used = max(_SEGMENT, 2 * self._size, size), 0
            os.ftruncate(self._fd, self._end + self._size)  # takes no memory until it is written
        region = Region(self._end, self._size, self._used, size)
        self._used += size
        return region

    def dump(self, value: Any) -> tuple[bytes, list[Region]]:
        """Encode a value; its large dense CPU tensors lie in the regions that are returned."""
        data = _encode(value, self)
        if len(data) > _MESSAGE and self._fd is not None:  # more could fill the socket while nobody reads it
            data = _encode(_Spilled(torch.frombuffer(bytearray(data), dtype=torch.uint8)), self)
        return data, list(self._sent)

    def place(self, tensor: torch.Tensor) -> Any:
        """How the message refers to a tensor, which is copied into a region if need be; None: it is pickled."""
        if self._fd is None or not _is_dense(tensor):
            return None
        held = self._begun.get(tensor.untyped_storage().data_ptr())
        if held is None and tensor.nbytes < _SMALL:
            return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), tensor.dtype, tuple(tensor.shape)
        if held is None:
            return self.place(self.allocate(tuple(tensor.shape), tensor.dtype).copy_(tensor))
        number = self._sent.setdefault(held[0], len(self._sent))
        offset = tensor.data_ptr() - held[1].data_ptr()
        return number, offset, tensor.dtype, tuple(tensor.shape), tensor.stride()


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
    """The main process's side: bytes and regions become a batch; a region is free when its tensor is gone."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._segments = Segments(fd) if fd is not None else None
        self._released: deque[Region] = deque()  # filled from whichever thread drops the last tensor

    def load(self, data: bytes, regions: list[Region]) -> Any:
        """Decode a batch whose large tensors are views of its regions."""
        storages = [self._lease(region) for region in regions]
        value = _Unpickler(io.BytesIO(data), storages).load()
        if isinstance(value, _Spilled):
            value = _Unpickler(io.BytesIO(value.data.numpy().tobytes()), storages).load()
        return value

    def released(self) -> list[Region]:
        """Regions whose tensors are gone, each told once."""
        return [self._released.popleft() for _ in range(len(self._released))]

    def close(self) -> None:
        """Let go of the memory; tensors that are still alive keep theirs."""
        self._segments = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _lease(self, region: Region) -> torch.UntypedStorage:
        assert self._segments is not None
        lease = (ctypes.c_char * region.size).from_buffer(self._segments.of(region), region.offset)
        weakref.finalize(lease, self._released.append, region).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8).untyped_storage()  # it keeps the lease alive


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, storages: list[torch.UntypedStorage]) -> None:
        super().__init__(buffer)
        self._storages = storages

    def persistent_load(self, pid: Any) -> torch.Tensor:
        if isinstance(pid[0], bytes):
            return torch.frombuffer(bytearray(pid[0]), dtype=pid[1]).view(pid[2])
        number, offset, dtype, shape, stride = pid
        storage = self._storages[number]
        return torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, shape, stride)
