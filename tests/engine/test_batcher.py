"""The batcher: batching, limits, failures, cancellation and shutdown."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import pytest
from support.engine import Activations, Gate, RecordingObserver, one_millisecond, record_sleeps, start_tasks

from app.engine import batcher as batching
from app.engine.admission import AdmissionControl, current_caller
from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.observer import RequestTrace, current_trace
from app.errors import BadValue, InferenceFailed, NotReady, OutOfMemory, Overloaded

pytestmark = pytest.mark.anyio


def batcher(
    gate: Gate | Activations,
    executor: Executor,
    observer: RecordingObserver | None = None,
    batch_rows: int = 4,
    queue_rows: int = 8,
) -> Any:
    return Batcher(
        "m",
        gate.predict,
        lambda item: 1,
        one_millisecond,
        executor,
        observer or RecordingObserver(),
        batch_rows,
        queue_rows,
    )


async def test_an_idle_model_starts_immediately_and_a_busy_one_fills_the_next_batch(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, executor)
    first = await start_tasks(engine.submit([1]))
    await gate.busy()
    rest = await start_tasks(*(engine.submit([i]) for i in range(2, 8)))
    gate.open.set()
    assert await asyncio.gather(*first, *rest) == [[2 * i] for i in range(1, 8)]
    assert gate.batches == [[1], [2, 3, 4, 5], [6, 7]]


@pytest.mark.parametrize("inline_seconds", [0.0, 1.0])
async def test_a_failed_batch_leaves_no_tensors_in_memory(
    monkeypatch: pytest.MonkeyPatch, inline_seconds: float
) -> None:
    """Otherwise its inputs, computed alone, and later requests may not have enough memory."""
    executor, network, observer = Executor("test", inline_seconds=inline_seconds), Activations(), RecordingObserver()
    monkeypatch.setattr(observer, "on_failure", lambda error: None)  # a recorded error keeps its frames
    engine = batcher(network, executor, observer)
    gc.disable()
    try:
        assert await engine.submit([1, 2, 3]) == [2, 4, 6]
        for _ in range(2):
            try:
                await engine.submit([-1])
            except OutOfMemory as error:
                error.without_frames()  # as the API does
        assert network.alive == [0] * 6
    finally:
        gc.enable()
        executor.close()


@contextmanager
def requests_being_parsed(engine: Any, count: int) -> Iterator[list[ExitStack]]:
    """Let ``count`` requests be parsed. Closing one of the stacks ends the parsing of one request."""
    with ExitStack() as all_stacks:
        stacks = [all_stacks.enter_context(ExitStack()) for _ in range(count)]
        for stack in stacks:
            stack.enter_context(engine.parsing())
        yield stacks


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let batches wait for items that are being parsed as long as necessary."""
    monkeypatch.setattr(batching, "GATHER_FACTOR", 1e6)


async def test_a_small_batch_waits_for_items_that_are_being_parsed(executor: Executor, patient: None) -> None:
    gate = Gate()
    gate.open.set()
    engine = batcher(gate, executor)

    async def submit_parsed(request: ExitStack, item: int) -> Any:
        request.close()
        return await engine.submit([item])

    with requests_being_parsed(engine, 3) as requests:
        tasks = await start_tasks(engine.submit([1]))
        for item, request in enumerate(requests, start=2):
            await asyncio.sleep(0)
            assert not gate.batches
            tasks += await start_tasks(submit_parsed(request, item))
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks)
    assert gate.batches == [[1, 2, 3, 4]]


async def test_no_batch_waits_for_too_few_items(executor: Executor, patient: None) -> None:
    """It does not wait either if a request that is being parsed fails, or if the batch is large enough."""
    gate = Gate()
    gate.open.set()
    engine = batcher(gate, executor)
    async with asyncio.timeout(30):
        with requests_being_parsed(engine, 2):
            assert await engine.submit([1]) == [2]
        with requests_being_parsed(engine, 3) as (failing, *_):
            (task,) = await start_tasks(engine.submit([3]))
            await asyncio.sleep(0)
            assert len(gate.batches) == 1
            failing.close()
            assert await task == [6]
        with requests_being_parsed(engine, 9):
            assert await engine.submit([1, 2, 3, 4]) == [2, 4, 6, 8]


