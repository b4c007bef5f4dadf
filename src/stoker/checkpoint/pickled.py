"""What a pickle would call, told without calling it."""

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stoker.errors import UserError
from stoker.naming.reasons import listed

_MOST_BYTES = 64 << 20  # of a file's description of its tensors: 1 MB describes ten thousand
# How a file of torch before 1.6 begins: a pickle of a number that stands for torch; last, by protocol 0 or 1.
_LEGACY = re.compile(
    rb"\x80[\x02-\x05](?:\x95.{8})?\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.|L119547037146038801333356L\n\.", re.DOTALL
)
_LEGACY_PICKLES = 5  # that number, a version, the machine, the content, the names of storages

# What a state dict is made of. torch.load has a list of its own, which other libraries extend in passing; a file
# is held against this one first.
_KNOWN = re.compile(
    r"collections (OrderedDict|Counter)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch(\.cuda)? \w+Storage|torch\.storage (Untyped|Typed)Storage"
    r"|torch (Size|device|u?int\d+|float\d+\w*|bfloat16|complex\d+|bool|double|float|half|long|short)"
    r"|torch\.serialization _get_layout"
    r"|_codecs encode"
    r"|builtins (set|complex)"
)

_STRINGS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_SILENT = {"PROTO", "FRAME", "MARK"}
_NEWER = {"STACK_GLOBAL", "FRAME", "MEMOIZE", "SHORT_BINUNICODE", "BINUNICODE8", "NEWOBJ_EX"}  # than protocol 3


def is_legacy(head: bytes) -> bool:
    """Whether a file begins as torch before 1.6 wrote it."""
    return _LEGACY.match(head) is not None


def globals_of(pickle: IO[bytes]) -> Iterator[str]:
    """Every `module name` that a pickle would look up; a place that only running it would tell is called `?`.

    Raises:
        ValueError: it is no pickle.
    """
    recent: list[str | None] = [None, None]
    memo: dict[int, str | None] = {}
    value: Any
    for code, value, _ in pickletools.genops(pickle):
        name = code.name
        if name in ("GLOBAL", "INST"):
            yield _named(str(value))
        elif name == "STACK_GLOBAL":
            yield f"{recent[-2] or '?'} {recent[-1] or '?'}"
        elif name in ("EXT1", "EXT2", "EXT4"):
            yield f"? extension {value}"
        if name == "MEMOIZE":
            memo[len(memo)] = recent[-1]
        elif name in _PUTS:
            memo[int(value)] = recent[-1]
        elif name not in _SILENT:
            pushed = value if name in _STRINGS else memo.get(int(value)) if name in _GETS else None
            recent = [recent[-1], pushed if isinstance(pushed, str) else None]


def _named(found: str) -> str:
    """The name in Python 3 of what a pickle of Python 2's protocols looks up."""
    module, _, name = found.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module} {name}"


def _newer(pickle: IO[bytes]) -> bool:
    return any(code.name in _NEWER for code, _, _ in pickletools.genops(pickle))


def _check(path: Path, pickle: IO[bytes]) -> None:
    """Refuse a pickle that names anything but the parts of a state dict.

    Raises:
        UserError: naming the first such thing.
    """
    try:
        strange = [found for found in globals_of(pickle) if not _KNOWN.fullmatch(found)]
    except Exception as error:  # whatever a forged file makes of the parser
        raise damaged(path, error) from None
    if strange:
        raise _refused(path, [found.replace(" ", ".") for found in dict.fromkeys(strange)])


def damaged(path: Path, error: Exception) -> UserError:
    """The message for a file that its own format cannot read."""
    return UserError(
        f"{path} is cut off or damaged: {str(error)[:200] or type(error).__name__}", remedy="download it again"
    )


def _refused(path: Path, asked: list[str]) -> UserError:
    out = path.with_name(f"{path.stem}-weights.pt").name
    load = f"m = torch.load({path.name!r}, weights_only=False)"
    first = asked[0]
    kept = f"torch.save(m['state_dict'], {out!r})"
    what = "data of another program's own types beside its weights"
    if any(name.startswith("torch.nn.modules.") for name in asked):
        what, kept = "a whole module, not its weights", f"torch.save(m.state_dict(), {out!r})"
    elif any(name.split(".")[0] in ("os", "posix", "nt", "subprocess", "sys", "builtins") for name in asked):
        what = "a program, or data of a kind that could be one"
    return UserError(
        f"{path} asks for {first}, and is not read: reading it would run code",
        why=f"it holds {what}; it asks for {listed(asked)}",
        remedy=f'where it was written, and if you trust it: python -c "import torch; {load}; {kept}"',
    )


