"""`stoker pack`: a finished run in one file, from which it can be opened, or run again, on another machine.

The file is a zip whose members are stored as they are: the same run gives the same bytes, and nothing in it can grow
while it is taken out. Its manifest names every member with size and checksum; what it does not name is refused.
"""

import ast
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from stoker import __version__
from stoker.checkpoint.store import Damaged, read_record
from stoker.errors import UserError
from stoker.files import open_regular, sync
from stoker.recall import require_identity
from stoker.run import Identity, RunDir
from stoker.sharing.environment import environment
from stoker.start import Run

FORMAT = 1
SUFFIX = ".stoker.zip"
_MANIFEST = "manifest.json"
_MANIFEST_BYTES = 1 << 26
_PLAIN = ("run.json", "recipe.py", "events.jsonl", "environment.json")
_CHUNK = 1 << 20
_NAMELESS = re.compile(r"[^\w.-]+")

# What zipfile is known to raise on files that are none, or that were altered.
_NOT_A_ZIP = (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, ValueError, EOFError)


@dataclass(frozen=True)
class Packed:
    """An archive that was written.

    Attributes:
        path: the file.
        bytes: its size.
        files: how many files it holds.
        notes: what it does not hold and the run may need.
    """

    path: Path
    bytes: int
    files: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Whole:
    """A finished run that can be run again, as its records describe it.

    Attributes:
        members: size and checksum of every file of its checkpoints but their records, by name in the run.
        links: names of its latest and best checkpoints.
    """

    folder: RunDir
    identity: Identity
    step: int
    events_bytes: int
    members: Mapping[str, tuple[int, str]]
    links: Mapping[str, str | None]

    def names(self) -> list[str]:
        """Names of all the run's files that an archive holds."""
        modules = [f"source/{name}" for name in self.identity.modules]
        records = {f"checkpoints/{name}/checkpoint.json" for name in self.links.values() if name is not None}
        return sorted({"run.json", "recipe.py", "events.jsonl", *modules, *self.members, *records})


def whole(run: Path) -> Whole:
    """Look at a run's records; its files are not read.

    Raises:
        UserError: there is no run, it is not finished, it is damaged, or it cannot be run again.
    """
    folder = RunDir(run)
    identity = require_identity(folder)
    refuse_malformed(identity, run)
    if identity.function is None:
        raise UserError(
            f"{run}: its recipe cannot be run again from the run alone",
            why="it was not returned by a function at the top level of a file, called with plain arguments",
            remedy="move the recipe into a function in a file, and train that",
        )
    latest, best = folder.store.latest(), folder.store.best()
    if latest is None:
        raise UserError(f"{run} is not finished", why="it has no checkpoint yet", remedy=f"stoker resume {run}")
    members: dict[str, tuple[int, str]] = {}
    try:
        record = read_record(latest)
        for path in {latest, best} - {None}:
            assert path is not None
            for name, entry in read_record(path)["files"].items():
                members[f"checkpoints/{path.name}/{name}"] = int(entry["bytes"]), str(entry["sha256"])
        progress, events_bytes = record["state"]["progress"], int(record["state"]["events_bytes"])
        step, epoch, finished = int(progress["step"]), int(progress["epoch"]), progress["finished"]
    except (Damaged, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{run}: a damaged checkpoint: {error}",
            remedy=f"move it away, and `stoker resume {run}` trains again from the one before",
        ) from None
    limits = [(identity.epochs, epoch), (identity.steps, step)]
    extended = finished in ("epochs", "steps") and all(limit is None or done < limit for limit, done in limits)
    if not finished or extended:  # extended: it goes on to a later end, in another process perhaps
        raise UserError(f"{run} is not finished", why=f"it is at step {step}", remedy=f"stoker resume {run}")
    bad = [name for name in members if not is_safe(name)]
    if bad:
        raise UserError(f"{run}: a checkpoint names a file outside itself: {bad[0]!r}")
    links = {"latest": latest.name, "best": best.name if best is not None else None}
    return Whole(folder, identity, step, events_bytes, dict(sorted(members.items())), links)


