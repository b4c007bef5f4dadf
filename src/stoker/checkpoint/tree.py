"""A state tree as JSON plus named tensors, and back. Nothing in a file can name code to run."""

import collections
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stoker.errors import UserError

Json = Any


def flatten(tree: Any, path: str = "") -> tuple[Json, dict[str, torch.Tensor]]:
    """Encode nested dicts, lists, tuples, numbers, strings, tensors and arrays.

    Raises:
        UserError: something else is in the tree; the message names its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(tree, path, tensors), tensors


def _encode(node: Any, path: str, tensors: dict[str, torch.Tensor]) -> Json:
    def inside(value: Any, key: object) -> Json:
        return _encode(value, f"{path}/{key}" if path else str(key), tensors)

    if isinstance(node, np.generic):
        node = node.item()
    if isinstance(node, float) and not math.isfinite(node):
        return {"$float": repr(node)}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, torch.Tensor | np.ndarray):
        tensor = node.detach() if isinstance(node, torch.Tensor) else torch.from_numpy(node)
        tensors[path] = tensor
        return {"$tensor": path}
    if isinstance(node, list | collections.deque):
        return [inside(value, i) for i, value in enumerate(node)]
    if isinstance(node, tuple):
        return {"$tuple": [inside(value, i) for i, value in enumerate(node)]}
    if isinstance(node, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in node) and type(node) is dict:
            return {key: inside(value, key) for key, value in node.items()}
        tag = "$counter" if isinstance(node, collections.Counter) else "$dict"
        return {tag: [[inside(k, f"key{i}"), inside(v, k)] for i, (k, v) in enumerate(node.items())]}
    raise _not_data(node, path)


def _not_data(node: Any, path: str) -> UserError:
    return UserError(
        f"cannot save {path or 'the state'}: a {type(node).__name__} is neither data nor a tensor",
        why="checkpoints hold no programs, so that opening one cannot run any",
        remedy="keep numbers, strings, tensors, lists and dicts in state that is saved",
    )


def unflatten(node: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Rebuild the tree that `flatten` encoded."""
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
        if tag == "$counter":
            return collections.Counter({unflatten(k, tensors): v for k, v in value})
        if tag == "$dict":
            return {unflatten(k, tensors): unflatten(v, tensors) for k, v in value}
    return {key: unflatten(value, tensors) for key, value in node.items()}
