"""The reports that the reporter of a text engine makes to its observer."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine import RecordingObserver

from app.engine.observer import RequestTrace
from app.engine.scheduler import TextSequence
from app.engine.text_reporter import REPORT_BATCH, TextReporter


@dataclass(eq=False)
class StubText:
    generated: int = 0
    finished: bool = False
    remaining: int = 0


class Observer(RecordingObserver):
    """An observer that records the texts whose first tokens are reported."""

    def __init__(self) -> None:
        super().__init__()
        self.with_token: list[Any] = []

    def on_first_token(self, member: Any, seconds: float) -> None:
        super().on_first_token(member, seconds)
        self.with_token.append(member)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def sequences(loop: asyncio.AbstractEventLoop, *generated: int) -> list[Any]:
    made = [TextSequence(StubText(each), loop.create_future(), queued_at=10.0) for each in generated]
    for sequence in made:
        sequence.started_at = 11.0
    return made


def test_the_first_token_of_each_text_is_reported_once(loop: asyncio.AbstractEventLoop) -> None:
    observer = Observer()
    reporter: TextReporter[Any] = TextReporter(observer)
    reporter.first_tokens(12.0)
    reporter.started([])
    assert not observer.queue_seconds
    early, late, cancelled, empty = made = sequences(loop, 1, 0, 1, 0)
    reporter.started(made[:2])
    reporter.started(made[2:])
    assert observer.queue_seconds == [1.0] * 4
    cancelled.future.cancel()
    empty.text.finished = True
    reporter.first_tokens(13.0)
    assert (observer.first_token_seconds, early.first_token_at) == ([3.0], 13.0)
    assert reporter._without_token == [late]
    late.text.generated = 1
    reporter.first_tokens(14.5)
    reporter.first_tokens(15.0)
    assert observer.first_token_seconds == [3.0, 4.5]
    assert observer.with_token == [early, late]


def test_the_mean_time_between_two_characters_is_reported(loop: asyncio.AbstractEventLoop) -> None:
    observer = RecordingObserver()
    reporter: TextReporter[Any] = TextReporter(observer)
    made = sequences(loop, 5, 2, 1, 0)
    for sequence, first_token_at in zip(made, (20.0, 20.0, 20.0, 0.0), strict=True):
        sequence.first_token_at = first_token_at
        sequence.trace = SimpleNamespace(ended_at=0.0)
        reporter.finished(sequence, 22.0)
        assert (sequence.ended_at, sequence.trace.ended_at) == (22.0, 22.0)
    assert observer.inter_token_seconds == [0.5, 2.0]


def test_finished_texts_are_reported_in_batches(loop: asyncio.AbstractEventLoop) -> None:
    observer = RecordingObserver()
    reporter: TextReporter[Any] = TextReporter(observer)
    reporter.flush()
    made = sequences(loop, *[1] * (REPORT_BATCH + 2))
    for number, sequence in enumerate(made):
        sequence.trace = RequestTrace(str(number))
    for sequence in made[:-3]:
        reporter.finished(sequence, 22.0)
    assert observer.completed_batches == []
    for sequence in made[-3:]:
        reporter.finished(sequence, 23.0)
    first, traces = observer.completed_batches[0], [sequence.trace for sequence in made]
    assert [member.trace for member in first] == traces[:REPORT_BATCH]
    assert (first[0].rows, first[0].queued_at, first[0].started_at, first[0].ended_at) == (1, 10.0, 11.0, 22.0)
    for _ in range(2):
        reporter.flush()
    assert [[member.trace for member in batch] for batch in observer.completed_batches] == [
        traces[:REPORT_BATCH],
        traces[REPORT_BATCH:],
    ]


def test_a_finished_text_is_not_kept_until_it_is_reported(loop: asyncio.AbstractEventLoop) -> None:
    observer = RecordingObserver()
    reporter: TextReporter[Any] = TextReporter(observer)
    made = sequences(loop, 1)
    text = weakref.ref(made[0].text)
    reporter.started(made)
    reporter.first_tokens(20.0)
    reporter.finished(made[0], 22.0)
    made.clear()
    assert text() is None
    reporter.flush()
    assert len(observer.completed_batches) == 1


def test_a_flush_releases_only_ended_texts_without_a_character(loop: asyncio.AbstractEventLoop) -> None:
    reporter: TextReporter[Any] = TextReporter(RecordingObserver())
    running, cancelled = made = sequences(loop, 0, 0)
    reporter.started(made)
    cancelled.future.cancel()
    reporter.flush()
    assert reporter._without_token == [running]
