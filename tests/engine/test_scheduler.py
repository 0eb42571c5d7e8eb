"""The scheduler decides which texts run, wait and are preempted. Tests pass the time as an argument, so none waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from app.engine.fair_queue import FairQueue
from app.engine.scheduler import Scheduler, TextSequence
from app.limits import Limits

LIMITS = Limits()
LATE = LIMITS.preempt_after_seconds + 0.1  # seconds after which a text may be preempted


@dataclass(eq=False)
class StubText:
    remaining: int
    finished: bool = False
    generated: int = 0


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Harness:
    """A scheduler, and the texts that were queued, by a letter each."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_running: int = 2) -> None:
        self.loop = loop
        self.queue: FairQueue[TextSequence[StubText]] = FairQueue("m")
        self.scheduler: Scheduler[StubText] = Scheduler(max_running, self.queue, LIMITS)

    def add(self, *remaining: int, caller: str | None = None) -> list[TextSequence[StubText]]:
        sequences = [TextSequence(StubText(each), self.loop.create_future(), caller, None, 1.0) for each in remaining]
        for sequence in sequences:
            self.queue.append(sequence)
        return sequences

    def callers(self) -> list[str]:
        return sorted(sequence.caller or "" for sequence in self.scheduler.running)


@pytest.fixture
def harness(loop: asyncio.AbstractEventLoop) -> Harness:
    return Harness(loop)


def test_a_long_running_text_is_preempted_by_a_much_shorter_one_and_resumed(harness: Harness) -> None:
    longer, long = harness.add(200, 100)
    harness.scheduler.schedule(10.0)
    (short,) = harness.add(10)
    assert harness.scheduler.schedule(10.0 + LATE) == [short]
    assert harness.scheduler.running == [long, short]
    short.future.set_result(short.text)
    assert harness.scheduler.schedule(20.0) == []  # the text is resumed, not started again
    assert harness.scheduler.running == [long, longer]
    assert (longer.started_at, longer.joined_at) == (10.0, 20.0)


def test_keys_share_the_slots_of_running_texts(loop: asyncio.AbstractEventLoop) -> None:
    """The texts of a key that comes later do not wait until a text of another key ends."""
    harness = Harness(loop, max_running=4)
    harness.add(*[50] * 6, caller="heavy")
    harness.scheduler.schedule(10.0)
    light = harness.add(*[50] * 3, caller="light")
    assert harness.scheduler.schedule(10.5) == []  # no text has run long enough
    assert harness.scheduler.schedule(10.0 + LATE) == light[:2]
    assert harness.callers() == ["heavy", "heavy", "light", "light"]
    harness.add(50, caller="other")
    harness.scheduler.schedule(10.0 + 2 * LATE)
    assert harness.callers() in (["heavy", "light", "light", "other"], ["heavy", "heavy", "light", "other"])
    assert harness.scheduler.schedule(10.0 + 3 * LATE) == []  # equal shares: nothing is preempted


@pytest.mark.parametrize(("running", "waiting"), [("aa", "aa"), ("ab", "ccc")])
def test_texts_of_similar_length_are_not_preempted_if_no_share_becomes_more_equal(
    harness: Harness, running: str, waiting: str
) -> None:
    for caller in running:
        harness.add(50, caller=caller)
    harness.scheduler.schedule(10.0)
    for caller in waiting:
        harness.add(50, caller=caller)
    assert harness.scheduler.schedule(10.0 + LATE) == []


def test_a_much_shorter_text_takes_no_slot_of_a_key_that_has_no_more_slots(harness: Harness) -> None:
    harness.add(100, caller="a")
    harness.add(100, caller="b")
    harness.scheduler.schedule(10.0)
    harness.add(*[20] * 2, caller="a")
    harness.add(20, caller="b")
    harness.scheduler.schedule(10.0 + LATE)
    assert harness.callers() == ["a", "b"]


def test_texts_to_preempt_are_searched_for_at_intervals(harness: Harness) -> None:
    harness.add(100, 100)
    harness.scheduler.schedule(10.0)
    harness.add(100)
    assert harness.scheduler.schedule(12.0) == []  # finds no text to preempt
    (short,) = harness.add(10)
    assert harness.scheduler.schedule(12.0 + LIMITS.preempt_check_seconds / 2) == []
    assert harness.scheduler.schedule(12.0 + 1.01 * LIMITS.preempt_check_seconds) == [short]