def refuse_malformed(identity: Identity, run: Path) -> None:
    """Refuse a `run.json` whose values have the wrong types, or whose modules lie elsewhere.

    Raises:
        UserError: naming the field.
    """
    kinds: dict[str, Any] = {
        "recipe": str,
        "function": str | None,
        "file": str | None,
        "arguments": Mapping,
        "seed": int,
        "precision": str,
        "epochs": int | None,
        "steps": int | None,
        "eval_every": int | None,
        "options": Mapping,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(identity, name), kind)]
    wrong += [f"module {name!r}" for name in identity.modules if not is_safe(f"source/{name}")]
    if wrong:
        raise UserError(
            f"{run}/run.json cannot be used: {wrong[0]}",
            why="it was damaged, or written by another version of stoker",
        )


def is_safe(name: str) -> bool:
    """Whether a name is a relative path of plain, visible parts, the same on every system."""
    parts = name.split("/")
    plain = all(part and not part.startswith(".") and part.isprintable() for part in parts)
    return plain and not any(mark in name for mark in '\\:*?"<>|')


def pack(run: Run | str | Path, out: str | Path | None = None, *, force: bool = False) -> Packed:
    """Write a finished run into one file: identity, source, events, its latest and best checkpoints, environment.

    The same run in the same environment gives the same bytes. Data are not packed.

    Args:
        run: a Run, or a run's folder.
        out: the file (default: beside the run's folder, named as it is).
        force: replace a file that is there.

    Raises:
        UserError: the run is not finished, damaged, or cannot be run again; or the file cannot be written.
    """
    path = run.dir if isinstance(run, Run) else Path(run)
    found = whole(path)
    place = path.resolve()
    named = path if path.name not in ("", "..") else place
    target = Path(out) if out is not None else named.with_name(named.name + SUFFIX)
    if target.is_dir() or (target.exists() and not force):
        raise UserError(f"{target} is there already", remedy="--force replaces a file; --out chooses another")
    if place in (target.resolve(), *target.resolve().parents):
        raise UserError(f"{target} lies in the run itself", remedy="choose an --out outside of it")
    texts = {"recipe.py": found.identity.source, **found.identity.modules}
    surroundings = json.dumps(environment(texts.values()), indent=1).encode()
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            count = _write(file, found, surroundings)
            file.flush()
            os.fsync(file.fileno())
        size = partial.stat().st_size
        partial.replace(target)
        sync(target.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}", remedy="make room there, or choose another --out"
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return Packed(target, size, count, tuple(outside(found.identity)))


def _write(file: IO[bytes], found: Whole, surroundings: bytes) -> int:
    """Write the archive; return the number of its files."""
    files = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted([*found.names(), "environment.json"]):
            if name == "environment.json":
                files[name] = _add(archive, name, BytesIO(surroundings), len(surroundings))
                continue
            with _open_member(found.folder.path, name) as source:
                size = found.events_bytes if name == "events.jsonl" else os.fstat(source.fileno()).st_size
                files[name] = _add(archive, name, source, size)
            entry = files[name]
            if found.members.get(name, (entry["bytes"], entry["sha256"])) != (entry["bytes"], entry["sha256"]):
                raise UserError(
                    f"{found.folder.path}: a damaged checkpoint: {name} does not match its checksum",
                    remedy=f"move it away, and `stoker resume {found.folder.path}` trains again from the one before",
                )
        manifest = {"format": FORMAT, "stoker": __version__, "links": found.links, "files": files}
        text = json.dumps(manifest, indent=1).encode()
        _add(archive, _MANIFEST, BytesIO(text), len(text))
    return len(files) + 1


