"""One hash for an object's code and contents: equal in every process that holds the same, different where they differ.

What it covers: instance attributes by value, and of code that is not installed as a package the byte code of every
class and function that can be reached from there by name, the text of local modules that are used whole, and the
globals that the code reads. Installed packages count with name and version. Random generators do not count: what is
drawn from them is never part of what a fingerprint is the key of.
"""

import copyreg
import dis
import functools
import hashlib
import importlib.metadata
import logging
import os
import random
import struct
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from stoker.errors import UserError
from stoker.recipe import local_modules

_PLAIN = {type(None), bool, int, float, complex, str, bytes}
_ROWS = 1 << 16  # of a long list, turned into text at once
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.local, threading.Condition, threading.Event)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_BY_NAME = {"globals", "vars", "eval", "exec", "__import__", "import_module"}  # look names up that no one can see
_NOT_CODE = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl"),
    *("__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__", "__dataclass_fields__"),
    *("__dataclass_params__", "__match_args__", "__qualname__", "__slotnames__", "__classcell__", "__annotate_func__"),
    *("__annotations_cache__", "__conditional_annotations__"),
}


def fingerprint(value: Any, name: str = "the data set") -> str:
    """Hash (64 hexadecimal digits) of a value's code and contents. About 1 s per 2 GB of tensors or 2 million rows.

    Args:
        value: anything that could be pickled; `__getstate__` and `__reduce__` decide what counts, as they do there.
        name: how an error calls it.

    Raises:
        UserError: it holds something whose contents nobody can tell, an open file for example.
    """
    walk = _Walk()
    walk.write("python", repr(sys.version_info[:3]).encode())
    try:
        walk.visit(value, name)
    except RecursionError:
        raise UserError(f"{name} is nested too deeply to tell whether it changed") from None
    return walk.hash.hexdigest()


