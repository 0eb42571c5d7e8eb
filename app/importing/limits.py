"""Run an import in a process of its own with low priority, and with limits for its memory and time."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BASE_BYTES = 2**30  # memory of an import besides the copies of the file; Python and torch take 250 MiB
COPIES = 5  # of the file: as bytes, parsed, as a tensor, in onnxruntime, and as a file of the store
IMPORT_SECONDS = 600.0


def run_limited(arguments: Sequence[str], seconds: float = IMPORT_SECONDS) -> int:
    """Run ``python -m app.models`` with limits for memory and time, and return its exit status.

    If the limits end the process, the reason is printed to stderr as an error of the command.
    """
    command = [sys.executable, "-m", "app.cli.models", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # speeds are measured on one thread
    try:
        status = subprocess.run(command, env=environment, timeout=seconds, preexec_fn=_limit, check=False).returncode
    except subprocess.TimeoutExpired:
        reason = f"took more than {seconds:g} s"
    else:
        if status >= 0:
            return status
        reason = f"was ended by {signal.Signals(-status).name}: it may need too much memory, or divide integers by 0"
    print(f"error: the import {reason}", file=sys.stderr)
    return 1


def _limit() -> None:
    os.nice(10)  # so that requests for other models are not delayed
    resource.setrlimit(resource.RLIMIT_DATA, (BASE_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # if the machine runs out of memory, end this process first
        Path("/proc/self/oom_score_adj").write_text("1000")


def allow_bytes(size: int) -> None:
    """Raise the limit of this process, if it has one, so that it can import files of ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (max(soft, BASE_BYTES + COPIES * size), hard))
