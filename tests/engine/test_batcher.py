"""The batcher: no timer, rows not requests, one guilty item, bounded, nobody forgotten."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from support.engine import RecordingObserver, one_millisecond, start_tasks

from app.engine.admission import AdmissionControl
from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.errors import InferenceFailed, NotReady, Overloaded

pytestmark = pytest.mark.anyio


class Gate:
    """A network that doubles numbers, once it is let. A negative number is the guilty input."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []

    def predict(self, items: Sequence[int]) -> list[int]:
        self.entered.set()
        assert self.open.wait(10)
        self.batches.append(list(items))
        if min(items) < 0:
            raise ValueError("negative")
        return [2 * item for item in items]

    async def busy(self) -> None:
        """Wait until the network is computing."""
        assert await asyncio.to_thread(self.entered.wait, 10)


@pytest.fixture
async def lane() -> AsyncIterator[Executor]:
    lane = Executor("test")
    yield lane
    lane.close()


def batcher(
    gate: Gate, lane: Executor, seen: RecordingObserver | None = None, batch_rows: int = 4, queue_rows: int = 8
) -> Any:
    return Batcher(
        "m", gate.predict, lambda item: 1, one_millisecond, lane, seen or RecordingObserver(), batch_rows, queue_rows
    )


async def test_idle_means_instant_and_busy_means_full(lane: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, lane)
    first = await start_tasks(engine.submit([1]))
    await gate.busy()
    rest = await start_tasks(*(engine.submit([i]) for i in range(2, 8)))
    gate.open.set()
    assert await asyncio.gather(*first, *rest) == [[2 * i] for i in range(1, 8)]
    assert gate.batches == [[1], [2, 3, 4, 5], [6, 7]]


async def test_limits_count_rows_and_a_larger_item_goes_alone(lane: Executor) -> None:
    gate = Gate()
    engine: Any = Batcher(
        "m", gate.predict, lambda item: item, one_millisecond, lane, RecordingObserver(), batch_rows=4, queue_rows=99
    )
    first = await start_tasks(engine.submit([1]))
    await gate.busy()
    rest = await start_tasks(*(engine.submit([rows]) for rows in (3, 2, 9, 1, 1)))
    gate.open.set()
    await asyncio.gather(*first, *rest)
    assert gate.batches == [[1], [3], [2], [9], [1, 1]]


async def test_only_the_guilty_item_gets_the_error(lane: Executor) -> None:
    gate, seen = Gate(), RecordingObserver()
    engine = batcher(gate, lane, seen)
    first = await start_tasks(engine.submit([1]))
    await gate.busy()
    rest = await start_tasks(engine.submit([2]), engine.submit([-3]), engine.submit([4]))
    gate.open.set()
    answers = await asyncio.gather(*first, *rest, return_exceptions=True)
    assert [answers[i] for i in (0, 1, 3)] == [[2], [4], [8]]
    assert isinstance(answers[2], InferenceFailed)
    assert len(seen.failures) == 1
    assert await engine.submit([5]) == [10]


async def test_a_wrong_number_of_answers_fails_the_callers_and_not_the_engine(lane: Executor) -> None:
    right = threading.Event()

    def predict(items: Sequence[int]) -> list[int]:
        return list(items) if right.is_set() else []

    engine: Any = Batcher("m", predict, lambda item: 1, one_millisecond, lane, RecordingObserver(), 4, 8)
    with pytest.raises(InferenceFailed):
        await engine.submit([1, 2])
    right.set()
    assert await engine.submit([1, 2]) == [1, 2]


async def test_a_full_queue_refuses_exactly_the_surplus_and_says_when_to_come_back(lane: Executor) -> None:
    gate, seen = Gate(), RecordingObserver()
    engine = batcher(gate, lane, seen, queue_rows=8)
    first = await start_tasks(engine.submit([0]))
    await gate.busy()
    rest = await start_tasks(*(engine.submit([i]) for i in range(1, 12)))
    refused = [task for task in rest if task.done()]
    assert refused == rest[8:]
    for task in refused:
        error = task.exception()
        assert isinstance(error, Overloaded)
        assert error.headers() == {"retry-after": "1"}
    gate.open.set()
    assert await asyncio.gather(*first, *rest[:8]) == [[2 * i] for i in range(9)]
    assert seen.rejections == 3


async def test_a_request_is_queued_whole_or_not_at_all(lane: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, lane, queue_rows=4)
    tasks = await start_tasks(engine.submit([0]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([1, 2, 3]), engine.submit([4, 5]), engine.submit([6]))
    gate.open.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answers[i] for i in (0, 1, 3)] == [[0], [2, 4, 6], [12]]
    assert isinstance(answers[2], Overloaded)


async def test_an_abandoned_item_is_not_computed(lane: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, lane)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([2]), engine.submit([3]))
    tasks[1].cancel()
    await asyncio.sleep(0)
    assert len(engine._queue) == 1  # it takes no memory either
    gate.open.set()
    assert await asyncio.gather(tasks[0], tasks[2]) == [[2], [6]]
    assert gate.batches == [[1], [3]]


