"""The scheduler decides which texts run, wait and are preempted. Tests pass the time as an argument, so none waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from app.engine.admission import AdmissionControl
from app.engine.scheduler import PREEMPT_AFTER, PREEMPT_RATIO, Scheduler, TextSequence

LATE = PREEMPT_AFTER + 0.1  # seconds after which a text may be preempted


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
    """A scheduler with two slots, and the texts that were queued."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_running: int = 2) -> None:
        self.loop = loop
        self.admission = AdmissionControl("m", None, 99)
        self.scheduler: Scheduler[StubText] = Scheduler(max_running, self.admission)

    def add(self, *remaining: int, caller: str | None = None) -> list[TextSequence[StubText]]:
        sequences = [TextSequence(StubText(each), self.loop.create_future(), caller=caller) for each in remaining]
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences

    def check(self, running: list[TextSequence[StubText]], waiting: list[TextSequence[StubText]]) -> None:
        assert self.scheduler.running == running
        assert list(self.scheduler.waiting) == waiting
        assert [sequence.waiting for sequence in (*running, *waiting)] == [False] * len(running) + [True] * len(waiting)
        assert self.admission.waiting == len(waiting)


@pytest.fixture
def harness(loop: asyncio.AbstractEventLoop) -> Harness:
    return Harness(loop)


def test_texts_run_in_order_of_arrival_in_the_free_slots(harness: Harness) -> None:
    first, second, third = harness.add(5, 5, 5)
    harness.check([], [first, second, third])
    assert harness.scheduler.schedule(10.0) == [first, second]
    harness.check([first, second], [third])
    assert [sequence.started_at for sequence in (first, second, third)] == [10.0, 10.0, 0.0]
    assert harness.scheduler.schedule(10.1) == []


def test_a_finished_text_frees_its_slot_for_the_next(harness: Harness) -> None:
    first, second, third = harness.add(5, 5, 5)
    harness.scheduler.schedule(10.0)
    first.future.set_result(first.text)
    harness.scheduler.drop_done()
    harness.check([second], [third])
    assert harness.scheduler.schedule(10.1) == [third]
    harness.check([second, third], [])


def test_a_cancelled_text_leaves_the_queue_or_its_slot(harness: Harness) -> None:
    running, other, waiting, last = harness.add(5, 5, 5, 5)
    harness.scheduler.schedule(10.0)
    for sequence in (running, waiting):
        sequence.future.cancel()
        harness.scheduler.discard(sequence)
        harness.scheduler.discard(sequence)  # a second time changes nothing
    harness.check([running, other], [last])
    assert harness.scheduler.schedule(10.1) == [last]
    harness.check([other, last], [])


def test_a_text_that_failed_in_the_queue_never_runs(harness: Harness) -> None:
    failed, good = harness.add(5, 5)
    failed.future.cancel()
    assert harness.scheduler.schedule(10.0) == [good]
    harness.check([good], [])


def test_only_waiting_texts_count_towards_the_share_of_their_key(harness: Harness) -> None:
    first, second, cancelled = harness.add(5, 5, 5, caller="a")
    harness.scheduler.discard(cancelled)
    assert harness.admission._waiting_by_caller == {"a": 2}
    harness.scheduler.schedule(10.0)
    harness.check([first, second], [])
    assert harness.admission._waiting_by_caller == {}


def test_a_failed_text_gives_its_error_to_its_caller_and_wakes_its_consumer(harness: Harness) -> None:
    plain, streamed = harness.add(5, 5)
    streamed.updated = asyncio.Event()
    error = ValueError("the network failed")
    for sequence in (plain, streamed):
        sequence.fail(error)
        sequence.fail(ValueError("a second error changes nothing"))
        assert sequence.future.exception() is error
    assert streamed.updated.is_set()


def test_a_long_running_text_is_preempted_by_a_much_shorter_one_and_resumed(harness: Harness) -> None:
    long, longer = harness.add(100, 200)
    harness.scheduler.schedule(10.0)
    (short,) = harness.add(10)
    assert harness.scheduler.schedule(10.0 + LATE) == [short]
    harness.check([longer, short], [long])
    short.future.set_result(short.text)
    assert harness.scheduler.schedule(20.0) == []  # the text is resumed, not started again
    harness.check([longer, long], [])
    assert (long.started_at, long.joined_at) == (10.0, 20.0)