def _open_member(run: Path, name: str) -> IO[bytes]:
    """Open a file of the run's own.

    Raises:
        UserError: it is absent, or reached through a link that may lead out of the run.
    """
    path = run / name
    for folder in [path, *path.parents][: name.count("/") + 1]:
        if folder.is_symlink():
            raise UserError(f"{folder} is a link", why="only what lies in the run itself is packed")
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _add(archive: zipfile.ZipFile, name: str, source: IO[bytes], size: int) -> dict[str, Any]:
    """Add a member of `size` bytes: no clock, no owner."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    info.file_size = size
    checksum, left = hashlib.sha256(), size
    with archive.open(info, "w") as target:
        while left and (chunk := source.read(min(_CHUNK, left))):
            target.write(chunk)
            checksum.update(chunk)
            left -= len(chunk)
    if left:
        raise UserError(
            f"{name} ends {left} bytes before it should",
            why="it was cut, or changed while it was packed",
            remedy="put it back from a copy, or train the run again",
        )
    return {"bytes": size, "sha256": checksum.hexdigest()}


def outside(identity: Identity) -> list[str]:
    """Notes on what the run may read that an archive does not hold."""
    notes = []
    for name, value in identity.arguments.items():
        for text in _strings(value):
            if _names_a_file(text):
                notes.append(
                    f"argument {name}: {text} is not packed; stoker reproduce ARCHIVE {name}=PATH names another"
                )
    for name, text in {"recipe.py": identity.source, **identity.modules}.items():
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and os.path.isabs(node.value):
                if _names_a_file(node.value) and os.path.exists(node.value):
                    notes.append(f"{name}:{node.lineno} names {node.value}, which is not packed")
            elif isinstance(node, ast.Name) and node.id == "__file__":
                notes.append(f"{name}:{node.lineno} looks beside its own file, from where only modules are packed")
    return notes


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _names_a_file(text: str) -> bool:
    if "\0" in text or "\n" in text or len(text) > 1024 or not text.strip("/"):
        return False
    known = os.path.exists(text) if "/" in text else os.path.isfile(text)
    return os.path.isabs(text) or text.startswith("~/") or known


def unpack(archive: str | Path, folder: str | Path) -> Path:
    """Take a run out of its archive, verified; nothing in it is run. Return its folder.

    Raises:
        UserError: the file is not an archive of a run, or was altered; the folder is in use or cannot be written.
            Nothing is left there then.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already", remedy="choose a new folder")
    partial = folder.absolute().with_name(f".{folder.absolute().name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.mkdir(parents=True)
        _extract_all(archive, partial)
        partial.replace(folder)  # over an empty one, if need be
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}", remedy="choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def opened(run: Run | str | Path) -> Iterator[Path]:
    """Folder of a run: the run's own, or a temporary one that an archive is taken out into.

    Raises:
        UserError: it is neither.
    """
    path = run.dir if isinstance(run, Run) else Path(run)
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="stoker-") as folder:
        name = _NAMELESS.sub("-", path.name.removesuffix(SUFFIX)).strip(".") or "run"
        yield unpack(path, Path(folder) / name)


def _extract_all(path: Path, folder: Path) -> None:
    if not path.is_file():
        what = f"there is no file {path}" if not path.exists() else f"{path} is not a file"
        raise UserError(what, remedy="give an archive that `stoker pack` made")
    try:
        with open_regular(path.resolve()) as file, zipfile.ZipFile(file) as archive:
            manifest = _read_manifest(archive, path, os.fstat(file.fileno()).st_size)
            for name, entry in manifest["files"].items():
                _extract(archive, name, entry, folder / name)
    except _NOT_A_ZIP as error:
        raise _refusal(path, str(error) or type(error).__name__) from None
    except OSError as error:
        if error.errno not in (errno.EINVAL, None):
            raise
        raise _refusal(path, "it points to places outside itself") from None
    for link, target in manifest["links"].items():
        if target is not None:
            (folder / "checkpoints" / link).symlink_to(target)
    _check_run(path, folder, manifest)


def _refusal(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not a run that `stoker pack` made, or it was altered",
        why=why,
        remedy="fetch the file again, or pack the run again",
    )