async def test_who_leaves_while_it_is_computed_is_left_alone_and_the_others_have_their_answers(lane: Executor) -> None:
    gate, seen = Gate(), RecordingObserver()
    engine = batcher(gate, lane, seen)
    alone = await start_tasks(engine.submit([1]))
    await gate.busy()
    gate.entered.clear()
    rest = await start_tasks(engine.submit([2]), engine.submit([-3]), engine.submit([4]))
    for _ in range(2):  # once would do
        alone[0].cancel()
    gate.open.set()
    await gate.busy()  # now the others are computed
    rest[1].cancel()
    answers = await asyncio.gather(*alone, *rest, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert isinstance(answers[2], asyncio.CancelledError)
    assert [answers[1], answers[3]] == [[4], [8]]
    assert engine.load == (0, 0)
    assert await engine.submit([5]) == [10]


async def test_who_leaves_while_it_stops_does_not_hold_it(lane: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, lane)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([2]), engine.submit([3]), engine.close(10))
    for task in tasks[:2]:
        task.cancel()
    gate.open.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers[:2]] == [asyncio.CancelledError] * 2
    assert answers[2:] == [[6], None]
    assert gate.batches == [[1], [3]]
    assert engine.load == (0, 0)


async def test_jobs_that_wait_for_a_thread_are_bounded_and_leave_with_their_callers() -> None:
    lane, gate, done = Executor("parse", max_waiting=3), Gate(), list[int]()
    (running,) = await start_tasks(lane.run(gate.predict, [0]))
    await gate.busy()
    waiting = await start_tasks(*(lane.run(done.append, number) for number in range(5)))
    assert [task.done() for task in waiting] == [False] * 3 + [True] * 2
    for task in waiting[3:]:
        with pytest.raises(Overloaded, match="the queue of request parsing is full: 3 of 3 rows wait"):
            await task
    waiting[1].cancel()
    (late,) = await start_tasks(lane.run(done.append, 9))
    (last,) = await start_tasks(lane.run_admitted(done.append, 10))  # what was let in is not refused at its end
    running.cancel()  # its thread is not free before it has ended
    await asyncio.sleep(0)
    assert not done
    gate.open.set()
    await asyncio.gather(waiting[0], waiting[2], late, last)
    assert done == [0, 2, 9, 10]
    assert await lane.run(int) == 0
    lane.close()


async def test_a_job_that_is_cancelled_as_its_turn_comes_passes_it_on() -> None:
    lane, gate = Executor("parse", max_waiting=3), Gate()
    (running,) = await start_tasks(lane.run(gate.predict, [0]))
    await gate.busy()
    gone, other = await start_tasks(lane.run(int), lane.run(int))
    leave = lane._release

    def leaving() -> None:
        leave()
        gone.cancel()  # before it could begin

    lane._release = leaving  # type: ignore[method-assign]
    gate.open.set()
    await running
    assert await other == 0
    assert gone.cancelled()
    lane._release = leave  # type: ignore[method-assign]
    assert await lane.run(int) == 0
    lane.close()


async def test_a_thread_that_nobody_waits_for_any_more_is_known_to_compute() -> None:
    """Else a process that is told to stop would wait for it at its end."""
    lane, gate = Executor("test"), Gate()
    (running,) = await start_tasks(lane.run(gate.predict, [0]))
    await gate.busy()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert lane.oldest_job_seconds() == 0
    assert lane.busy
    gate.open.set()
    await lane.run(int)
    while lane.busy:  # noqa: ASYNC110  # the loop is told in a moment
        await asyncio.sleep(0.001)
    lane.close()


async def test_a_lane_that_is_closed_leaves_nobody_waiting() -> None:
    lane, gate = Executor("parse", max_waiting=3), Gate()
    running, waiting = await start_tasks(lane.run(gate.predict, [0]), lane.run(int))
    await gate.busy()
    lane.close()
    gate.open.set()
    answers = await asyncio.gather(running, waiting, return_exceptions=True)
    assert answers[0] == [0]
    assert isinstance(answers[1], asyncio.CancelledError)


async def test_what_takes_far_longer_than_expected_holds_the_event_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.executor.INLINE_OVERRUN_SECONDS", 0.0)
    lane, where = Executor("test", inline_seconds=1.0), list[int]()
    for _ in range(3):
        await lane.run_timed(0.001, lambda: where.append(threading.get_ident()))
    assert where[0] == threading.get_ident()
    assert threading.get_ident() not in where[1:]
    monkeypatch.setattr("app.engine.executor.NO_INLINE_SECONDS", 0.0)
    with pytest.raises(ZeroDivisionError):
        await lane.run_timed(0.001, lambda: 1 / 0)
    lane.close()


