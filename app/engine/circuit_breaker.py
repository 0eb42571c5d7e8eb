"""A circuit breaker, which detects a network that fails on every input."""

from __future__ import annotations

import time

FAILURE_THRESHOLD = 3  # consecutive failures that open the breaker; a single bad input must not open it
# The breaker closes this many seconds after the last failure. It must close without a success, because an open breaker
# keeps requests away, and without requests there is no success.
RESET_SECONDS = 10.0


class CircuitBreaker:
    """Counts the consecutive failures of a network, and opens after ``FAILURE_THRESHOLD`` failures.

    While the breaker is open, the process reports that it is not ready, so that requests go to another process.
    ``failed_recoveries`` counts how often the network failed when it was tried again after ``RESET_SECONDS``. A success
    sets it to 0.
    """

    def __init__(self) -> None:
        self.failed_recoveries = 0
        self._failures = 0
        self._last_failure = 0.0

    def record_failure(self) -> None:
        """Count a failure of the engine, or of the network on an input that was computed alone."""
        now = time.monotonic()
        if self._failures >= FAILURE_THRESHOLD and now - self._last_failure >= RESET_SECONDS:
            self.failed_recoveries += 1
        self._failures += 1
        self._last_failure = now

    def record_success(self) -> None:
        """Set the number of failures and ``failed_recoveries`` to 0."""
        self._failures = self.failed_recoveries = 0

    def is_open(self) -> bool:
        """Return whether the breaker is open, which means that requests should go to another process."""
        return self._failures >= FAILURE_THRESHOLD and time.monotonic() - self._last_failure < RESET_SECONDS
