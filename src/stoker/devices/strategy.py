"""How a step is spread over devices. The loop sees this Protocol only and never asks whether it is distributed."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import torch
from torch import nn

from stoker.data.batch import map_tree
from stoker.data.feeds import Feed
from stoker.devices.sidestream import SideStream
from stoker.errors import UserError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Strategy(Protocol):
    """Placement of a model and its batches."""

    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return what the loop calls for `model`: itself, compiled, or wrapped; the parameters stay the same."""
        ...

    def place(self, batch: Any) -> Any:
        """Move this process's share of a (micro)batch to its device."""
        ...

    def ahead(self, feed: Feed) -> Feed:
        """Return a feed whose batches are on their way to the device before they are asked for."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass; it can be entered again and again."""
        ...

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return a loss scaler, where the precision needs one."""
        ...

    def memory_bytes(self) -> int:
        """Memory in use: a device's peak since the run began, or this process's on a CPU."""
        ...


@dataclass
class Single:
    """One device."""

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    _process: psutil.Process = field(default_factory=psutil.Process)  # 30 us to make, 5 to ask

    def prepare(self, model: nn.Module) -> nn.Module:
        """Compile in place of wrapping, so that names stay free of prefixes."""
        if self.compile:
            model.compile()
        return model

    def place(self, batch: Any) -> Any:
        """Move tensors, asynchronously from pinned memory."""
        if self.device.type == "cpu":
            return batch
        return map_tree(lambda x: x.to(self.device, non_blocking=True) if hasattr(x, "to") else x, batch)

    def ahead(self, feed: Feed) -> Feed:
        """Copy on a stream of its own, where there is CUDA."""
        return SideStream(feed, self.device) if self.device.type == "cuda" else feed

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return int(self._process.memory_info().rss)


def find_device(name: str | None) -> torch.device:
    """Device by name; the first accelerator, or the CPU, where none is named.

    Raises:
        UserError: no such device on this machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{name!r} is not a device", remedy="--device cpu, cuda, cuda:1, mps ...") from None
    if device.type == "cpu":
        return device
    if accelerator is None or accelerator.type != device.type:
        found = (
            f"this machine has {accelerator}" if accelerator else "this machine has no accelerator that torch can use"
        )
        driver = "" if torch.version.cuda else f"; torch {torch.__version__} is a build without CUDA"
        raise UserError(
            f"device {name!r} is not available", why=found + driver, remedy=f"--device {accelerator or 'cpu'}"
        )
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(f"device {name!r} is not available", why=f"there are {count}, counted from 0")
    return device
