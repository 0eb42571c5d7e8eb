"""Whether an engine's network fails on whatever it is asked."""

from __future__ import annotations

import time

ENOUGH = 3  # failures in a row, each of an input alone: what one input does is its own
FORGET = 10.0  # seconds after the last one: then it is tried again, for a process that gets no requests never recovers


class Failing:
    """Counts failures in a row."""

    def __init__(self) -> None:
        self._count = 0
        self._last = 0.0

    def failed(self) -> None:
        """The network failed on an input that was computed alone."""
        self._count += 1
        self._last = time.monotonic()

    def worked(self) -> None:
        """It gave answers."""
        self._count = 0

    def now(self) -> bool:
        """Whether requests should go elsewhere."""
        return self._count >= ENOUGH and time.monotonic() - self._last < FORGET