class _Walk:
    """Writes an object, and all that it refers to, into a hash.

    Every compound object has a hash of its own, which goes into that of whoever refers to it: so it is written once,
    and whether two references lead to one object or to two equal ones makes no difference.
    """

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._known: dict[int, bytes] = {}
        self._open: dict[int, int] = {}  # objects that are being written, and how deep
        self._alive: list[Any] = []  # ids are only unique among the living
        self._lenient = 0  # inside of code: what it cannot be asked is passed over

    def write(self, tag: str, data: bytes = b"") -> None:
        """Add one unambiguous token."""
        self.hash.update(b"%s:%d:" % (tag.encode("utf-8", "surrogatepass"), len(data)))
        self.hash.update(data)

    def visit(self, value: Any, place: str) -> None:
        """Add a value; `place` is its path, for messages."""
        if type(value) in _PLAIN:
            return self._plain(value)
        key = id(value)
        if key in self._open:
            return self.write("cycle", b"%d" % (len(self._open) - self._open[key]))
        if key not in self._known:
            self._open[key] = len(self._open)
            self._alive.append(value)
            handler = _HANDLERS.get(type(value))
            if handler is None:
                handler = next((handle for kinds, handle in _BASES if isinstance(value, kinds)), _Walk._object)
            self._known[key] = self._apart(lambda: handler(self, value, place))
            del self._open[key]
        return self.write("object", self._known[key])

    def _apart(self, write: Callable[[], None]) -> bytes:
        outer, self.hash = self.hash, hashlib.sha256()
        try:
            write()
            return self.hash.digest()
        finally:
            self.hash = outer

    def _plain(self, value: Any) -> None:
        if type(value) is float:
            self.write("float", struct.pack("<d", value))
        else:
            text = hex(value) if type(value) is int else repr(value)
            self.write(type(value).__name__, text.encode())

    def _sequence(self, value: list[Any] | tuple[Any, ...], place: str) -> None:
        self.write(type(value).__name__, b"%d" % len(value))
        if not self._rows(value, place):
            for i, part in enumerate(value):
                self.visit(part, f"{place}[{i}]")

    def _rows(self, value: Iterable[Any], place: str) -> bool:
        """Add many plain values, or short rows of them, as text: 50 times faster than one by one."""
        if not _all_plain(value):
            return False
        rows = iter(value)
        while block := list(islice(rows, _ROWS)):
            try:
                self.write("rows", repr(block).encode())
            except ValueError:  # an integer of more than 4300 digits
                for part in chain.from_iterable(part if isinstance(part, tuple | list) else [part] for part in block):
                    self.visit(part, place)
        return True

    def _dict(self, value: Mapping[Any, Any], place: str) -> None:
        self.write("dict", b"%d" % len(value))
        if not self._rows(list(value.items()), place):
            for key, part in value.items():
                self.visit(key, f"{place} key")
                self.visit(part, f"{place}[{key!r}]" if type(key) in _PLAIN else f"{place}[...]")

    def _set(self, value: Iterable[Any], place: str) -> None:
        def element(part: Any) -> bytes:
            return self._apart(lambda: self.visit(part, f"{place} element"))

        self.write("set", b"".join(sorted(map(element, value))))

    def _array(self, value: Any, place: str) -> None:
        self.write("array", repr((value.dtype.str, value.dtype.descr, value.shape)).encode())
        if isinstance(value, np.memmap) and value.filename is not None:
            found = os.stat(value.filename)  # by name and dates: it may be larger than memory
            self.write("file", repr((str(value.filename), found.st_size, found.st_mtime_ns, value.offset)).encode())
        elif value.dtype.hasobject:
            self.visit(value.tolist(), place)
        elif value.dtype.itemsize:
            self.hash.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def _tensor(self, value: torch.Tensor, place: str) -> None:
        self.write("tensor", repr((type(value).__name__, value.dtype, tuple(value.shape), value.layout)).encode())
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            return self._object(value, place)
        plain = value.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().cpu().contiguous()
        self.hash.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        if extra := dict(vars(value)):
            self._dict(extra, place)
        return None

    def _object(self, value: Any, place: str) -> None:
        """Add an object as pickle would take it apart."""
        if type(value).__module__.split(".")[0] == "datasets" and isinstance(
            known := getattr(value, "_fingerprint", None), str
        ):  # Hugging Face: a hash of the data and of all that was done to it
            return self.write("datasets", repr((known, getattr(value, "_format_kwargs", None) and place)).encode())
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            reduced: Any = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        except Exception as error:
            if not self._lenient:
                raise _opaque(value, place, error) from None
            return self.write("opaque", type(value).__qualname__.encode())
        if isinstance(reduced, str):
            self.write("name", reduced.encode())
            return self.visit(getattr(value, "__wrapped__", None), place)
        self.write("reduced", b"%d" % len(reduced))
        self.visit(reduced[0], f"{place}'s type")
        self._sequence(reduced[1], place)
        if len(reduced) > 2:
            self._state(reduced[2], place)
        for items in reduced[3:5]:
            self.visit(None if items is None else list(items), place)
        return None

    def _state(self, state: Any, place: str) -> None:
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if not all(part is None or isinstance(part, dict) for part in parts):
            return self.visit(state, place)
        for part in parts:
            self.write("state", b"%d" % len(part or ()))
            for key in sorted(part or (), key=str):
                self.visit(key, place)
                self.visit(part[key], f"{place}.{key}")
        return None

    # ---- code

    def _function(self, value: types.FunctionType, place: str) -> None:
        self._lenient += 1
        self.write("function", b"")
        self._code(value.__code__, place)
        self._lenient -= 1
        for cell in value.__closure__ or ():
            try:
                self.visit(cell.cell_contents, f"{place}'s closure")
            except ValueError:
                self.write("empty cell")
        self._lenient += 1
        self.visit([value.__defaults__, value.__kwdefaults__, value.__dict__], f"{place}'s defaults")
        if not is_library(value.__code__.co_filename):
            self._globals(value, place)
        else:
            self.write("version", _version(value.__module__ or "").encode())
        self._lenient -= 1

    def _code(self, code: types.CodeType, place: str) -> None:
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        self.write("code", code.co_code + code.co_exceptiontable)
        self.write("names", repr((counts, code.co_names, code.co_varnames, code.co_freevars)).encode())
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, place)
            else:
                self.visit(constant, place)

    def _globals(self, function: types.FunctionType, place: str) -> None:
        names, imports = _names_of(function.__code__)
        for name in sorted(names):
            if name in function.__globals__:
                self.write("global", name.encode())
                self.visit(function.__globals__[name], f"{place}'s global {name}")
        file = Path(function.__code__.co_filename)
        if imports and file.is_file():
            self._texts(local_modules(file, "".join(f"import {name}\n" for name in sorted(imports))))
        if names & _BY_NAME and file.is_file():
            self._texts({"": file.read_text(encoding="utf-8", errors="replace")})

    def _texts(self, texts: Mapping[str, str]) -> None:
        self.write("text", repr(sorted(texts.items())).encode())

    def _class(self, value: type, place: str) -> None:
        self.write("class", value.__qualname__.encode())
        if _installed_module(value.__module__):
            return self.write("version", f"{value.__module__} {_version(value.__module__)}".encode())
        self._lenient += 1
        self._sequence(value.__bases__, place)
        for name in sorted(set(vars(value)) - _NOT_CODE):
            self.write("member", name.encode())
            self._member(vars(value)[name], f"{place}.{name}")
        self._lenient -= 1
        return None

    def _member(self, member: Any, place: str) -> None:
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        elif isinstance(member, property):
            member = [member.fget, member.fset, member.fdel]
        elif isinstance(member, functools.cached_property):
            member = member.func
        self.visit(member, place)

    def _module(self, value: types.ModuleType, place: str) -> None:
        if _installed_module(value.__name__):
            return self.write("module", f"{value.__name__} {_version(value.__name__)}".encode())
        self._lenient += 1
        file = Path(getattr(value, "__file__", None) or "")
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            self._texts({"": text, **local_modules(file.resolve(), text)})
        for name, part in sorted(vars(value).items()):  # what runs, should the text have been edited since
            if isinstance(part, type | types.FunctionType) and part.__module__ == value.__name__:
                self.write("member", name.encode())
                self.visit(part, f"{place}.{name}")
        self._lenient -= 1
        return None

    def _kind_only(self, value: Any, place: str) -> None:
        self.write("kind", type(value).__qualname__.encode())

    def _proxy(self, value: Mapping[Any, Any], place: str) -> None:
        self._dict(dict(value), place)


