"""The circuit breaker opens after consecutive failures, closes after some time, and counts failed recoveries."""

from __future__ import annotations

from app.engine.circuit_breaker import CircuitBreaker
from app.limits import Limits

LIMITS = Limits(breaker_failures=3, breaker_reset_seconds=10)


def test_consecutive_failures_open_the_breaker_until_a_success_or_for_a_while() -> None:
    now = 1000.0
    breaker = CircuitBreaker(LIMITS, lambda: now)

    def fail(times: int) -> bool:
        for _ in range(times):
            breaker.record_failure()
        return breaker.is_open()

    assert [breaker.is_open(), fail(2)] == [False, False]
    breaker.record_success()
    assert [fail(2), fail(1)] == [False, True]
    breaker.record_success()
    assert [breaker.is_open(), fail(3)] == [False, True]
    now += 9.5
    assert breaker.is_open()
    now += 0.5
    assert not breaker.is_open()


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
