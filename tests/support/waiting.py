"""Wait for a condition, or for another test process."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def wait_until(condition: Callable[[], bool]) -> None:
    """Check a condition every 5 ms until it holds; fail after 30 s."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true within 30 seconds"
        time.sleep(0.005)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that other test processes of pytest-xdist wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
