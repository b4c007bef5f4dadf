"""What a model is, module by module, in words: two that fit the same weights may still compute different things."""

import re
import types
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from stoker.naming import names

_SHOWN = 6  # modules that changed in the same way; the others are counted
_LINES = 40
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")
_DEVICE = re.compile(r"(,\s*)?\bdevice=(device\([^)]*\)|'[^']*'|[^,;\s)]+)")
_PASSED_OVER = {"training", "inplace"}  # which change no result
_WORD = re.compile(r"[\w.+-]{0,64}")  # no path, which is another on another machine


def describe_architecture(module: nn.Module) -> dict[str, str]:
    """Each module's class, settings and own tensors, by its name; the same wherever, and whenever, it is built.

    The code of `forward` is no part of it.
    """
    modules = names.named_modules(module)
    first: dict[int, str] = {}
    tensors: dict[int, str] = {}
    described = {}
    for name, part in modules.items():
        other = first.setdefault(id(part), name)
        described[name] = f"= {other or 'the model itself'}" if other != name else _describe(part, name, tensors)
    return described


def _describe(part: nn.Module, name: str, tensors: dict[int, str]) -> str:
    pieces = [f"{type(part).__name__}({_settings(part)})"]
    own: list[tuple[str, torch.Tensor | None, str]] = [(leaf, tensor, "") for leaf, tensor in part._parameters.items()]
    # A buffer that no state dict holds may come, or grow, with a forward pass: a cache, a mask.
    kept = [item for item in part._buffers.items() if item[0] not in part._non_persistent_buffers_set]
    own += [(leaf, tensor, "buffer ") for leaf, tensor in kept]
    for leaf, tensor, kind in own:
        if tensor is None:
            continue
        place = f"{name}.{leaf}" if name else leaf
        other = tensors.setdefault(id(tensor), place)
        if other != place:
            pieces.append(f"{kind}{leaf} = {other}")
        else:
            shape = "of any shape" if is_lazy(tensor) else str(tuple(tensor.shape))
            pieces.append(f"{kind}{leaf} {shape} {str(tensor.dtype).removeprefix('torch.')}")
    return "; ".join(pieces)


def _settings(part: nn.Module) -> str:
    """What `extra_repr` says and, as many classes leave out what matters (heads, an activation), plain attributes."""
    try:
        words = str(part.extra_repr())
    except Exception:  # it is the user's, and so may be its faults
        words = ""
    words = re.sub(r"[,\s]*[\n;]\s*", ", ", _DEVICE.sub("", _ADDRESS.sub("0x...", words)).strip()).removeprefix(", ")
    if words and type(part).__module__.startswith("torch.nn."):
        return words
    attributes = {
        name: spelled
        for name, value in sorted(vars(part).items())
        if not name.startswith("_") and name not in _PASSED_OVER and (spelled := _spell(value)) is not None
    }
    more = [f"{k}={v}" for k, v in attributes.items() if re.search(rf"\b{re.escape(k)}=", words) is None]
    return ", ".join([*([words] if words else []), *more])


def _spell(value: Any) -> str | None:
    """A setting as text; None for what is none, or is not the same everywhere."""
    if isinstance(value, str):
        return repr(value) if _WORD.fullmatch(value) else None
    if isinstance(value, bool | int | float | torch.dtype):
        return str(value)
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return None if "<" in value.__qualname__ else value.__qualname__
    if isinstance(value, tuple | list) and len(value) <= 8:
        spelled = [_spell(item) for item in value]
        return None if None in spelled else f"({', '.join(map(str, spelled))})"
    return None


def architecture_differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Lines that say what changed between two descriptions; modules that changed in the same way share one."""
    changes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, was in then.items():
        if name in now and now[name] != was:
            changes[_change(was, now[name])].append(name)
    lines = [f"{_layers(where)}: {before} then, {after} now" for (before, after), where in changes.items()]
    lines += _only(then, now, "removed") + _only(now, then, "added")
    more = len(lines) - _LINES
    return lines[:_LINES] + ([f"and {more} more differences"] if more > 0 else [])


def _change(was: str, now: str) -> tuple[str, str]:
    """What differs: class and settings where they do, else the tensors."""
    old, new = was.split("; "), now.split("; ")
    if old[0] != new[0]:
        return old[0], new[0]
    gone, come = [p for p in old if p not in new], [p for p in new if p not in old]
    return ", ".join(gone) or f"no {_leaf(come[0])}", ", ".join(come) or f"no {_leaf(gone[0])}"


def _leaf(piece: str) -> str:
    return piece.removeprefix("buffer ").split(" ", 1)[0]


def _layers(where: Sequence[str]) -> str:
    shown = [name or "(the model itself)" for name in where[:_SHOWN]]
    more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
    return f"layer{'s' if len(where) > 1 else ''} {', '.join(shown)}{more}"


def _only(here: Mapping[str, str], there: Mapping[str, str], verb: str) -> list[str]:
    """Modules that only one side has, each with what is inside it; those of one description share a line."""
    found: dict[str, list[str]] = defaultdict(list)
    inside: dict[str, int] = {}
    for name in here:
        if name in there:
            continue
        parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
        top = next((parent for parent in parents if parent in inside), None)
        if top is None:
            inside[name] = 0
            found[here[name].split("; ")[0]].append(name)
        else:
            inside[top] += 1
    lines = []
    for description, where in found.items():
        parts = sum(inside[name] for name in where)
        lines.append(f"{_layers(where)} {verb}: {description}" + (f", {parts} modules inside" if parts else ""))
    return lines
