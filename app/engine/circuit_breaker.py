"""A circuit breaker, which detects a network that fails on every input."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.limits import Limits


class CircuitBreaker:
    """Counts the consecutive failures of a network, and opens after ``breaker_failures`` failures.

    While the breaker is open, the process reports that it is not ready, so that requests go to another process. It
    closes ``breaker_reset_seconds`` after the last failure. It must close without a success, because an open breaker
    keeps requests away, and without requests there is no success. ``failed_recoveries`` counts how often the network
    failed when it was tried again. A success sets it to 0.
    """

    def __init__(self, limits: Limits = Limits(), clock: Callable[[], float] = time.monotonic) -> None:
        self.failed_recoveries = 0
        self._failures = 0
        self._last_failure = 0.0
        self._limits, self._clock = limits, clock

    def record_failure(self) -> None:
        """Count a failure of the engine, or of the network on an input that was computed alone."""
        now = self._clock()
        if self._has_failed() and now - self._last_failure >= self._limits.breaker_reset_seconds:
            self.failed_recoveries += 1
        self._failures += 1
        self._last_failure = now

    def record_success(self) -> None:
        """Set the number of failures and ``failed_recoveries`` to 0."""
        self._failures = self.failed_recoveries = 0

    def is_open(self) -> bool:
        """Return whether the breaker is open, which means that requests should go to another process."""
        return self._has_failed() and self._clock() - self._last_failure < self._limits.breaker_reset_seconds

    def _has_failed(self) -> bool:
        return self._failures >= self._limits.breaker_failures
