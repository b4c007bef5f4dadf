"""Where decoded samples are kept: memory that forked processes share, or one SQLite file on disk.

See `reads` for an entry's reads, `samplecodec` for its header and payload. A store may forget any entry at any time.
"""

import contextlib
import fcntl
import mmap
import os
import sqlite3
import struct
import sys
import time
import zlib
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from stoker.data.limits import machine

_PAGE_BYTES = 16384  # an image is read in a few pages; 4096 takes twice as long
_BUSY_S = 60.0
_OURS = 0x53746B72  # SQLite's application_id
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_SLACK = 4  # times the first samples' mean size: memory that is not written to costs nothing
_HEAD = struct.Struct("<QQQ")  # lengths of reads, header and payload, before them in memory


class Entry(NamedTuple):
    """A sample, and where it was read from."""

    reads: str
    header: str
    payload: bytearray
    place: int = 0  # in memory, to tell it from a later one of the same row


def tell(text: str) -> None:
    """Say on stderr what the user would want to know and need not stop for."""
    print(f"stoker: {text}", file=sys.stderr, flush=True)


class Store(Protocol):
    """Keeps entries by row, for every process that has it."""

    def get(self, row: int) -> Entry | None:
        """Return the entry, its payload being the caller's own; None if there is none, or a damaged one."""
        ...

    def put(self, row: int, entry: Entry) -> None:
        """Keep an entry, if there is room."""
        ...

    def renew(self, row: int, entry: Entry, reads: str) -> None:
        """Replace the reads of an entry that `get` returned."""
        ...


