"""Which files something was read from, and whether they are still the same."""

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from stoker.data.fingerprint import is_library

# Size, dates of contents and of entry (ns), inode. None: there is no such file.
State = list[int] | None
# Path, state when it was read, hash of the contents. An empty state has yet to be confirmed by the contents.
Read = tuple[str, State, str | None]

_HASHED_BYTES = 64 << 20  # larger files are known by their state alone
_SETTLED_NS = 2_000_000_000  # a file can be written twice within one tick of its file system's clock
_SYSTEM = ("/proc/", "/dev/", "/sys/")
_REMEMBERED = 4096


@dataclass
class Recording:
    """Files and folders that were opened, with their state then; and those that were written."""

    opened: dict[str, State] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def reads(self, also: Iterable[str] = ()) -> list[Read] | None:
        """What was read, and `also`; None where a file changed meanwhile: what was read of it is anybody's guess."""
        opened = {path: state for path, state in self.opened.items() if path not in self.written}
        for path in also:
            opened.setdefault(path, state_of(path))
        found = [(path, state, digest_of(path, state)) for path, state in opened.items()]
        if any(state_of(path) != state for path, state in opened.items()):
            return None
        return [(path, state if _settled(state) else [], digest) for path, state, digest in found]


_ACTIVE: list[Recording] = []


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the files that Python code opens inside, in any thread; what C code opens itself is not seen."""
    _install()
    record = Recording()
    _ACTIVE.append(record)
    try:
        yield record
    finally:
        _ACTIVE.remove(record)


@cache
def _install() -> None:
    sys.addaudithook(_hook)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _ACTIVE and event in ("open", "os.listdir", "os.scandir"):
        flags = args[2] if event == "open" and isinstance(args[2], int) else 0
        try:
            _note("." if args[0] is None else args[0], flags)
        except (OSError, ValueError, TypeError):
            return  # not a path; whoever opens it will say so


def _note(path: Any, flags: int) -> None:
    if isinstance(path, int):
        return
    name = os.path.abspath(os.fsdecode(path))
    if name.startswith(_SYSTEM) or name.endswith(".pyc") or is_library(name):
        return
    writes = flags & os.O_ACCMODE == os.O_WRONLY or flags & (os.O_CREAT | os.O_TRUNC)
    state = None if writes else state_of(name)
    for record in list(_ACTIVE):
        if writes:
            record.written.add(name)
        else:
            record.opened.setdefault(name, state)


def state_of(path: str) -> State:
    """Return the size, dates and inode of a file; about 2 us."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _settled(state: State) -> bool:
    return state is None or (bool(state) and max(state[1], state[2]) < time.time_ns() - _SETTLED_NS)


_DIGESTS: dict[tuple[str, tuple[int, ...]], str] = {}


def digest_of(path: str, state: State) -> str | None:
    """Hash of a file's contents, or of the names in a folder; None for what is absent, large or no plain file."""
    if state is None:
        return None
    key = path, tuple(state)
    if key in _DIGESTS:
        return _DIGESTS[key]
    try:
        found = Path(path)
        if found.is_dir():
            data = "\0".join(sorted(os.listdir(path))).encode("utf-8", "surrogateescape")
        elif found.is_file() and state[0] <= _HASHED_BYTES:
            data = found.read_bytes()
        else:
            return None
    except OSError:
        return None
    digest = hashlib.sha256(data).hexdigest()[:32]
    if _settled(state):
        if len(_DIGESTS) >= _REMEMBERED:
            _DIGESTS.clear()
        _DIGESTS[key] = digest
    return digest


def unchanged(reads: list[Read]) -> bool:
    """Whether every file is in the state that it was read in."""
    return all(state_of(path) == state for path, state, _ in reads)


def confirmed(reads: list[Read]) -> list[Read] | None:
    """Reads with the files' new states, if their contents are what was read; None if they are not."""
    renewed: list[Read] = []
    for path, state, digest in reads:
        now = state_of(path)
        if now != state and (digest is None or now is None or digest_of(path, now) != digest):
            return None
        renewed.append((path, now if _settled(now) else [], digest))
    return renewed


def bytes_read() -> tuple[int, int] | None:
    """Bytes that this thread has read from files and pipes, and how many of them asking will have added."""
    try:
        with open("/proc/thread-self/io", "rb", buffering=0) as file:
            text = file.read()
    except OSError:
        return None
    return int(text.split()[1]), len(text)
