"""A model's state dict as a file that other programs load: pt or safetensors."""

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stoker.errors import UserError
from stoker.export.telling import brief
from stoker.export.writing import patient, writing
from stoker.naming import names


def write_weights(model: nn.Module, format: str, path: Path) -> str:
    """Write a state dict, read it back, and say so.

    Raises:
        UserError: it holds what the format cannot, or reads back as something else.
    """
    state = names.state_dict(model)
    if format == "pt":
        with writing(path), patient(path) as file:
            torch.save(state, file)
        load: Callable[[Path], Any] = functools.partial(torch.load, weights_only=True)
    else:
        other = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if other:
            raise UserError(
                f"safetensors holds tensors only, and the model's state has {', '.join(other[:5])}",
                remedy="--format pt",
            )
        with writing(path):
            save_file(_apart(state), path, metadata={"format": "pt"})
        load = load_file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sparse tensors that might be slow to read
            found = load(path)
    except Exception as error:
        raise UserError(
            f"{path.name} could not be read back by torch.load(weights_only=True)",
            why=brief(error),
            remedy="let get_extra_state() return tensors, numbers, texts, and lists and dicts of them",
        ) from error
    if found.keys() != state.keys() or not all(_same_bits(found[name], state[name]) for name in state):
        raise UserError(f"{path.name} does not read back as it was written", remedy="look at this machine's disk")
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return f"read back, the same bits: {len(tensors)} tensors, {sum(t.numel() for t in tensors):,} values"


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, so that tied weights are written under each of their names."""
    seen: set[int] = set()
    found = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        found[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        seen.add(storage.data_ptr())
    return found


def _same_bits(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
    return torch.equal(a, b)
