"""Admission control: which requests are rejected, and with which message."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.engine import RecordingObserver

from app.engine.admission import MAX_RETRY_AFTER, AdmissionControl, current_caller
from app.errors import NotReady, Overloaded


class Observer(RecordingObserver):
    """An observer that records the reasons of rejections."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def on_rejected(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture(autouse=True)
def _no_caller() -> Iterator[None]:
    token = current_caller.set(None)
    yield
    current_caller.reset(token)


def rejection(admission: AdmissionControl, rows: int, rows_per_second: float = 0.0) -> Overloaded:
    with pytest.raises(Overloaded) as raised:
        admission.admit(rows, rows_per_second)
    return raised.value


def test_rows_are_admitted_up_to_the_limit() -> None:
    admission = AdmissionControl("m", None, 10)
    admission.admit(99, 0.0)  # an empty queue accepts any request
    admission.add(None, 4)
    admission.admit(6, 0.0)
    assert str(rejection(admission, 7)) == "the queue of m is full: 4 of 10 rows are waiting; this request adds 7"
    admission.remove(None, 1)
    admission.admit(7, 0.0)
    assert (admission.waiting, admission.rejected) == (3, 1)


@pytest.mark.parametrize(
    ("rows_per_second", "seconds"),
    [(0.0, 1), (6.0, 2), (5.9, 3), (1000.0, 1), (12 / MAX_RETRY_AFTER, MAX_RETRY_AFTER), (0.001, MAX_RETRY_AFTER)],
)
def test_retry_after_is_the_time_of_the_waiting_and_the_rejected_rows(rows_per_second: float, seconds: int) -> None:
    admission = AdmissionControl("m", None, 10)
    admission.add(None, 5)
    assert rejection(admission, 7, rows_per_second).retry_after == seconds


def test_a_key_may_have_as_many_waiting_rows_as_are_free() -> None:
    admission = AdmissionControl("m", None, 10)
    admission.add("alice", 4)
    admission.add("alice", 1)
    admission.add("bob", 1)
    current_caller.set("alice")
    expected = "the queue of m is full: 6 of 10 rows are waiting, 5 of them of alice; this request adds 1"
    assert str(rejection(admission, 1)) == expected
    current_caller.set("bob")
    admission.admit(3, 0.0)
    rejection(admission, 4)
    current_caller.set("carol")
    admission.admit(4, 0.0)
    rejection(admission, 5)
    current_caller.set("alice")
    admission.remove("alice", 2)
    admission.admit(3, 0.0)
    admission.remove("alice", 3)
    admission.remove("bob", 1)
    assert (admission.waiting, admission.rejected, admission._waiting_by_caller) == (0, 3, {})


def test_rejections_are_reported_with_their_reason() -> None:
    observer = Observer()
    admission = AdmissionControl("m", observer, 1)
    admission.add(None, 1)
    rejection(admission, 1)
    admission.closed = True
    with pytest.raises(NotReady, match=r"^m is stopping$"):
        admission.admit(1, 0.0)
    assert observer.reasons == ["queue_full", "stopping"]
    assert admission.rejected == 1
