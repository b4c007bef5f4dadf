"""A state tree as JSON plus named tensors, and back. Nothing in a file can name code to run."""

import collections
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stoker.errors import UserError

Json = Any

_SEQUENCES = (list, collections.deque)
_TUPLES = (tuple, torch.Size)  # not named tuples: they would come back without their names


def flatten(tree: Any, path: str = "") -> tuple[Json, dict[str, torch.Tensor]]:
    """Encode nested dicts, lists, tuples, numbers, strings, tensors and arrays; arrays come back as tensors.

    Raises:
        UserError: something else is in the tree; the message names its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(tree, path, tensors), tensors


def _encode(node: Any, path: str, tensors: dict[str, torch.Tensor]) -> Json:
    if isinstance(node, torch.Tensor | np.ndarray):  # first: a save waits for this, and most leaves are tensors
        return {"$tensor": _name(_tensor(node, path), path, tensors)}
    if isinstance(node, np.generic):
        node = node.item()
    if isinstance(node, float) and not math.isfinite(node):
        return {"$float": repr(node)}
    if node is None or type(node) in (bool, int, float, str):
        return node

    def inside(value: Any, key: object) -> Json:
        return _encode(value, f"{path}/{key}" if path else str(key), tensors)

    if type(node) in _SEQUENCES:
        return [inside(value, i) for i, value in enumerate(node)]
    if type(node) in _TUPLES:
        return {"$tuple": [inside(value, i) for i, value in enumerate(node)]}
    if isinstance(node, Mapping):
        counter = isinstance(node, collections.Counter)
        if not counter and all(isinstance(key, str) and not key.startswith("$") for key in node):
            return {key: inside(value, key) for key, value in node.items()}
        pairs = [[inside(k, f"key{i}"), inside(v, k)] for i, (k, v) in enumerate(node.items())]
        return {"$counter" if counter else "$dict": pairs}
    raise _refused(node, path)


def _tensor(node: torch.Tensor | np.ndarray[Any, Any], path: str) -> torch.Tensor:
    if isinstance(node, np.ndarray):
        try:
            return torch.from_numpy(node.copy())  # a copy: torch has no negative strides
        except TypeError:
            raise _refused(node, path) from None
    if node.layout is not torch.strided or node.is_meta:
        raise _refused(node, path)
    return node.detach()


def _name(tensor: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> str:
    """File the tensor under its path; places that spell alike, and a name of safetensors' own, get a number."""
    name, number = path, 0
    while name in tensors or name in ("", "__metadata__"):
        number += 1
        name = f"{path}#{number}"
    tensors[name] = tensor
    return name


def _refused(node: Any, path: str) -> UserError:
    return UserError(
        f"cannot save {path or 'the state'}: a {type(node).__name__} is neither data nor a dense tensor",
        why="checkpoints hold no programs, so that opening one cannot run any",
        remedy="keep numbers, strings, tensors, lists and dicts in state that is saved",
    )


def unflatten(node: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Rebuild the tree that `flatten` encoded.

    Raises:
        KeyError, TypeError, ValueError: it encoded no such thing.
    """
    if isinstance(node, list):
        return [unflatten(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        ((tag, value),) = node.items()
        if tag == "$float":
            return float(value)
        if tag == "$tensor":
            return tensors[value]
        if tag == "$tuple":
            return tuple(unflatten(v, tensors) for v in value)
        if tag in ("$counter", "$dict"):
            pairs = {unflatten(k, tensors): unflatten(v, tensors) for k, v in value}
            return collections.Counter(pairs) if tag == "$counter" else pairs
    return {key: unflatten(value, tensors) for key, value in node.items()}