@pytest.mark.parametrize("per_row", [0.0, 0.001])
async def test_a_batch_waits_for_a_limited_time_and_only_if_this_saves_time(
    executor: Executor, monkeypatch: pytest.MonkeyPatch, per_row: float
) -> None:
    """Without fixed costs, a row takes as long alone as in a batch."""
    gate, limits = Gate(), list[float]()
    gate.open.set()
    engine = batcher(gate, executor)
    engine._expected_seconds = lambda items: per_row * len(items) or 0.002
    timeout = asyncio.timeout

    def recorded(seconds: float) -> asyncio.Timeout:
        limits.append(seconds)
        return timeout(seconds)

    monkeypatch.setattr(batching.asyncio, "timeout", recorded)
    with requests_being_parsed(engine, 9):
        assert await engine.submit([1]) == [2]
    assert limits == ([] if per_row else [0.008])


async def test_limits_count_rows_and_a_larger_item_is_computed_alone(executor: Executor) -> None:
    gate = Gate()
    engine: Any = Batcher(
        "m",
        gate.predict,
        lambda item: item,
        one_millisecond,
        executor,
        RecordingObserver(),
        batch_rows=4,
        queue_rows=99,
    )
    first = await start_tasks(engine.submit([1]))
    await gate.busy()
    rest = await start_tasks(*(engine.submit([rows]) for rows in (3, 2, 9, 1, 1)))
    gate.open.set()
    await asyncio.gather(*first, *rest)
    assert gate.batches == [[1], [3], [2], [9], [1, 1]]


class ListDoubler:
    """A network that doubles the numbers in lists. Each number is a row, so a list can be split between batches."""

    def __init__(self) -> None:
        self.gate = Gate()

    def predict(self, items: Sequence[list[int]]) -> list[list[int]]:
        numbers = self.gate.predict([number for item in items for number in item])
        return [[numbers.pop(0) for _ in item] for item in items]

    def split(self, item: list[int], rows: int) -> list[list[int]]:
        return [item[start : start + rows] for start in range(0, len(item), rows)]

    def join(self, results: Sequence[list[int]]) -> list[int]:
        return list(chain.from_iterable(results))

    def batcher(self, executor: Executor, batch_rows: int = 64) -> Any:
        observer = RecordingObserver()
        return Batcher("m", self.predict, len, one_millisecond, executor, observer, batch_rows, 999, splitter=self)


async def test_small_items_wait_for_one_part_of_a_large_item_only(executor: Executor) -> None:
    network, waiting = ListDoubler(), list[int]()
    engine = network.batcher(executor)
    assert engine.row_counts == (0, 0)
    next_batch = engine._next_batch

    def note_load() -> None:
        next_batch()
        waiting.append(engine.row_counts[0])

    engine._next_batch = note_load
    tasks = await start_tasks(engine.submit([[1]]))
    await network.gate.busy()
    large, other = list(range(100, 140)), list(range(200, 220))
    tasks += await start_tasks(engine.submit([large]), engine.submit([other]), engine.submit([[2], [3, 4]]))
    assert engine.row_counts == (63, 1)
    network.gate.open.set()
    answers = await asyncio.gather(*tasks)
    assert answers == [[[2]], [[2 * n for n in large]], [[2 * n for n in other]], [[4], [6, 8]]]
    assert waiting == [0, 23, 32, 12, 24, 4, 16, 0, 0]  # number of waiting rows when each batch begins
    assert network.gate.batches == [
        [1], large[:8], [*other[:8], 2, 3, 4], large[8:16], other[8:16], large[16:24], other[16:],
        large[24:32], large[32:],
    ]  # fmt: skip
    assert engine.row_counts == (0, 0)


