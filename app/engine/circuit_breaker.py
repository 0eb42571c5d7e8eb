"""Whether an engine's network fails on whatever it is asked."""

from __future__ import annotations

import time

FAILURE_THRESHOLD = 3  # failures in a row, each of an input alone: what one input does is its own
RESET_SECONDS = (
    10.0  # seconds after the last one: then it is tried again, for a process that gets no requests never recovers
)


class CircuitBreaker:
    """Counts failures in a row."""

    def __init__(self) -> None:
        self._failures = 0
        self._last_failure = 0.0

    def record_failure(self) -> None:
        """The network failed on an input that was computed alone."""
        self._failures += 1
        self._last_failure = time.monotonic()

    def record_success(self) -> None:
        """It gave answers."""
        self._failures = 0

    def is_open(self) -> bool:
        """Whether requests should go elsewhere."""
        return self._failures >= FAILURE_THRESHOLD and time.monotonic() - self._last_failure < RESET_SECONDS