def _listing(archive: zipfile.ZipFile, path: Path, size: int) -> dict[str, int]:
    """Sizes of the members by name, from the zip's own directory.

    Raises:
        UserError: one of them is anything but a plain stored file under a safe name, or they claim more than there is.
    """
    listed: dict[str, int] = {}
    for info in archive.infolist():
        name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
        if name in listed:
            raise _refusal(path, f"it holds {name!r} twice")
        if not is_safe(name) or info.orig_filename != name:
            raise _refusal(path, f"it holds a file with the name {info.orig_filename!r}")
        if kind not in (0, stat.S_IFREG) or info.flag_bits & 1:
            raise _refusal(path, f"{name} is not a plain file")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise _refusal(path, f"{name} is compressed, which stoker's archives are not")
        listed[name] = info.file_size
    if sum(listed.values()) > size:
        raise _refusal(path, f"its files claim {sum(listed.values())} bytes, the archive has {size}")
    if listed.get(_MANIFEST, _MANIFEST_BYTES) >= _MANIFEST_BYTES:
        raise _refusal(path, f"it has no {_MANIFEST}, or an absurdly large one")
    return listed


def _read_manifest(archive: zipfile.ZipFile, path: Path, size: int) -> dict[str, Any]:
    """Read the manifest and hold the archive's own listing against it.

    Raises:
        UserError: it cannot be read, or they differ.
    """
    listed = _listing(archive, path, size)
    try:
        manifest = json.loads(archive.read(_MANIFEST))
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} has format {manifest['format']!r}",
                why=f"this stoker reads {FORMAT}",
                remedy=f"it was written by stoker {manifest.get('stoker')}: use that, or a newer one",
            )
        files, links = dict(manifest["files"]), dict(manifest["links"])
        sizes = {name: entry["bytes"] for name, entry in files.items() if entry["sha256"]}
        sizes[_MANIFEST] = listed[_MANIFEST]
        places = {name.split("/")[1] for name in files if name.startswith("checkpoints/")}
        held = all(target is None or target in places for target in links.values())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _refusal(path, f"its {_MANIFEST} cannot be read: {error!r}") from None
    if sizes != listed:
        odd = sorted(name for name in {*sizes, *listed} if sizes.get(name) != listed.get(name))
        raise _refusal(path, f"{odd[0]!r} is not as its {_MANIFEST} says")
    if links.keys() != {"latest", "best"} or not held:
        raise _refusal(path, f"its {_MANIFEST} names checkpoints that it does not hold")
    return {"files": files, "links": links}


def _extract(archive: zipfile.ZipFile, name: str, entry: Mapping[str, Any], place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    checksum, left = hashlib.sha256(), int(entry["bytes"])
    with archive.open(name) as source, place.open("xb") as target:
        while chunk := source.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            target.write(chunk)
            checksum.update(chunk)
    if left or checksum.hexdigest() != entry["sha256"]:
        raise zipfile.BadZipFile(f"{name} does not match its checksum")


def _check_run(path: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse an archive whose files, each as it was listed, do not make up one finished run."""
    try:
        found = whole(folder)
    except UserError as error:
        raise _refusal(path, str(error.what).replace(str(folder), "its run")) from None
    if found.links != manifest["links"]:
        raise _refusal(path, "its latest or best checkpoint is another one than its manifest says")
    files = manifest["files"]
    if {*found.names(), "environment.json"} != {*files}:
        odd = sorted({*found.names(), "environment.json"} ^ {*files})
        raise _refusal(path, f"{odd[0]!r} is missing, or has no place in a run")
    for name, (size, sha256) in found.members.items():
        if (files[name]["bytes"], files[name]["sha256"]) != (size, sha256):
            raise _refusal(path, f"{name} is not the file that its checkpoint was written with")
    if files["events.jsonl"]["bytes"] != found.events_bytes:
        raise _refusal(path, "its events are not those of its checkpoint")
