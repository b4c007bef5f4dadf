"""What a run's bits depend on besides the run: versions, the CPU, devices, threads. No name, path or secret."""

import contextlib
import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from stoker import __version__
from stoker.recipe import imported_names

# Those that choose kernels, the order of sums, or numbers of threads: a fixed list, since others may hold secrets.
_VARIABLES = """
ATEN_CPU_CAPABILITY CUBLAS_WORKSPACE_CONFIG CUDA_LAUNCH_BLOCKING DNNL_MAX_CPU_ISA MKL_CBWR MKL_DYNAMIC
MKL_ENABLE_INSTRUCTIONS MKL_NUM_THREADS NUMEXPR_NUM_THREADS NVIDIA_TF32_OVERRIDE OMP_DYNAMIC OMP_NUM_THREADS
OMP_SCHEDULE ONEDNN_MAX_CPU_ISA OPENBLAS_CORETYPE OPENBLAS_NUM_THREADS PYTHONHASHSEED
TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
"""
_CPU_FEATURES = ("sse4_2", "avx", "avx2", "fma", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16", "f16c")


def environment(sources: Iterable[str] = ()) -> dict[str, Any]:
    """Describe this process's environment as JSON values; `sources` are texts whose imports are mapped to packages."""
    installed = distributions()
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "cpu": _cpu(),
        "accelerators": _accelerators(),
        "torch": _torch(),
        "stoker": __version__,
        "variables": {name: os.environ[name] for name in _VARIABLES.split() if name in os.environ},
        "imports": imports_of(sources, installed),
        "distributions": installed,
    }


def distributions() -> dict[str, str]:
    """Version of every installed distribution, by its normalised name."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        with contextlib.suppress(Exception):  # one whose metadata were half deleted
            name = distribution.metadata["Name"].lower().replace("_", "-").replace(".", "-")
            found.setdefault(name, distribution.version)
    return dict(sorted(found.items()))


def imports_of(sources: Iterable[str], installed: Mapping[str, str]) -> dict[str, str]:
    """Version of every distribution that the texts import, by its normalised name."""
    wanted = {name.split(".")[0] for text in sources for name in imported_names(text)}
    if not wanted:
        return {}
    homes = metadata.packages_distributions()
    names = {home.lower().replace("_", "-").replace(".", "-") for name in wanted for home in homes.get(name, ())}
    return {name: installed[name] for name in sorted(names) if name in installed}


def _cpu() -> dict[str, Any]:
    model, features = platform.processor(), set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() in ("flags", "Features"):
                features |= {word for word in value.split() if any(kind in word for kind in _CPU_FEATURES)}
    return {
        "model": model,
        "cores": os.cpu_count(),
        "features": sorted(features),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def _accelerators() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [str(accelerator)] if accelerator is not None else []


def _torch() -> dict[str, Any]:
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "config": torch.__config__.show().strip(),
    }


# What can be the reason for other bits, most telling first: where it stands in an environment, and its name in words.
_REASONS = (
    (("python",), "python"),
    (("torch", "cuda"), "torch's CUDA"),
    (("torch", "cudnn"), "cuDNN"),
    (("cpu", "model"), "CPU"),
    (("cpu", "kernels"), "torch's CPU kernels"),
    (("accelerators",), "accelerators"),
    (("torch", "threads"), "threads of torch"),
    (("torch", "float32_matmul_precision"), "float32 matmul precision"),
    (("torch", "deterministic_algorithms"), "deterministic algorithms"),
    (("torch", "cudnn_deterministic"), "cuDNN deterministic"),
    (("torch", "cudnn_benchmark"), "cuDNN benchmark"),
    (("system",), "system"),
    (("machine",), "architecture"),
    (("libc",), "C library"),
)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines that say what was and what is, for all that can change bits; what was not recorded is passed over."""
    lines = []
    for path, words in _REASONS:
        old, new = _at(then, path), _at(now, path)
        if old is not None and old != new:
            lines.append(f"{words}: {_spelled(old)} then, {_spelled(new)} now")
    for kind in ("imports", "variables"):
        old, new = _at(then, (kind,)), _at(now, (kind,))
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            continue
        absent = "not set" if kind == "variables" else "not installed"
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                lines.append(f"{name}: {old.get(name, absent)} then, {new.get(name, absent)} now")
    return lines


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _spelled(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
