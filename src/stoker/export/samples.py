"""Real inputs for a graph: how the recipe itself calls its model, caught from its loss or its own step."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from stoker.data.batch import num_rows, split
from stoker.data.seeding import EVALUATION, fold, isolated, seed_all
from stoker.errors import UserError, told
from stoker.infer import Opened
from stoker.recipe import TARGET_NAMES, Recipe, unpack

BATCHES = 4  # read, to learn which sizes vary from one to the next


@dataclass(frozen=True)
class Sample:
    """What the recipe calls its model with for one batch, and what the model returns."""

    rows: int | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def tensors(self) -> list[Tensor]:
        """Inputs, in the order in which a graph takes them."""
        return [tensor for _, tensor in named_tensors((self.args, self.kwargs))]

    @property
    def outputs(self) -> list[Tensor]:
        """Tensors that the model returns, in order."""
        return [tensor for _, tensor in named_tensors(self.output)]

    def resembles(self, other: "Sample") -> bool:
        """Whether both differ at most in the values and sizes of their tensors, so that one graph may serve both."""
        (ours, our_tree), (theirs, their_tree) = (tree_flatten((s.args, s.kwargs)) for s in (self, other))
        return bool(our_tree == their_tree) and all(map(_alike, ours, theirs))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.dtype, a.dim()) == (b.dtype, b.dim())
    return type(a) is type(b) and bool(a == b)


@dataclass(frozen=True)
class Samples:
    """Samples of one split: `cuts` of its first batch (whole, half of it, one row), and those of `further` batches."""

    split: str
    cuts: list[Sample]
    further: list[Sample]


def take_samples(opened: Opened, batch_size: int | None) -> Samples:
    """Read a few batches of val, else train, and see what the recipe makes of them.

    Raises:
        UserError: the data cannot be read, or the recipe's step does not call its model.
    """
    name = "val" if opened.recipe.val is not None else "train"
    feed = opened.feed(name, batch_size, 0)
    try:
        batches = [opened.strategy.place(batch) for batch, _ in islice(feed.epoch(0), BATCHES)]
    finally:
        feed.close()
    if not batches:
        raise UserError(f"the {name} data have no batch to make a graph on", remedy=f"look at {name}= in the recipe")
    first, rows = _sample(opened, batches[0]), num_rows(batches[0]) or 1
    smaller = [split(batches[0], n)[0] for n in dict.fromkeys((rows // 2, 1)) if 0 < n < rows]
    cuts = [found for batch in smaller if (found := _tried(opened, batch, first))]
    further = [found for batch in batches[1:] if (found := _tried(opened, batch, first))]
    return Samples(name, [first, *cuts], further)


def _tried(opened: Opened, batch: Any, first: Sample) -> Sample | None:
    """A sample that one graph may serve beside the first; a step may insist on whole batches, or change its call."""
    try:
        found = _sample(opened, batch)
    except UserError:
        return None
    return found if found.resembles(first) else None


def _sample(opened: Opened, batch: Any) -> Sample:
    """Make the recipe's own call of the model for a batch.

    Raises:
        UserError: there is no such call, or it fails.
    """
    with isolated(), torch.no_grad():
        seed_all(fold(opened.identity.seed, EVALUATION, 0))
        call = _first_call(opened.model, opened.recipe, batch)
        args, kwargs = tree_map(_apart, (call.given, call.named))
        kwargs = _without_target(opened.model, kwargs)
        try:
            output = opened.model(*args, **kwargs)
        except Exception as error:
            raise told(error, "the model") from error
    return Sample(num_rows(batch), args, kwargs, output)


class _Call(BaseException):
    """Carries the arguments of the model's first call out of a step; no `except Exception` in it holds them up."""

    def __init__(self, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        super().__init__()
        self.given, self.named = given, dict(named)


def _first_call(model: nn.Module, recipe: Recipe, batch: Any) -> _Call:
    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Call(args, kwargs)

    hook = model.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        for spec in (recipe.objectives or {}).values():
            if spec.step is None:
                args, kwargs, _ = unpack(batch)
                return _Call(args, kwargs)
            _ = spec.step(model, batch, None) if spec.takes_carry else spec.step(model, batch)
    except _Call as call:
        return call
    except UserError:
        raise
    except Exception as error:
        raise told(error, "the recipe's step") from error
    finally:
        hook.remove()
    raise UserError(
        "the recipe's step does not call the model itself",
        why=f"a graph is made of what model(...) does, and step uses {type(model).__name__} in another way",
        remedy="give the model a forward() that step calls; --format pt and safetensors need none",
    )


def _apart(value: Any) -> Any:
    """A copy that shares nothing with the batch, and whose strides tell nothing of how it was gathered."""
    if not isinstance(value, Tensor):
        return value
    plain = value.layout is torch.strided and not value.is_nested
    return value.detach().clone(memory_format=torch.contiguous_format) if plain else value.detach()


def _without_target(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order of forward()'s parameters, less a target that it can do without."""
    try:
        parameters = dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # no Python function
        parameters = {}
    optional = {name for name in TARGET_NAMES if name in parameters and parameters[name].default is None}
    return {n: kwargs[n] for n in dict.fromkeys((*parameters, *kwargs)) if n in kwargs and n not in optional}


def named_tensors(tree: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Tensors of nested containers, mappings and dataclasses, in order, under their keys, field names and positions."""
    if isinstance(tree, Tensor):
        return [(name or "output", tree)]
    parts: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        parts = list(tree.items())
    elif is_dataclass(tree) and not isinstance(tree, type):
        parts = [(f.name, getattr(tree, f.name)) for f in fields(tree)]
    elif isinstance(tree, list | tuple):
        name = name or "output"
        parts = list(zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True))
    return [found for key, value in parts for found in named_tensors(value, f"{name}_{key}" if name else str(key))]