async def test_a_part_is_computed_beside_small_items_before_it(executor: Executor) -> None:
    network = ListDoubler()
    engine = network.batcher(executor)
    tasks = await start_tasks(engine.submit([[1]]))
    await network.gate.busy()
    tasks += await start_tasks(engine.submit([[2]]), engine.submit([[3] * 20]))
    network.gate.open.set()
    await asyncio.gather(*tasks)
    assert [len(batch) for batch in network.gate.batches] == [1, 9, 8, 4]


async def test_parts_belong_to_the_key_and_the_trace_of_their_request(executor: Executor) -> None:
    network, trace = ListDoubler(), RequestTrace()
    network.gate.open.set()
    engine = network.batcher(executor)
    current_trace.set(trace)
    current_caller.set("alice")
    await engine.submit([[1] * 20])
    parts = [entry for batch in engine.observer.completed_batches for entry in batch]
    assert [(entry.rows, entry.caller, entry.trace) for entry in parts] == [
        (8, "alice", trace),
        (8, "alice", trace),
        (4, "alice", trace),
    ]
    assert engine._admission._waiting_by_caller == {}


async def test_parts_that_are_computed_together_count_towards_the_share_of_their_key(executor: Executor) -> None:
    network = ListDoubler()
    engine = network.batcher(executor, batch_rows=24)
    tasks = await start_tasks(engine.submit([[0] * 17]))
    await network.gate.busy()
    for caller, number, sizes in (("a", 1, [120]), ("b", 2, [17] * 6)):
        current_caller.set(caller)
        tasks += await start_tasks(*(engine.submit([[number] * size]) for size in sizes))
    network.gate.open.set()
    await asyncio.gather(*tasks)
    assert {(batch[0], len(batch)) for batch in network.gate.batches} == {(0, 17), (1, 24), (2, 17)}
    assert [batch[0] for batch in network.gate.batches] == [0, 1, 2, 2, 1, 2, 1, 2, 2, 1, 2, 1]


