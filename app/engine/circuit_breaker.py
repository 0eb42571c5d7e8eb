"""Circuit breaker: detects a network that fails on every input."""

from __future__ import annotations

import time

FAILURE_THRESHOLD = 3  # consecutive failures of inputs computed alone, so one bad input does not open the breaker
RESET_SECONDS = 10.0  # the breaker closes this long after the last failure: without requests there is no success


class CircuitBreaker:
    """Counts consecutive failures. While open, readiness is off and requests should go to another process.

    ``failed_recoveries`` counts how often the network failed when it was tried again after ``RESET_SECONDS``.
    """

    def __init__(self) -> None:
        self.failed_recoveries = 0
        self._failures = 0
        self._last_failure = 0.0

    def record_failure(self) -> None:
        """Count a failure of an input that was computed alone."""
        now = time.monotonic()
        if self._failures >= FAILURE_THRESHOLD and now - self._last_failure >= RESET_SECONDS:
            self.failed_recoveries += 1
        self._failures += 1
        self._last_failure = now

    def record_success(self) -> None:
        """Reset the counts."""
        self._failures = self.failed_recoveries = 0

    def is_open(self) -> bool:
        """Return whether requests should go to another process."""
        return self._failures >= FAILURE_THRESHOLD and time.monotonic() - self._last_failure < RESET_SECONDS