def test_at_most_one_text_is_preempted_per_waiting_text(harness: Harness) -> None:
    harness.add(100, 200)
    harness.scheduler.schedule(10.0)
    short = harness.add(10, 10, 10)
    assert harness.scheduler.schedule(10.0 + LATE) == short[:2]
    assert harness.scheduler.running == short[:2]


def test_each_text_is_replaced_by_a_much_shorter_one_only(loop: asyncio.AbstractEventLoop) -> None:
    harness = Harness(loop, max_running=4)
    running = harness.add(4000, 4000, 4000, 500)
    harness.scheduler.schedule(10.0)
    waiting = harness.add(4000, 200, 4000, 10, 1000)
    assert harness.scheduler.schedule(10.0 + LATE) == [waiting[3], waiting[1]]  # the shortest comes first
    harness.check([*running[2:], waiting[3], waiting[1]], [waiting[0], waiting[2], waiting[4], *running[:2]])


def test_a_free_slot_goes_to_the_text_that_has_waited_longest(harness: Harness) -> None:
    """Shorter texts preempt texts, but do not delay texts that already wait."""
    first, second = harness.add(100, 100)
    harness.scheduler.schedule(10.0)
    long, short, other = harness.add(90, 10, 10)
    assert harness.scheduler.schedule(10.0 + LATE) == [short, other]
    harness.check([short, other], [long, first, second])
    harness.add(5)
    short.future.set_result(short.text)
    assert harness.scheduler.schedule(10.0 + 2 * LATE) == [long]


@pytest.mark.parametrize(
    ("remaining", "seconds"),
    [
        (10 * PREEMPT_RATIO, LATE),  # the text is not long enough
        (10 * PREEMPT_RATIO + 1, PREEMPT_AFTER),  # the text has not run long enough
    ],
)
def test_a_text_is_not_preempted_early_or_by_one_of_similar_length(
    harness: Harness, remaining: int, seconds: float
) -> None:
    running = harness.add(remaining, remaining)
    harness.scheduler.schedule(10.0)
    waiting = harness.add(10)
    assert harness.scheduler.schedule(10.0 + seconds) == []
    harness.check(running, waiting)


def test_no_text_is_preempted_while_a_slot_is_free(harness: Harness) -> None:
    long = harness.add(100)
    harness.scheduler.schedule(10.0)
    short = harness.add(10)
    assert harness.scheduler.schedule(10.0 + LATE) == short
    harness.check([*long, *short], [])