_HANDLERS: dict[type, Callable[[_Walk, Any, str], None]] = {
    list: _Walk._sequence,
    tuple: _Walk._sequence,
    dict: _Walk._dict,
    set: _Walk._set,
    frozenset: _Walk._set,
    types.FunctionType: _Walk._function,
    types.ModuleType: _Walk._module,
    types.MappingProxyType: _Walk._proxy,
    type(Ellipsis): _Walk._kind_only,
    type(NotImplemented): _Walk._kind_only,
    bytearray: lambda walk, value, place: walk.write("bytearray", bytes(value)),
}
_BASES: list[tuple[Any, Callable[[_Walk, Any, str], None]]] = [
    (type, _Walk._class),
    (torch.Tensor, _Walk._tensor),
    (np.ndarray, _Walk._array),
    (_GENERATORS, _Walk._kind_only),
    (_LOCKS, _Walk._kind_only),
    (logging.Logger, _Walk._kind_only),
    (types.ModuleType, _Walk._module),
    (PurePath, lambda walk, value, place: walk.write("path", str(value).encode("utf-8", "surrogateescape"))),
]


def _all_plain(values: Any) -> bool:
    kinds = set(map(type, values))
    if kinds in ({tuple}, {list}):
        kinds = set(map(type, chain.from_iterable(values)))
    elif kinds == {dict}:
        kinds = set(map(type, chain.from_iterable(map(dict.keys, values))))
        kinds |= set(map(type, chain.from_iterable(map(dict.values, values))))
    return kinds <= _PLAIN


def _names_of(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Globals that a function reads, and modules that it imports when it runs."""
    names: set[str] = set()
    imports: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            imports.add(instruction.argval)
        elif instruction.argval in _BY_NAME and isinstance(instruction.argval, str):
            names.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, inner_imports = _names_of(constant)
            names |= inner
            imports |= inner_imports
    return names, {name for name in imports if name}


@functools.cache
def _library_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return tuple(sorted({f"{path}{os.sep}" for folder in folders for path in (folder, os.path.realpath(folder))}))


@functools.cache
def is_library(file: str) -> bool:
    """Whether a file belongs to Python itself or to an installed package."""
    parts = Path(file).parts
    return file.startswith(("<frozen", *_library_folders())) or "site-packages" in parts or "dist-packages" in parts


def _installed_module(name: str) -> bool:
    if name == "__main__":
        return False
    top = name.split(".")[0]
    if top in sys.builtin_module_names or top in sys.stdlib_module_names:
        return True
    for candidate in (name, top):
        file = getattr(sys.modules.get(candidate), "__file__", None)
        if file:
            return is_library(file)
    return False


@functools.cache
def _version(module: str) -> str:
    top = module.split(".")[0]
    if top in sys.stdlib_module_names:
        return ""  # Python's own, which is written first
    version = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(version, str):
        return f"{top} {version}"
    try:
        return f"{top} {importlib.metadata.version(top)}"
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return top


def _opaque(value: Any, place: str, error: Exception) -> UserError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return UserError(
        f"cannot tell whether {place} changed: it is a {kind}, which cannot be looked into",
        why=f"{type(error).__name__}: {error}",
        remedy="open it where it is used, in __getitem__, or leave it out of what a __getstate__ of the data set "
        "returns, if samples do not depend on it",
    )