def check_zip(path: Path) -> None:
    """Look through a file of torch's zip format before anything opens it.

    Raises:
        UserError: it is another kind of archive, claims sizes that it does not have, or asks for code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            (record,) = [entry for entry in entries if _is_content(entry.filename)]
            with archive.open(record) as pickle:
                if _newer(pickle):
                    pickle.seek(0)
                    _check(path, pickle)
                    raise UserError(
                        f"{path} was saved by pickle protocol 4 or 5, of which torch reads none without running it",
                        remedy="save it again without pickle_protocol=",
                    )
            with archive.open(record) as pickle:
                _check(path, pickle)
    except UserError:
        raise
    except Exception as error:  # whatever a forged file makes of the parser
        raise damaged(path, error) from None


def _is_content(name: str) -> bool:
    return name.count("/") == 1 and name.endswith("/data.pkl")


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UserError(
            f"{path} is a TorchScript archive: a program with its weights",
            why="loading one runs its code",
            remedy=f'where you trust it: python -c "import torch; m = torch.jit.load({path.name!r}); '
            f'torch.save(m.state_dict(), {path.stem + "-weights.pt"!r})"',
        )
    if {"run.json", "manifest.json"} <= {*names}:
        raise UserError(
            f"{path} is a run that `stoker pack` put into one file",
            remedy=f"stoker unpack {path} DIR, then stoker load DIR",
        )
    if sum(map(_is_content, names)) != 1:
        raise UserError(
            f"{path} is a zip archive that torch.save did not write: it holds {listed(names) or 'nothing'}",
            remedy="unpack it, and give the weights file that is inside",
        )
    claimed = sum(entry.file_size for entry in entries)
    (content,) = [entry for entry in entries if _is_content(entry.filename)]
    if (
        len(set(names)) < len(names)
        or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        or claimed > path.stat().st_size
        or content.file_size > _MOST_BYTES
    ):
        raise UserError(
            f"{path} is not as torch.save writes it: packed, with two entries of one name, or larger than the file",
            why=f"its {len(entries)} entries claim {claimed} bytes, the file has {path.stat().st_size}",
            remedy="download it again, from a source that you trust",
        )


class _Bounded:
    """A file that ends after so many bytes, so that what is looked through ends too."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, count: int) -> bytes:
        return self._file.read(count) if self._inside(count) else b""

    def readline(self) -> bytes:
        return self._file.readline(_MOST_BYTES) if self._inside(0) else b""

    def tell(self) -> int:
        return self._file.tell()

    def _inside(self, count: int) -> bool:
        return self._file.tell() + count <= _MOST_BYTES


def check_legacy(path: Path) -> None:
    """Look through the pickles that a file of torch before 1.6 begins with.

    Raises:
        UserError: one asks for code, or the file is cut off.
    """
    with path.open("rb") as file:
        bounded: Any = _Bounded(file)
        for _ in range(_LEGACY_PICKLES):
            _check(path, bounded)


def unsupported(path: Path, head: bytes) -> UserError:
    """The message for a file of no known kind: a pickle names what it asks for."""
    if head[:1] == b"\x80" or head[:1] in b"(c]}IlL.N":
        try:
            with path.open("rb") as file:
                bounded: Any = _Bounded(file)
                asked = [found.replace(" ", ".") for found in dict.fromkeys(globals_of(bounded))]
        except Exception:  # no pickle
            asked = []
        if asked:
            return _refused(path, asked)
        if head[:1] == b"\x80":
            return UserError(
                f"{path} is a pickle that torch.save did not write, or is cut off", remedy="save it with torch.save"
            )
    return UserError(
        f"{path} is no weights file: it begins with {head[:16]!r}",
        why="safetensors, and what torch.save writes, are read",
        remedy="download it again, or save model.state_dict()",
    )