def test_texts_to_preempt_are_searched_for_at_intervals(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.scheduler.PREEMPT_CHECK_INTERVAL", 0.25)
    long = harness.add(100, 100)
    harness.scheduler.schedule(10.0)
    waiting = harness.add(100)
    harness.scheduler.schedule(12.0)  # finds no text to preempt
    waiting += harness.add(10)
    harness.scheduler.schedule(12.125)
    harness.check(long, waiting)
    harness.scheduler.schedule(12.25)
    assert harness.scheduler.running == [long[1], waiting[1]]


def test_callers_with_keys_share_the_slots(loop: asyncio.AbstractEventLoop) -> None:
    harness = Harness(loop, max_running=4)
    heavy, light = harness.add(*[5] * 6, caller="heavy"), harness.add(5, 5, caller="light")
    harness.scheduler.schedule(10.0)
    assert sorted(map(id, harness.scheduler.running)) == sorted(map(id, (*heavy[:2], *light)))


def test_keys_share_the_slots_of_running_texts(loop: asyncio.AbstractEventLoop) -> None:
    """The texts of a key that comes later do not wait until a text of another key ends."""
    harness = Harness(loop, max_running=4)
    heavy = harness.add(*[50] * 6, caller="heavy")
    harness.scheduler.schedule(10.0)
    light = harness.add(*[50] * 3, caller="light")
    assert harness.scheduler.schedule(10.5) == []  # no text has run long enough
    assert harness.scheduler.schedule(10.0 + LATE) == light[:2]
    assert harness.scheduler.running == [*heavy[:2], *light[:2]]
    late = 10.0 + 2 * LATE
    (other,) = harness.add(50, caller="other")
    assert harness.scheduler.schedule(late) == [other]
    assert sorted(text.caller or "" for text in harness.scheduler.running) == ["heavy", "heavy", "light", "other"]
    assert harness.scheduler.schedule(late + LATE) == []  # equal shares: nothing is preempted


def test_texts_of_one_key_and_of_no_key_are_not_preempted_by_their_own(loop: asyncio.AbstractEventLoop) -> None:
    for caller in ("a", None):
        harness = Harness(loop)
        running = harness.add(*[50] * 2, caller=caller)
        harness.scheduler.schedule(10.0)
        waiting = harness.add(*[50] * 2, caller=caller)
        harness.scheduler.schedule(10.0 + LATE)
        harness.check(running, waiting)


def test_more_keys_than_slots_get_one_slot_each(loop: asyncio.AbstractEventLoop) -> None:
    harness = Harness(loop)
    first, second = (harness.add(50, caller=caller)[0] for caller in "ab")
    harness.scheduler.schedule(10.0)
    (third,) = harness.add(50, caller="c")
    harness.scheduler.schedule(10.0 + LATE)
    harness.check([first, second], [third])


def test_a_key_keeps_its_share_although_others_wait(loop: asyncio.AbstractEventLoop) -> None:
    harness = Harness(loop)
    heavy = harness.add(50, 50, caller="heavy")
    harness.scheduler.schedule(10.0)
    (second,), (third,) = harness.add(50, caller="second"), harness.add(50, caller="third")
    assert harness.scheduler.schedule(10.0 + LATE) == [second]
    assert harness.scheduler.running == [heavy[0], second]
    assert set(harness.scheduler.waiting) == {heavy[1], third}


def test_a_key_with_exactly_its_share_keeps_its_slots(loop: asyncio.AbstractEventLoop) -> None:
    harness = Harness(loop, max_running=4)
    equal, more = harness.add(50, 50, caller="equal"), harness.add(50, 50, caller="more")
    harness.scheduler.schedule(10.0)
    waiting = [*harness.add(50, caller="equal"), *harness.add(50, caller="more")]
    assert harness.scheduler.schedule(10.0 + LATE) == []  # two keys, two slots each
    assert set(harness.scheduler.running) == {*equal, *more}
    assert set(harness.scheduler.waiting) == set(waiting)
    (third,) = harness.add(50, caller="third")  # three keys: one slot each, and one more
    assert harness.scheduler.schedule(10.0 + 2 * LATE) == [third]
    assert sorted(text.caller or "" for text in harness.scheduler.running) in (
        ["equal", "equal", "more", "third"],
        ["equal", "more", "more", "third"],
    )


def test_a_shorter_text_takes_no_slot_of_a_key_that_has_no_more_slots(loop: asyncio.AbstractEventLoop) -> None:
    harness = Harness(loop)
    running = [*harness.add(100, caller="a"), *harness.add(100, caller="b")]
    harness.scheduler.schedule(10.0)
    own, other = harness.add(20, caller="b"), harness.add(20, 20, caller="c")  # three keys share two slots
    assert harness.scheduler.schedule(10.0 + LATE) == [*own, other[0]]
    harness.check([*own, other[0]], [other[1], running[1], running[0]])


def test_a_shorter_text_of_another_key_gets_a_slot_that_cannot_be_shared_equally(
    loop: asyncio.AbstractEventLoop,
) -> None:
    harness = Harness(loop, max_running=3)
    running = harness.add(100, 100, 100, caller="a")
    harness.scheduler.schedule(10.0)
    waiting = harness.add(20, 20, 20, caller="b")
    assert harness.scheduler.schedule(10.0 + LATE) == waiting[:2]
    harness.check([running[1], *waiting[:2]], [waiting[2], running[2], running[0]])


def test_a_text_that_preempts_counts_towards_the_share_of_its_key(loop: asyncio.AbstractEventLoop) -> None:
    harness = Harness(loop)
    harness.add(100, 100, caller="a")
    harness.scheduler.schedule(10.0)
    other, own = harness.add(10, 10, caller="b"), harness.add(10, 10, caller="a")
    assert harness.scheduler.schedule(10.0 + LATE) == [other[0], own[0]]
    own[0].future.set_result(own[0].text)
    assert harness.scheduler.schedule(10.0 + LATE) == [other[1]]