class Memory:
    """Entries in anonymous memory, shared by this process and all that are forked from it.

    Args:
        rows: how many there may be.
        sample_bytes: mean size of an entry.
        limit_bytes: the most to take.
    """

    def __init__(self, rows: int, sample_bytes: int, limit_bytes: int) -> None:
        self._settings = rows, sample_bytes, limit_bytes
        self._rows = rows
        self._room = max(min(limit_bytes, int(sample_bytes * _SLACK * rows) + mmap.PAGESIZE), mmap.PAGESIZE)
        self._block = self._map()
        self._view = memoryview(self._block)
        shared = mmap.mmap(-1, 8 * rows + 24)
        self._starts = np.frombuffer(shared, np.int64, rows)  # + 1; 0 where there is no entry
        self._used = np.frombuffer(shared, np.int64, 3, 8 * rows)  # bytes, entries, whether it was said to be full
        self._lock = os.memfd_create("stoker-cache") if hasattr(os, "memfd_create") else -1
        self._renewed: dict[int, tuple[int, str]] = {}  # place, reads

    def __reduce__(self) -> Any:
        rows, sample_bytes, limit_bytes = self._settings  # a process that was not forked has memory of its own
        return Memory, (rows, sample_bytes, limit_bytes // (os.cpu_count() or 1))

    def _map(self) -> mmap.mmap:
        while True:
            try:
                return mmap.mmap(-1, self._room)  # lazily backed: only what is written to is taken
            except OSError:  # a machine that promises no more than it has
                if self._room == mmap.PAGESIZE:
                    raise
                self._room = max(self._room // 2, mmap.PAGESIZE)

    @contextlib.contextmanager
    def _locked(self) -> Any:
        """Exclude the other processes; a lock of the kernel's, which a killed process gives back."""
        if self._lock >= 0:
            fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if self._lock >= 0:
                fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def get(self, row: int) -> Entry | None:
        """See `Store`."""
        if not 0 <= row < self._rows:
            return None
        start = int(self._starts[row]) - 1
        if start < 0:
            return None
        lengths = _HEAD.unpack_from(self._block, start)
        reads, header, payload, end = accumulate(lengths, initial=start + _HEAD.size)
        place, text = self._renewed.get(row, (-1, ""))
        if place != start:  # renewed was another, or none
            text = str(self._view[reads:header], "utf-8")
        return Entry(text, str(self._view[header:payload], "utf-8"), bytearray(self._view[payload:end]), start)

    def put(self, row: int, entry: Entry) -> None:
        """See `Store`."""
        if not 0 <= row < self._rows:
            return
        parts = entry.reads.encode(), entry.header.encode(), entry.payload
        length = _HEAD.size + sum(map(len, parts))
        with self._locked():
            at = int(self._used[0])
            full = at + length > self._room
            if not full:
                self._used[0] = at + length
            elif not self._used[2]:
                self._used[2] = 1
                tell(
                    f"the sample cache is full: {int(self._used[1])} of {self._rows} samples fit in "
                    f"{_size(self._room)} of memory; what does not, or changes, is decoded every time"
                )
        if full:
            return
        end = at
        for part in (_HEAD.pack(*map(len, parts)), *parts):
            self._block[end : end + len(part)] = part
            end += len(part)
        with self._locked():  # after the bytes: whoever sees the start sees them
            self._used[1] += self._starts[row] == 0
            self._starts[row] = at + 1

    def renew(self, row: int, entry: Entry, reads: str) -> None:
        """See `Store`. Known to this process alone: the others will find out themselves."""
        self._renewed[row] = entry.place, reads


class _Opened(NamedTuple):
    connection: sqlite3.Connection
    process: int
    path: Path
    inode: int


_INHERITED: list[sqlite3.Connection] = []  # of a parent: closing them here would take its locks away


class Disk:
    """Entries in the file `KEY.sqlite`, for any number of processes at once; deleting it is safe at any time.

    A file that turns out to be damaged is left to those who have it open and replaced by `KEY.N.sqlite`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._opened: _Opened | None = None
        self._readable = self._writable = True
        self._damaged: set[int] = set()

    def __reduce__(self) -> Any:
        return Disk, (self.folder, self.key)

    def get(self, row: int) -> Entry | None:
        """See `Store`."""
        sql = "SELECT reads, header, payload, crc FROM samples WHERE row = ?"

        def use(connection: sqlite3.Connection) -> Entry | None:
            found = connection.execute(sql, (row,)).fetchone()
            if found is None:
                return None
            with contextlib.suppress(TypeError, AttributeError, UnicodeEncodeError):  # of other types
                if _crc(row, *found[:3]) == found[3]:
                    return Entry(found[0], found[1], bytearray(found[2]))
            if row in self._damaged:  # though it was written anew
                raise _ForeignError(f"sample {row} is damaged again")
            self._damaged.add(row)
            tell(f"the sample cache is damaged at sample {row}, which is decoded again: {self._path()}")
            return None

        entry: Entry | None = self._run(use, False) if self._readable else None
        return entry

    def put(self, row: int, entry: Entry) -> None:
        """See `Store`."""
        values = (row, *entry[:3], _crc(row, *entry[:3]))
        sql = "INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?)"
        if self._writable:
            self._run(lambda connection: connection.execute(sql, values), True)

    def renew(self, row: int, entry: Entry, reads: str) -> None:
        """See `Store`."""
        self.put(row, entry._replace(reads=reads))

    def _run(self, use: Callable[[sqlite3.Connection], Any], writes: bool) -> Any:
        """Use the database; where it cannot be used, say so once and do without."""
        for attempt in range(3):
            try:
                return use(self._connection())
            except (sqlite3.DataError, OverflowError):  # larger than SQLite's 1 GB
                return None
            except (sqlite3.Error, OSError) as error:
                if attempt < 2 and self._replaced(error):
                    continue
                if self._readable and self._writable:
                    tell(f"going on without {'adding to ' if writes else ''}the sample cache in {self.folder}: {error}")
                self._writable = False
                self._readable = self._readable and writes  # what was kept is still good
                return None
        return None

    def _replaced(self, error: Exception) -> bool:
        """Whether there is now another file to try: this one is damaged, or was deleted."""
        name = getattr(error, "sqlite_errorname", "")
        path = self._opened.path if self._opened else self._path()
        damaged = name.startswith(_DAMAGE) or isinstance(error, _ForeignError)
        gone = self._opened is not None and _inode(path) != self._opened.inode
        if self._opened is not None:
            _INHERITED.append(self._opened.connection)  # not closed: others may have the file
            self._opened = None
        if damaged and path == self._path():
            tell(f"the sample cache is damaged ({error}) and begun anew: {path}")
            number = int(path.stem.rpartition(".")[2]) + 1 if "." in path.stem else 1
            with contextlib.suppress(OSError):
                path.with_name(f"{self.key}.{number}.sqlite").touch()
                for ending in ("", "-wal", "-shm"):
                    Path(f"{path}{ending}").unlink(missing_ok=True)
        return damaged or gone

    def _path(self) -> Path:
        """Newest file of this key."""
        numbered = self.folder.glob(f"{self.key}.[0-9]*.sqlite")
        first = self.folder / f"{self.key}.sqlite"
        return max(numbered, key=lambda path: int(path.stem.rpartition(".")[2]), default=first)

    def _connection(self) -> sqlite3.Connection:
        if self._opened is not None and self._opened.process == os.getpid():
            return self._opened.connection
        if self._opened is not None:
            _INHERITED.append(self._opened.connection)
        self._opened = None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path()
        connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        connection.text_factory = lambda text: text.decode("utf-8", "replace")  # what is damaged fails the checksum
        _patiently(lambda: _prepare(connection))
        self._opened = _Opened(connection, os.getpid(), path, _inode(path))
        return connection


class _ForeignError(sqlite3.Error):
    """A database that is not a sample cache."""


def _prepare(connection: sqlite3.Connection) -> None:
    for pragma in (f"page_size = {_PAGE_BYTES}", "journal_mode = WAL", "synchronous = OFF"):
        connection.execute(f"PRAGMA {pragma}").fetchone()  # synchronous: a power cut may lose or damage what crc finds
    if _is_ours(connection):
        return
    connection.execute("BEGIN IMMEDIATE")  # one of all that begin at once
    try:
        if not _is_ours(connection):
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise _ForeignError("it is not a sample cache")
            connection.execute(
                "CREATE TABLE samples (row INTEGER PRIMARY KEY, reads TEXT, header TEXT, payload BLOB, crc INTEGER)"
            )
            connection.execute(f"PRAGMA application_id = {_OURS}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _is_ours(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("PRAGMA application_id").fetchone()[0] == _OURS)


def _patiently(action: Callable[[], None]) -> None:
    """Repeat what SQLite does not wait for itself while others have the database: changing its journal."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _crc(row: int, reads: str, header: str, payload: bytes | bytearray) -> int:
    return zlib.crc32(payload, zlib.crc32(f"{row}\n{reads}\n{header}".encode()))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _inode(path: Path) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1


def memory_limit() -> int:
    """Half of the memory (bytes) that this process may still take."""
    return (machine().memory_bytes or 0) // 2
