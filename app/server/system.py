"""What this process may use of the machine: in a container that is less than there is."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
M_ARENA_MAX = -8  # of glibc's mallopt


def cores(cgroup: Path = CGROUP) -> int:
    """The cores that may be used: by affinity, and by the quota of a container (cgroup v2 ``cpu.max``, or v1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    older = [word for name in ("quota", "period") for word in _words(cgroup / "cpu" / f"cpu.cfs_{name}_us")]
    quota, period = [*(_words(cgroup / "cpu.max") or older), "", ""][:2]
    if quota.isdigit() and period.isdigit() and int(period):
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def available_memory(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of memory that may be used in all; None when the system does not tell."""
    words = _words(meminfo)
    total = [int(words[words.index("MemTotal:") + 1]) * 1024] if "MemTotal:" in words else []
    limits = [_words(cgroup / "memory.max"), _words(cgroup / "memory" / "memory.limit_in_bytes")]
    return min(total + [int(limit[0]) for limit in limits if limit and limit[0].isdigit()], default=None)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def raise_file_limit() -> None:
    """Let this process and its children have as many files and connections open as it may: often that is not so."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def single_arena() -> None:
    """Have all threads that are still to come take memory from one heap: glibc gives each its own, and what is free in
    one is of no use to the others. Nobody here waits for its lock, and two workers take 45 to 85 MiB less.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Have the C library return memory that is free to the system: warming up takes much that serving does not need."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