async def test_a_part_between_two_batches_is_answered_when_the_run_task_is_cancelled(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancel() -> None:
        engine._batch_task.cancel()
        await asyncio.sleep(0)

    monkeypatch.setattr(executor, "yield_to_requests", cancel)
    network = ListDoubler()
    network.gate.open.set()
    engine = network.batcher(executor, batch_rows=8)
    with pytest.raises(NotReady):
        await engine.submit([[1] * 20])
    assert engine.row_counts == (0, 0)


async def test_a_splitter_that_returns_another_number_of_parts_is_an_error(executor: Executor) -> None:
    network = ListDoubler()
    network.split = lambda item, rows: [item]  # type: ignore[method-assign]
    engine = network.batcher(executor)
    with pytest.raises(ValueError, match="zip"):
        await engine.submit([[1] * 20])
    assert engine.row_counts == (0, 0)


async def test_the_parts_of_a_lone_large_item_fill_batches(executor: Executor) -> None:
    network = ListDoubler()
    network.gate.open.set()
    numbers = list(range(150))
    assert await network.batcher(executor).submit([numbers]) == [[2 * n for n in numbers]]
    assert [len(batch) for batch in network.gate.batches] == [64, 64, 22]


async def test_a_failed_or_cancelled_large_item_is_not_computed_further(executor: Executor) -> None:
    network = ListDoubler()
    engine = network.batcher(executor, batch_rows=16)
    (cancelled,) = await start_tasks(engine.submit([[1] * 99]))
    await network.gate.busy()
    assert engine.row_counts == (0, 16)  # the other rows of an item that has begun do not count as waiting
    failing, waiting = await start_tasks(engine.submit([[5] * 16 + [-1] * 16 + [5] * 30]), engine.submit([[7]]))
    cancelled.cancel()
    network.gate.open.set()
    answers = await asyncio.gather(cancelled, failing, waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [asyncio.CancelledError, InferenceFailed, list]
    assert [batch[-1] for batch in network.gate.batches] == [1, 5, -1, 7, -1]
    assert engine.row_counts == (0, 0)


async def test_only_the_failing_item_gets_the_error(executor: Executor) -> None:
    gate, observer = Gate(), RecordingObserver()
    engine = batcher(gate, executor, observer)
    first = await start_tasks(engine.submit([1]))
    await gate.busy()
    rest = await start_tasks(engine.submit([2]), engine.submit([-3]), engine.submit([4]))
    gate.open.set()
    answers = await asyncio.gather(*first, *rest, return_exceptions=True)
    assert [answers[i] for i in (0, 1, 3)] == [[2], [4], [8]]
    assert isinstance(answers[2], InferenceFailed)
    assert len(observer.failures) == 1
    assert await engine.submit([5]) == [10]


async def test_the_items_of_a_failed_batch_are_computed_without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, gate, sleeps = Executor("inline", inline_seconds=1.0), Gate(), record_sleeps(monkeypatch)
    gate.open.set()
    engine = batcher(gate, executor)
    answers = await asyncio.gather(engine.submit([1]), engine.submit([-2]), return_exceptions=True)
    assert [type(answer) for answer in answers] == [list, InferenceFailed]
    assert sleeps == [0, 0]  # the batcher yields to other tasks after each item
    executor.close()


async def test_a_wrong_number_of_results_fails_the_requests_and_not_the_engine(executor: Executor) -> None:
    right = threading.Event()

    def predict(items: Sequence[int]) -> list[int]:
        return list(items) if right.is_set() else []

    engine: Any = Batcher("m", predict, lambda item: 1, one_millisecond, executor, RecordingObserver(), 4, 8)
    with pytest.raises(InferenceFailed):
        await engine.submit([1, 2])
    right.set()
    assert await engine.submit([1, 2]) == [1, 2]


async def test_a_full_queue_rejects_exactly_the_surplus_with_retry_after(executor: Executor) -> None:
    gate, observer = Gate(), RecordingObserver()
    engine = batcher(gate, executor, observer, queue_rows=8)
    first = await start_tasks(engine.submit([0]))
    await gate.busy()
    rest = await start_tasks(*(engine.submit([i]) for i in range(1, 12)))
    rejected = [task for task in rest if task.done()]
    assert rejected == rest[8:]
    for task in rejected:
        error = task.exception()
        assert isinstance(error, Overloaded)
        assert error.headers() == {"retry-after": "1"}
        assert error.message.startswith("the queue of m is full: 8 of 8 rows are waiting")
    gate.open.set()
    assert await asyncio.gather(*first, *rest[:8]) == [[2 * i] for i in range(9)]
    assert observer.rejections == 3


async def test_all_items_of_a_request_are_queued_or_none(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, executor, queue_rows=4)
    tasks = await start_tasks(engine.submit([0]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([1, 2, 3]), engine.submit([4, 5]), engine.submit([6]))
    gate.open.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answers[i] for i in (0, 1, 3)] == [[0], [2, 4, 6], [12]]
    assert isinstance(answers[2], Overloaded)


async def test_a_cancelled_item_is_not_computed(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, executor)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([2]), engine.submit([3]))
    tasks[1].cancel()
    await asyncio.sleep(0)
    assert len(engine._queue) == 1  # the cancelled item is not kept in memory
    gate.open.set()
    assert await asyncio.gather(tasks[0], tasks[2]) == [[2], [6]]
    assert gate.batches == [[1], [3]]


async def test_a_cancelled_item_does_not_make_the_next_batch_smaller(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancel() -> None:
        tasks[2].cancel()  # before its task can remove its item from the queue

    monkeypatch.setattr(executor, "yield_to_requests", cancel)
    gate = Gate()
    engine = batcher(gate, executor)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(*(engine.submit([number]) for number in (2, 3, 4)))
    gate.open.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers.pop(2), asyncio.CancelledError)
    assert answers == [[2], [4], [8]]
    assert gate.batches == [[1], [2, 4]]
    assert engine.row_counts == (0, 0)


class ClosingGate(Gate):
    """A fake network that closes after the first batch, so that the second batch runs until the test opens the gate."""

    def predict(self, items: Sequence[int]) -> list[int]:
        results = super().predict(items)
        if len(self.batches) == 1:
            self.open.clear()
        return results


async def test_cancelling_a_running_item_does_not_affect_the_others(executor: Executor) -> None:
    gate, observer = ClosingGate(), RecordingObserver()
    engine = batcher(gate, executor, observer)
    alone = await start_tasks(engine.submit([1]))
    await gate.busy()
    gate.entered.clear()
    rest = await start_tasks(engine.submit([2]), engine.submit([-3]), engine.submit([4]))
    for _ in range(2):  # a second cancellation changes nothing
        alone[0].cancel()
    gate.open.set()
    await gate.busy()  # the other items are computed now
    rest[1].cancel()
    gate.open.set()
    answers = await asyncio.gather(*alone, *rest, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert isinstance(answers[2], asyncio.CancelledError | InferenceFailed)  # it may have failed before
    assert [answers[1], answers[3]] == [[4], [8]]
    assert engine.row_counts == (0, 0)
    assert await engine.submit([5]) == [10]


async def test_a_cancelled_request_does_not_delay_shutdown(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, executor)
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
    assert engine.row_counts == (0, 0)


async def test_the_measured_rate_includes_waiting_for_other_models(executor: Executor) -> None:
    gate, other = Gate(), Gate()
    gate.open.set()
    engine = batcher(gate, executor)
    (busy,) = await start_tasks(executor.run(other.predict, [1]))
    await other.busy()
    started_at = time.monotonic()
    (task,) = await start_tasks(engine.submit([1]))
    await asyncio.to_thread(other.open.wait, 0.1)  # the batch of the other model takes this long
    other.open.set()
    await asyncio.gather(busy, task)
    assert engine._rows_per_second <= 1 / 0.09
    assert engine._rows_per_second >= 0.9 / (time.monotonic() - started_at)


async def test_a_busy_model_delays_another_by_one_batch(executor: Executor) -> None:
    gate, other = Gate(), Gate()
    order: list[str] = []

    def note(name: str, predict: Any) -> Any:
        return lambda items: (predict(items), order.append(name))[0]

    busy: Any = Batcher(
        "busy", note("busy", gate.predict), lambda item: 1, one_millisecond, executor, RecordingObserver(), 1, 99
    )
    idle: Any = Batcher(
        "idle", note("idle", other.predict), lambda item: 1, one_millisecond, executor, RecordingObserver(), 1, 99
    )
    other.open.set()
    tasks = await start_tasks(*(busy.submit([i]) for i in range(5)))
    await gate.busy()
    tasks += await start_tasks(idle.submit([1]))
    gate.open.set()
    await asyncio.gather(*tasks)
    assert order.index("idle") == 1


async def test_inline_batches_delay_another_model_by_one_batch_too() -> None:
    executor = Executor("inline", inline_seconds=1.0)
    order: list[str] = []

    def note(name: str) -> Any:
        return lambda items: [order.append(f"{name} {len(items)}") for _ in items[:1]] and list(items)

    busy: Any = Batcher("busy", note("busy"), lambda item: 1, one_millisecond, executor, RecordingObserver(), 2, 99)
    idle: Any = Batcher("idle", note("idle"), lambda item: 1, one_millisecond, executor, RecordingObserver(), 2, 99)
    tasks = await start_tasks(*(busy.submit([i]) for i in range(6)), idle.submit([9]))
    assert await asyncio.gather(*tasks) == [*([i] for i in range(6)), [9]]
    assert order == ["busy 2", "idle 1", "busy 2", "busy 2"]
    executor.close()


async def test_long_batches_are_not_computed_on_the_event_loop() -> None:
    executor = Executor("both", inline_seconds=0.5)
    threads: list[str] = []

    def predict(items: Sequence[float]) -> list[float]:
        threads.append(threading.current_thread().name)
        return list(items)

    engine: Any = Batcher("m", predict, lambda item: 1, max, executor, RecordingObserver(), 1, 9)
    await engine.submit([0.1, 0.9, 0.5])
    assert [name.startswith("both") for name in threads] == [False, True, False]
    executor.close()


class FailingObserver(RecordingObserver):
    """An observer one of whose methods raises an error."""

    def __init__(self, method: str) -> None:
        super().__init__()
        setattr(self, method, self.fail)

    def fail(self, *_: Any) -> None:
        raise LookupError("the observer fails")


async def test_an_error_outside_the_network_fails_its_callers_immediately(executor: Executor) -> None:
    gate = Gate()
    gate.open.set()
    engine = batcher(gate, executor, observer=FailingObserver("on_failure"))
    tasks = await start_tasks(engine.submit([-1]), engine.submit([1]))
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [InferenceFailed, list]
    assert await engine.submit([2]) == [4]
    assert engine.row_counts == (0, 0)


async def test_an_observer_that_fails_does_not_stop_the_batcher(executor: Executor) -> None:
    gate = Gate()
    gate.open.set()
    engine = batcher(gate, executor, observer=FailingObserver("on_dequeued"))
    for item in (1, -1):
        with pytest.raises(InferenceFailed, match="m failed on this input"):
            await engine.submit([item])
    assert engine.row_counts == (0, 0)


async def test_an_error_in_the_queue_fails_its_callers_immediately(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    gate.open.set()
    engine = batcher(gate, executor)
    monkeypatch.setattr(engine._queue, "pop", FailingObserver("on_batch").fail)
    with pytest.raises(InferenceFailed, match=r"m failed \(LookupError\)"):
        await engine.submit([1])
    monkeypatch.undo()
    assert await engine.submit([2]) == [4]


async def test_a_cancelled_run_task_answers_its_callers(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, executor)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([2]))
    engine._batch_task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [NotReady, NotReady]
    assert engine.row_counts == (0, 0)
    gate.open.set()
    assert await engine.submit([3]) == [6]


async def test_shutdown_finishes_queued_items_and_rejects_new_ones(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, executor)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([2]), engine.close(10))
    with pytest.raises(NotReady):
        await engine.submit([3])
    gate.open.set()
    assert await asyncio.gather(*tasks) == [[2], [4], None]


async def test_shutdown_fails_items_of_a_hung_network(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate, executor)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([2]))
    await engine.close(0.01)
    gate.open.set()
    for answer in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(answer, NotReady)


