"""Names of a module's parts, free of the levels that wrappers put in between.

`torch.compile(model)` calls a weight `_orig_mod.0.weight`, `nn.DataParallel(model)` calls it `module.0.weight`. What
is saved calls it `0.weight` in either case, at any depth, so that how a model is wrapped is no part of what it is. A
wrapper is known by its type: an attribute of the user's own that happens to be called `module` keeps its name.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_RECOMPUTED = "_checkpoint_wrapped_module"

# Where a class lives, its name, and the attribute that holds what it wraps. One whose home was never imported, as
# torch.compile's is by its first use only, has no instances: looking into sys.modules spares two seconds of imports.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", _RECOMPUTED),
)


def _inner(module: nn.Module) -> str | None:
    """Name of the attribute that holds what a wrapper wraps; None for any other module."""
    for home, kind, attribute in _WRAPPERS:
        class_ = getattr(sys.modules.get(home), kind, None)
        if class_ is not None and isinstance(module, class_) and attribute in module._modules:
            return attribute
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside all wrappers around a module: itself, where there is none."""
    while (attribute := _vanishing(module)) is not None:
        module = getattr(module, attribute)
    return module


def _names_at(module: nn.Module) -> set[str]:
    """First parts of the clean names of what a module holds."""
    own, attribute = {*module._parameters, *module._buffers, *module._modules}, _vanishing(module)
    return own if attribute is None else (own - {attribute}) | _names_at(getattr(module, attribute))


def _vanishing(module: nn.Module) -> str | None:
    """Attribute whose level vanishes from names; where a wrapper shares a name with its inside, the level stays."""
    attribute = _inner(module)
    if attribute is None:
        return None
    own = {*module._parameters, *module._buffers, *module._modules} - {attribute}
    return None if own & _names_at(getattr(module, attribute)) else attribute


def _levels(module: nn.Module) -> set[str]:
    """Paths, as torch spells them, whose last part vanishes."""
    levels: set[str] = set()
    kinds = tuple(kind for home, name, _ in _WRAPPERS if (kind := getattr(sys.modules.get(home), name, None)))
    if not any(isinstance(part, kinds) for part in module.modules()):  # as a rule; a save asks several times
        return levels
    for path, part in module.named_modules(remove_duplicate=False):
        attribute = _vanishing(part)
        if attribute is not None:
            level = f"{path}.{attribute}" if path else attribute
            levels.add(level)
            if attribute != _RECOMPUTED:  # which takes its own level out of names in a state dict, and out of no others
                levels.add(".".join(name for name in level.split(".") if name != _RECOMPUTED))
    return levels


def _clean(name: str, levels: set[str]) -> str:
    if not levels:
        return name
    parts = name.split(".")
    return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in levels)


def state_dict(module: nn.Module) -> dict[str, Any]:
    """A module's state dict by clean names; like torch's, it may hold extra state that is no tensor."""
    levels = _levels(module)
    return {_clean(name, levels): value for name, value in module.state_dict().items()}


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module's state dict, by clean names."""
    return {name: value for name, value in state_dict(module).items() if isinstance(value, torch.Tensor)}


def load_state_dict(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load a complete state dict of clean names.

    Raises:
        KeyError: a name is not the module's.
        RuntimeError: as torch's own raises it.
    """
    levels = _levels(module)
    wrapped = {_clean(name, levels): name for name in module.state_dict()}
    module.load_state_dict({wrapped[name]: value for name, value in saved.items()}, strict=True)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by clean name, in the order of the module's own; shared ones once."""
    levels = _levels(module)
    return {_clean(name, levels): parameter for name, parameter in module.named_parameters()}


def named_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers by clean name, those too that a state dict leaves out; shared ones once."""
    levels = _levels(module)
    return {_clean(name, levels): buffer for name, buffer in module.named_buffers()}


def named_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Modules by clean name, shared ones under each of theirs; of a wrapper and what it wraps, the latter."""
    levels = _levels(module)
    return {_clean(name, levels): part for name, part in module.named_modules(remove_duplicate=False)}


def submodule(module: nn.Module, name: str) -> nn.Module:
    """Module of that clean name; the empty name is what is inside the wrappers around the module.

    Raises:
        AttributeError: there is none.
    """
    found = named_modules(module).get(name)
    if found is None:
        raise AttributeError(f"{type(module).__name__} has no module {name!r}")
    return found


def owner_of_buffer(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a buffer of that clean name belongs to, or would, and its name there."""
    levels = _levels(module)
    for path, _ in module.named_buffers(remove_duplicate=False):
        if _clean(path, levels) == name:
            place, _, leaf = path.rpartition(".")
            return module.get_submodule(place), leaf
    place, _, leaf = name.rpartition(".")
    return submodule(module, place), leaf
