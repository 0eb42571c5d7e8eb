"""The number of usable cores, the usable memory, and the number of workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.service import ROOT

from app.server.process import Machine, plan_workers
from app.server.system import available_memory, cores
from app.settings import Settings, SettingsError


def test_the_cpu_quota_of_a_container_limits_the_cores(tmp_path: Path) -> None:
    own = len(os.sched_getaffinity(0))
    assert cores(tmp_path) == own
    more = f"{(own + 1) * 100000} 100000"
    for text, expected in (("max 100000", own), ("50000 100000", 1), ("100000 100000", 1), (more, own)):
        (tmp_path / "cpu.max").write_text(text)
        assert cores(tmp_path) == expected


def test_the_memory_limit_of_a_container_limits_the_memory(tmp_path: Path) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory(tmp_path) == total
    (tmp_path / "memory.max").write_text("max")
    assert available_memory(tmp_path) == total
    (tmp_path / "memory.max").write_text("1048576")
    assert available_memory(tmp_path) == 2**20


def test_the_limits_of_the_own_cgroup_and_its_parents_apply(tmp_path: Path) -> None:
    """systemd sets MemoryMax and CPUQuota on a cgroup below the root, or on one of its parents."""
    root, membership = tmp_path / "root", tmp_path / "membership"
    membership.write_text("1:cpu:/other.slice\n0::/system.slice/quartet.service\n")
    unit, other = root / "system.slice" / "quartet.service", root / "other.slice"
    unit.mkdir(parents=True)
    other.mkdir()
    (other / "memory.max").write_text("1")
    (unit / "memory.max").write_text("1048576")
    assert available_memory(root, membership) == 2**20
    (unit.parent / "memory.max").write_text("4096")
    assert available_memory(root, membership) == 4096
    for folder in (unit, unit.parent):
        (unit / "cpu.max").write_text("max 100000")
        (unit.parent / "cpu.max").write_text("max 100000")
        (folder / "cpu.max").write_text("100000 100000")
        assert cores(root, membership) == 1
    membership.write_text("0::/../other.slice\n")  # outside the visible hierarchy
    assert available_memory(root, membership) > 2**20


@pytest.mark.parametrize(
    ("machine", "settings", "expected"),
    [
        ({"cores": 1}, {}, (1, 1)),
        ({"cores": 2}, {}, (2, 1)),
        ({"cores": 2}, {"threads": 2}, (1, 2)),
        ({"cores": 2}, {"workers": 1}, (1, 2)),
        ({"cores": 2}, {"workers": 3}, (3, 1)),
        ({"cores": 16}, {}, (16, 1)),
        ({"cores": 16}, {"threads": 4}, (4, 4)),
        ({"cores": 64}, {}, (16, 4)),
        ({"cores": 16, "memory_bytes": 2**30}, {}, (5, 3)),  # 512 MiB are available for workers of 100 MiB each
        ({"cores": 16, "memory_bytes": 2**20}, {}, (1, 16)),
        ({"cores": 16, "has_gpu": True}, {}, (1, 16)),
    ],
)
def test_workers_and_threads_use_each_core_once(
    machine: dict[str, Any], settings: dict[str, int], expected: tuple[int, int]
) -> None:
    found = Machine(**{"memory_bytes": 2**40, "worker_bytes": 100 * 2**20, **machine})
    assert plan_workers(Settings(**settings), found) == expected


def test_several_workers_on_a_gpu_are_rejected() -> None:
    machine = Machine(16, 2**30, 1, has_gpu=True)
    with pytest.raises(
        SettingsError, match="QUARTET_WORKERS is 2: only one process can use a GPU; allowed values: 0, 1"
    ):
        plan_workers(Settings(workers=2), machine)


HEAPS = """
import ctypes, sys, threading
from app.server.system import single_arena
library = ctypes.CDLL(None)
if not hasattr(library, "malloc_info"):
    sys.exit("no glibc")
if "single" in sys.argv:
    single_arena()
all_allocated = threading.Barrier(4)
def work():
    library.malloc(5000)
    all_allocated.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
library.malloc_info(0, ctypes.c_void_p.in_dll(library, "stdout"))
library.fflush(None)
"""


def test_threads_share_one_arena() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}

    def heaps(*arguments: str) -> int:
        result = subprocess.run(
            [sys.executable, "-c", HEAPS, *arguments],
            capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
        )  # fmt: skip
        if "no glibc" in result.stderr:
            pytest.skip("the C library is not glibc")
        return result.stdout.count("<heap nr=")

    assert heaps("single") == 1
    assert heaps() > 1
