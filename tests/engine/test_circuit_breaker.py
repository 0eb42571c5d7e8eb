"""The circuit breaker counts failed recoveries. ``test_simulation`` tests when it opens and closes."""

from __future__ import annotations

from app.engine.circuit_breaker import CircuitBreaker
from app.limits import Limits

LIMITS = Limits(breaker_failures=3, breaker_reset_seconds=10)


def test_each_failure_after_the_reset_time_is_a_failed_recovery() -> None:
    now = 1000.0
    breaker = CircuitBreaker(LIMITS, lambda: now)
    for recoveries in (0, 0, 0, 1, 2):  # the first failures do not open the breaker, so nothing can recover
        now += 20
        breaker.record_failure()
        assert breaker.failed_recoveries == recoveries
    breaker.record_failure()
    assert (breaker.failed_recoveries, breaker.is_open()) == (2, True)
    breaker.record_success()
    assert breaker.failed_recoveries == 0
