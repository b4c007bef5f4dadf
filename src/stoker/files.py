"""Files of a run's folder, which may come from a stranger: nothing is read or written through a link inside it."""

import os
import shutil
import stat
from io import BufferedReader
from pathlib import Path

_TEXT_BYTES = 1 << 29  # no record of a run is larger


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: it is not there, a link, a pipe, a device or a folder.
    """
    # A pipe would otherwise be waited for, and a link followed.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """Return a record's text.

    Raises:
        OSError: as `open_regular` does, or it is absurdly large.
        ValueError: it is not UTF-8.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _TEXT_BYTES:
            raise OSError(f"{path.name} has more than {_TEXT_BYTES} bytes")
        return file.read().decode("utf-8")


def own_folder(path: Path) -> Path:
    """Make a folder of the run's where there is none.

    Raises:
        OSError: it is a link out of the run, or cannot be made.
    """
    if path.is_symlink():
        raise OSError(f"{path} is a link: the run's own folder may be one, those inside it may not")
    path.mkdir(exist_ok=True)
    return path


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points at) or a folder with all it holds, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.tmp")
    remove(partial)
    with partial.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)
