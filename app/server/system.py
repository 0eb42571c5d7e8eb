"""Find what this process may use: CPU cores, memory, files and signals. Set memory options of glibc."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
from pathlib import Path, PurePath

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # its line ``0::/path`` names the cgroup of this process
M_ARENA_MAX = -8  # number of an option of glibc's mallopt


def cores(cgroup: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """Return the number of cores that this process may use. CPU affinity and the quotas of its cgroups limit it."""
    count = len(os.sched_getaffinity(0))
    for quota, period in _cgroup_limits("cpu.max", cgroup, membership):
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    return count


def available_memory(cgroup: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """Return the bytes of memory that all processes may use in total."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(
        [total, *(int(limit) for (limit,) in _cgroup_limits("memory.max", cgroup, membership) if limit != "max")]
    )


def _cgroup_limits(file: str, root: Path, membership: Path) -> list[list[str]]:
    """Return the words of a file of the cgroup v2 of this process, and of all its parents: the limits of all apply.

    In most containers, there is only the cgroup ``root``. Under systemd, the limits of a unit are in a folder below it.
    """
    own = PurePath(_text(membership).partition("0::/")[2].partition("\n")[0])
    folders = [] if ".." in own.parts else [own, *own.parents]  # the process may not see its own cgroup
    return [words for folder in {PurePath(), *folders} if (words := _text(root / folder / file).split())]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def raise_file_limit() -> None:
    """Raise the limit of open files and connections to the allowed maximum, because the default is often lower."""
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))


def single_arena() -> None:
    """Let all later threads allocate memory from one glibc arena. By default, each thread may get its own arena.

    Free memory of one arena cannot be used by another arena. A single arena saves 45 to 85 MiB for two workers. The
    threads of this service rarely wait for the lock of the arena.
    """
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def handles_sighup() -> bool:
    """Return whether SIGHUP stops the service. This is false under ``nohup``."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