async def test_the_wait_that_is_told_counts_what_others_compute(lane: Executor) -> None:
    gate, other = Gate(), Gate()
    gate.open.set()
    engine = batcher(gate, lane)
    (busy,) = await start_tasks(lane.run(other.predict, [1]))
    await other.busy()
    begun = time.monotonic()
    (task,) = await start_tasks(engine.submit([1]))
    await asyncio.to_thread(other.open.wait, 0.1)  # the other's forward takes so long
    other.open.set()
    await asyncio.gather(busy, task)
    assert engine._rows_per_second <= 1 / 0.09
    assert engine._rows_per_second >= 0.9 / (time.monotonic() - begun)


async def test_a_busy_model_delays_another_by_one_forward(lane: Executor) -> None:
    gate, other = Gate(), Gate()
    order: list[str] = []

    def note(name: str, predict: Any) -> Any:
        return lambda items: (predict(items), order.append(name))[0]

    busy: Any = Batcher(
        "busy", note("busy", gate.predict), lambda item: 1, one_millisecond, lane, RecordingObserver(), 1, 99
    )
    idle: Any = Batcher(
        "idle", note("idle", other.predict), lambda item: 1, one_millisecond, lane, RecordingObserver(), 1, 99
    )
    other.open.set()
    tasks = await start_tasks(*(busy.submit([i]) for i in range(5)))
    await gate.busy()
    tasks += await start_tasks(idle.submit([1]))
    gate.open.set()
    await asyncio.gather(*tasks)
    assert order.index("idle") == 1


async def test_what_is_computed_at_once_delays_another_model_by_one_forward_too() -> None:
    lane = Executor("at once", inline_seconds=1.0)
    order: list[str] = []

    def note(name: str) -> Any:
        return lambda items: [order.append(f"{name} {len(items)}") for _ in items[:1]] and list(items)

    busy: Any = Batcher("busy", note("busy"), lambda item: 1, one_millisecond, lane, RecordingObserver(), 2, 99)
    idle: Any = Batcher("idle", note("idle"), lambda item: 1, one_millisecond, lane, RecordingObserver(), 2, 99)
    tasks = await start_tasks(*(busy.submit([i]) for i in range(6)), idle.submit([9]))
    assert await asyncio.gather(*tasks) == [*([i] for i in range(6)), [9]]
    assert order == ["busy 2", "idle 1", "busy 2", "busy 2"]
    lane.close()


async def test_what_should_take_long_is_not_computed_on_the_event_loop() -> None:
    lane = Executor("both", inline_seconds=0.5)
    threads: list[str] = []

    def predict(items: Sequence[float]) -> list[float]:
        threads.append(threading.current_thread().name)
        return list(items)

    engine: Any = Batcher("m", predict, lambda item: 1, max, lane, RecordingObserver(), 1, 9)
    await engine.submit([0.1, 0.9, 0.5])
    assert [name.startswith("both") for name in threads] == [False, True, False]
    lane.close()


async def test_stopping_finishes_what_waits_and_refuses_what_comes(lane: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, lane)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([2]), engine.close(10))
    with pytest.raises(NotReady):
        await engine.submit([3])
    gate.open.set()
    assert await asyncio.gather(*tasks) == [[2], [4], None]


async def test_stopping_tells_those_whom_a_hung_network_leaves_waiting(lane: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, lane)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([2]))
    await engine.close(0.01)
    gate.open.set()
    for answer in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(answer, NotReady)


async def test_the_lane_tells_how_long_it_has_not_answered(lane: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, lane)
    assert lane.oldest_job_seconds() < 0.01
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    before = lane.oldest_job_seconds()
    await asyncio.to_thread(threading.Event().wait, 0.05)
    assert lane.oldest_job_seconds() >= before + 0.05
    gate.open.set()
    await asyncio.gather(*tasks)
    assert lane.oldest_job_seconds() < 0.01


async def test_who_comes_between_two_batches_is_answered_before_the_next() -> None:
    """Computed on the event loop itself: a turn of it for each stage of a request would be a batch for each."""
    lane, batches, told = Executor("test", inline_seconds=1.0), list[int](), list[int]()

    async def come() -> None:
        await other.submit([1])
        told.append(len(batches))

    def compute(items: Sequence[int]) -> Sequence[int]:
        batches.append(len(items))
        if len(batches) == 2:
            coming.append(asyncio.get_running_loop().create_task(come()))
        return items

    coming: list[asyncio.Task[None]] = []
    busy = Batcher("busy", compute, len_of_one, no_time, lane, RecordingObserver(), 1, 99)
    other = Batcher("other", list, len_of_one, no_time, lane, RecordingObserver(), 1, 99)
    await busy.submit(list(range(9)))
    await asyncio.gather(*coming)
    assert told == [2]
    lane.close()


def len_of_one(item: int) -> int:
    return 1


def no_time(items: Sequence[int]) -> float:
    return 0.0


def test_when_to_come_back_is_what_waits_over_what_is_computed() -> None:
    door = AdmissionControl("m", None, 8)
    door.add(None, 8)
    for rate, seconds in ((0.0, 1), (100.0, 1), (2.0, 6), (0.01, 60)):
        with pytest.raises(Overloaded) as refusal:
            door.admit(4, rate)
        assert refusal.value.headers() == {"retry-after": str(seconds)}
