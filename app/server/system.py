"""Find what this process may use: CPU cores, memory, files and signals. Set memory options of glibc."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # its line ``0::/path`` names the cgroup of this process
M_ARENA_MAX = -8  # number of an option of glibc's mallopt


def cores(cgroup: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """Return the number of cores that this process may use.

    CPU affinity and the quotas of its cgroups (cgroup v2 ``cpu.max``, or cgroup v1) limit this number.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_words(folder / "cpu.max") for folder in _own_cgroups(cgroup, membership)]
    quotas.append([word for name in ("quota", "period") for word in _words(cgroup / "cpu" / f"cpu.cfs_{name}_us")])
    for words in quotas:
        quota, period = [*words, "", ""][:2]
        if quota.isdigit() and period.isdigit() and int(period):
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def available_memory(
    cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo"), membership: Path = MEMBERSHIP
) -> int | None:
    """Return the bytes of memory that all processes may use in total, or None if the limit is unknown."""
    words = _words(meminfo)
    total = [int(words[words.index("MemTotal:") + 1]) * 1024] if "MemTotal:" in words else []
    limits = [_words(folder / "memory.max") for folder in _own_cgroups(cgroup, membership)]
    limits.append(_words(cgroup / "memory" / "memory.limit_in_bytes"))
    return min(total + [int(limit[0]) for limit in limits if limit and limit[0].isdigit()], default=None)


def _own_cgroups(root: Path, membership: Path) -> list[Path]:
    """Return the folders of the cgroup v2 of this process and of all its parents, because the limits of all apply.

    In most containers, this is only ``root``. Under systemd, the limits of a unit are in a folder below ``root``.
    """
    lines = _text(membership).splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    names = own.split("/")
    if ".." in names:  # the cgroup is outside the part of the hierarchy that this process sees
        return [root]
    return [root, *(root.joinpath(*names[: end + 1]) for end in range(len(names)))]


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def raise_file_limit() -> None:
    """Raise the limit of open files and connections to the allowed maximum, because the default is often lower."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))


def single_arena() -> None:
    """Let all later threads allocate memory from one glibc arena. By default, each thread may get its own arena.

    Free memory of one arena cannot be used by another arena. A single arena saves 45 to 85 MiB for two workers. The
    threads of this service rarely wait for the lock of the arena.
    """
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def handles_sighup() -> bool:
    """Return whether SIGHUP stops the service. This is false under ``nohup``, and on systems without SIGHUP."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def can_fork() -> bool:
    """Return whether this system can fork workers."""
    return sys.platform == "linux" and hasattr(os, "fork")
