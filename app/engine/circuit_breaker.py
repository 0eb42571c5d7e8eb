"""Circuit breaker: detects a network that fails on every input."""

from __future__ import annotations

import time

FAILURE_THRESHOLD = 3  # consecutive failures of inputs computed alone, so one bad input does not open the breaker
RESET_SECONDS = 10.0  # the breaker closes this long after the last failure: without requests there is no success


class CircuitBreaker:
    """Counts consecutive failures. While open, readiness is off and requests should go to another process."""

    def __init__(self) -> None:
        self._failures = 0
        self._last_failure = 0.0

    def record_failure(self) -> None:
        """Count a failure of an input that was computed alone."""
        self._failures += 1
        self._last_failure = time.monotonic()

    def record_success(self) -> None:
        """Reset the count."""
        self._failures = 0

    def is_open(self) -> bool:
        """Return whether requests should go to another process."""
        return self._failures >= FAILURE_THRESHOLD and time.monotonic() - self._last_failure < RESET_SECONDS
