"""How an exported file comes to be: under another name, moved when it is complete; whatever fails is told."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, cast

from stoker.errors import UserError
from stoker.export.telling import brief


@contextmanager
def replacing(path: Path, chosen: bool) -> Iterator[Path]:
    """Yield a name in a new folder beside `path`; what is there at the end is moved to where `path` is.

    A folder, since ONNX's large weights are a second file, whose name the first one holds. `chosen`: the user named the
    file; otherwise its folder is made, too.

    Raises:
        UserError: it cannot be written.
    """
    partial = None
    try:
        if not chosen:
            path.parent.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        yield partial / path.name
        for file in sorted(partial.iterdir(), key=lambda file: file.name == path.name):  # the one asked for last
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            file.replace(path.parent / file.name)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}",
            why="the disk is full, its quota is used up, or it is not writable",
            remedy="make room, or name a file elsewhere: --out FILE",
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell what a library raises while it writes as a file that could not be written.

    Raises:
        UserError: anything but an OSError, which tells that by itself.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot write {path.name}", why=brief(error), remedy="make room, if the disk is full"
        ) from error


class _Patient(RawIOBase):
    """A file that seems to take everything, and remembers the first write that failed."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset  # torch rewinds what it has written, for whoever reads it next


@contextmanager
def patient(path: Path) -> Iterator[BinaryIO]:
    """Open a file for torch's writer of archives, which a failing write makes end the process: its destructor throws.

    Raises:
        OSError: something could not be written; told once the writer is done.
    """
    with path.open("wb") as file:
        taking = _Patient(file)
        yield cast(BinaryIO, taking)
        if taking.error is not None:
            raise taking.error
