"""What bounds the number of data workers on this machine: cores, memory, shared memory, files."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """What this process may use, here and now; None where this system does not tell."""

    cpus: int
    memory_bytes: int | None  # that can still be taken
    shm_bytes: int | None  # /dev/shm, through which workers hand over their batches
    shm_free_bytes: int | None
    open_files: int | None  # soft limit


def machine(root: Path = Path("/")) -> Machine:
    """Read the affinity and limits of this process, and those of its cgroup (version 1 or 2), a container's too."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_cpu_quota(folder) for folder in _cgroups(root, "cpu")]
    bounds = [_available(root), *(_room(folder) for folder in _cgroups(root, "memory"))]
    shm = root / "dev/shm"
    size = os.statvfs(shm) if shm.is_dir() and hasattr(os, "statvfs") else None
    return Machine(
        cpus=max(1, math.ceil(min([affinity, *(quota for quota in quotas if quota is not None)]))),
        memory_bytes=min((bound for bound in bounds if bound is not None), default=None),
        shm_bytes=size.f_frsize * size.f_blocks if size else None,
        shm_free_bytes=size.f_frsize * size.f_bavail if size else None,
        open_files=_open_files(),
    )


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders with limits on this process: its own cgroup and those above it, each of which binds.

    Inside a container, the path in /proc may be the host's: then only the topmost folder exists.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in [controllers, controller] if controllers else ["", "unified"]:
            folder = root / "sys/fs/cgroup" / mount
            pieces = [piece for piece in path.split("/") if piece]
            yield from (folder.joinpath(*pieces[:n]) for n in range(len(pieces), -1, -1))


def _cpu_quota(folder: Path) -> float | None:
    """Number of cpus that a cgroup may keep busy."""
    quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None  # "max", -1


def _room(folder: Path) -> int | None:
    """Bytes that a cgroup may still take; the pages of files that it has not used of late would make way."""
    for limit, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = (_text(folder / name).strip() for name in (limit, used))
        if most.isdigit() and now.isdigit():
            stat = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
            return max(0, int(most) - int(now) + int(stat.get(idle, 0)))
    return None


def _available(root: Path) -> int | None:
    lines = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