async def test_a_request_that_arrives_during_a_batch_is_computed_before_the_next_batch() -> None:
    """The batches run inline, on the event loop.

    If each stage of a request took one iteration of the event loop, the request would wait for one batch per stage.
    """
    executor, batches, batches_before = Executor("test", inline_seconds=1.0), list[int](), list[int]()

    async def arrive() -> None:
        await other.submit([1])
        batches_before.append(len(batches))

    def compute(items: Sequence[int]) -> Sequence[int]:
        batches.append(len(items))
        if len(batches) == 2:
            arrivals.append(asyncio.get_running_loop().create_task(arrive()))
        return items

    arrivals: list[asyncio.Task[None]] = []
    busy = Batcher("busy", compute, len_of_one, no_time, executor, RecordingObserver(), 1, 99)
    other = Batcher("other", list, len_of_one, no_time, executor, RecordingObserver(), 1, 99)
    await busy.submit(list(range(9)))
    await asyncio.gather(*arrivals)
    assert batches_before == [2]
    executor.close()


def len_of_one(item: int) -> int:
    return 1


def no_time(items: Sequence[int]) -> float:
    return 0.0


class Clock:
    """A clock that only the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        for module in ("batcher", "executor"):
            monkeypatch.setattr(f"app.engine.{module}.time", self)

    def monotonic(self) -> float:
        return self.seconds

    perf_counter = monotonic


async def test_each_batch_is_reported_with_its_rows_times_and_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, observer = Clock(monkeypatch), RecordingObserver()
    executor = Executor("inline", inline_seconds=1.0)

    def compute(items: Sequence[int]) -> Sequence[int]:
        clock.seconds += 2.0
        return items

    seconds: list[float] = []
    monkeypatch.setattr(observer, "on_batch", lambda rows, duration: seconds.extend((rows, duration)))
    engine: Any = Batcher("m", compute, lambda item: item, no_time, executor, observer, 4, 99)
    trace = RequestTrace()
    for variable, value in ((current_trace, trace), (current_caller, "alice")):
        variable.set(value)  # type: ignore[attr-defined]
    await engine.submit([1, 3, 4])
    assert seconds == [4, 2.0, 4, 2.0]
    assert observer.queue_seconds == [0.0, 0.0, 2.0]
    first, second = observer.completed_batches
    assert [(entry.rows, entry.queued_at, entry.started_at, entry.ended_at) for entry in (*first, *second)] == [
        (1, 1000.0, 1000.0, 1002.0),
        (3, 1000.0, 1000.0, 1002.0),
        (4, 1000.0, 1002.0, 1004.0),
    ]
    assert all(entry.trace is trace and entry.caller == "alice" for entry in (*first, *second))
    assert engine.row_counts == (0, 0)
    executor.close()


async def test_a_failed_item_is_reported_with_its_time_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, observer = Clock(monkeypatch), RecordingObserver()
    executor = Executor("inline", inline_seconds=1.0)

    def compute(items: Sequence[int]) -> Sequence[int]:
        clock.seconds += 2.0
        if min(items) < 0:
            raise BadValue("negative") if -1 in items else ValueError("negative")
        return items

    engine: Any = Batcher("m", compute, len_of_one, no_time, executor, observer, 4, 9)
    tasks = (engine.submit([item]) for item in (5, -1, -2))
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [list, BadValue, InferenceFailed]
    assert observer.queue_seconds == [2.0, 4.0, 6.0]  # after the batch had failed, each item was computed alone
    assert [len(batch) for batch in observer.completed_batches] == [1]
    executor.close()


async def test_the_rate_is_a_moving_average(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, executor = Clock(monkeypatch), Executor("inline", inline_seconds=1.0)

    def compute(durations: Sequence[float]) -> Sequence[float]:
        clock.seconds += sum(durations)
        return durations

    engine: Any = Batcher("m", compute, lambda item: 4, no_time, executor, RecordingObserver(), 4, 8)
    await engine.submit([2.0])
    assert engine._rows_per_second == 2.0
    await engine.submit([0.5])
    assert engine._rows_per_second == pytest.approx(0.8 * 2.0 + 0.2 * 8.0)
    engine._admission.add(None, 8)
    with pytest.raises(Overloaded) as raised:
        engine.admit(4)
    assert raised.value.retry_after == 4  # 12 rows at 3.2 rows per second
    executor.close()


async def test_a_batch_without_measurable_duration_has_a_finite_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    executor = Executor("inline", inline_seconds=1.0)
    engine: Any = Batcher("m", list, len_of_one, no_time, executor, RecordingObserver(), 4, 8)
    await engine.submit([1])
    assert engine._rows_per_second == pytest.approx(1e6)
    executor.close()


async def test_only_items_of_more_than_16_rows_are_split(executor: Executor) -> None:
    network = ListDoubler()
    network.gate.open.set()
    engine = network.batcher(executor)
    split, joined = list[int](), list[int]()
    divide, join = network.split, network.join
    network.split = lambda item, rows: split.append(len(item)) or divide(item, rows)  # type: ignore[func-returns-value, method-assign]
    network.join = lambda results: joined.append(len(results)) or join(results)  # type: ignore[func-returns-value, method-assign]
    await asyncio.gather(*(engine.submit([[1] * rows]) for rows in (16, 17)))
    assert (split, joined) == ([17], [3])
    small = network.batcher(executor, batch_rows=4)
    assert await small.submit([[1] * 4, [1] * 5]) == [[2] * 4, [2] * 5]
    assert (split, joined) == ([17, 5], [3, 2])
    assert [len(batch) for batch in network.gate.batches[-3:]] == [4, 4, 1]


@pytest.mark.parametrize(("seconds", "sizes"), [(0.75, [8, 8, 8]), (1.0, [24])])
async def test_the_parts_of_a_large_item_share_batches_for_a_second_after_a_small_item(
    monkeypatch: pytest.MonkeyPatch, seconds: float, sizes: list[int]
) -> None:
    clock, network = Clock(monkeypatch), ListDoubler()
    network.gate.open.set()
    executor = Executor("inline", inline_seconds=1.0)
    await network.batcher(executor).submit([[1]])
    clock.seconds += seconds
    await network.batcher(executor).submit([[2] * 24])  # a batch of another model
    assert [len(batch) for batch in network.gate.batches] == [1, *sizes]
    executor.close()


async def test_parts_that_share_a_batch_waited_since_the_first_of_them_was_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, network = Clock(monkeypatch), ListDoubler()

    def compute(items: Sequence[list[int]]) -> Sequence[list[int]]:
        clock.seconds += 2.0
        return items

    network.predict = compute  # type: ignore[assignment, method-assign]
    executor = Executor("inline", inline_seconds=1.0)
    engine = network.batcher(executor)
    await engine.submit([[1] * 150])
    assert [len(batch) for batch in engine.observer.completed_batches] == [8, 8, 3]
    assert engine.observer.queue_seconds == [0.0] * 19
    executor.close()


async def test_errors_name_the_model_and_are_reported(executor: Executor) -> None:
    gate, observer = Gate(), RecordingObserver()
    gate.open.set()
    engine = batcher(gate, executor, observer)
    with pytest.raises(InferenceFailed, match=r"^m failed on this input \(ValueError\)$"):
        await engine.submit([-1])
    assert engine.circuit_breaker.failed_recoveries == 0
    assert [str(error) for error in observer.failures] == ["negative"]
    short: Any = Batcher("m", lambda items: [], len_of_one, no_time, executor, observer, 4, 8)
    with pytest.raises(InferenceFailed, match=r"^m failed on this input \(RuntimeError\)$"):
        await short.submit([1, 2])
    assert str(observer.failures[-1]) == "m returned 0 results for 1 items"


async def test_a_network_that_fails_on_each_input_opens_the_circuit_breaker_until_it_works(executor: Executor) -> None:
    gate = Gate()
    gate.open.set()
    engine = batcher(gate, executor)
    while not engine.circuit_breaker.is_open():
        with pytest.raises(InferenceFailed):
            await engine.submit([-1])
    await engine.submit([1])
    assert not engine.circuit_breaker.is_open()


async def test_an_input_that_the_network_cannot_read_is_the_callers_error(executor: Executor) -> None:
    def compute(items: Sequence[int]) -> Sequence[int]:
        if 2 in items:
            raise BadValue("2 is not allowed", "x")
        return items

    observer = RecordingObserver()
    engine: Any = Batcher("m", compute, len_of_one, no_time, executor, observer, 4, 8)
    with pytest.raises(BadValue, match=r"^2 is not allowed$"):
        await engine.submit([1, 2])
    assert observer.failures == []
    assert await engine.submit([3]) == [3]


async def test_a_stopped_batcher_names_itself_also_to_waiting_parts(executor: Executor) -> None:
    network = ListDoubler()
    engine = network.batcher(executor)
    tasks = await start_tasks(engine.submit([[1]]), engine.submit([[2] * 30]))
    await network.gate.busy()
    await engine.close(0.0)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["m stopped before it could answer"] * 2
    network.gate.open.set()


def test_retry_after_is_the_waiting_rows_divided_by_the_rate() -> None:
    admission = AdmissionControl("m", None, 8)
    admission.add(None, 8)
    for rate, seconds in ((0.0, 1), (100.0, 1), (2.0, 6), (0.01, 60)):
        with pytest.raises(Overloaded) as rejection:
            admission.admit(4, rate)
        assert rejection.value.headers() == {"retry-after": str(seconds)}
