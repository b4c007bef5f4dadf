"""Batches as trees of tensors: how many samples they hold, how they are split."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from stoker.errors import UserError


def map_tree(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `fn` to every leaf of nested tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Mapping):
        mapped = {key: map_tree(fn, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tree(fn, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tree(fn, value) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: map_tree(fn, getattr(tree, f.name)) for f in fields(tree) if f.init})
    return fn(tree)


def num_rows(batch: Any) -> int | None:
    """Length of the leading dimension of the first tensor in the batch; None where there is no such tensor."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif is_dataclass(batch) and not isinstance(batch, type):
        batch = [getattr(batch, f.name) for f in fields(batch)]
    elif not isinstance(batch, list | tuple):
        return None
    return next((rows for part in batch if (rows := num_rows(part)) is not None), None)


def split(batch: Any, microbatch: int | None) -> list[Any]:
    """Cut a batch into pieces of at most `microbatch` samples along the leading dimension of every tensor.

    Lists of one entry per sample are cut alike; whatever else has no leading sample dimension goes to every piece.
    """
    rows = num_rows(batch) if microbatch is not None else None
    if microbatch is None or (rows is not None and rows <= microbatch):
        return [batch]
    if rows is None:
        raise UserError(
            f"a batch of type {type(batch).__name__} cannot be cut into microbatches of {microbatch}",
            why="it holds no tensor with a leading sample dimension",
            remedy="leave out --microbatch, or let collate return tensors (in tuples, lists, dicts or dataclasses)",
        )

    def piece(tree: Any, start: int) -> Any:
        def cut(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == rows:
                return leaf[start : start + microbatch]
            return leaf

        if isinstance(tree, list) and len(tree) == rows and not any(isinstance(x, torch.Tensor) for x in tree):
            return tree[start : start + microbatch]
        return map_tree(cut, tree)

    if isinstance(batch, Mapping):
        starts = range(0, rows, microbatch)
        return [type(batch)({k: piece(v, s) for k, v in batch.items()}) for s in starts]  # type: ignore[call-arg]
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return [type(batch)(piece(part, s) for part in batch) for s in range(0, rows, microbatch)]
    return [piece(batch, start) for start in range(0, rows, microbatch)]
