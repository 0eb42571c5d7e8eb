"""The circuit breaker opens after consecutive failures, closes after some time, and counts failed recoveries."""

from __future__ import annotations

import pytest

from app.engine import circuit_breaker
from app.engine.circuit_breaker import FAILURE_THRESHOLD, RESET_SECONDS, CircuitBreaker


class Clock:
    """A clock that replaces the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(circuit_breaker, "time", clock)
    return clock


def fail(breaker: CircuitBreaker, times: int = FAILURE_THRESHOLD) -> None:
    for _ in range(times):
        breaker.record_failure()


def test_consecutive_failures_open_the_breaker_for_a_while(clock: Clock) -> None:
    breaker = CircuitBreaker()
    assert not breaker.is_open()
    fail(breaker, FAILURE_THRESHOLD - 1)
    assert not breaker.is_open()
    breaker.record_failure()
    assert breaker.is_open()
    clock.now += RESET_SECONDS - 0.5
    assert breaker.is_open()
    clock.now += 0.5
    assert not breaker.is_open()


def test_a_success_resets_the_breaker(clock: Clock) -> None:
    breaker = CircuitBreaker()
    fail(breaker, FAILURE_THRESHOLD - 1)
    breaker.record_success()
    fail(breaker, FAILURE_THRESHOLD - 1)
    assert not breaker.is_open()
    breaker.record_failure()
    assert breaker.is_open()
    breaker.record_success()
    assert not breaker.is_open()


def test_each_failure_after_the_reset_time_is_a_failed_recovery(clock: Clock) -> None:
    breaker = CircuitBreaker()
    fail(breaker)
    assert breaker.failed_recoveries == 0
    for recoveries in (1, 2, 3):
        clock.now += RESET_SECONDS
        assert not breaker.is_open()
        fail(breaker, 2)
        assert (breaker.failed_recoveries, breaker.is_open()) == (recoveries, True)
        breaker.record_failure()
    breaker.record_success()
    assert breaker.failed_recoveries == 0


def test_failures_at_long_intervals_before_the_breaker_opens_are_no_failed_recoveries(clock: Clock) -> None:
    breaker = CircuitBreaker()
    for _ in range(FAILURE_THRESHOLD):
        clock.now += 2 * RESET_SECONDS
        breaker.record_failure()
    assert (breaker.failed_recoveries, breaker.is_open()) == (0, True)
