"""The rules of batching, one example each. ``test_simulation`` tests them in any order of events."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
from support.engine import Gate, RecordingObserver, start_tasks

from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.fair_queue import current_caller
from app.engine.observer import RequestTrace, current_trace
from app.errors import BadValue, InferenceFailed, NotReady, OutOfMemory, Overloaded

pytestmark = pytest.mark.anyio


def batcher(
    predict: Any, executor: Executor, rows: Any = lambda item: 1, seconds: float = 0.001, **options: Any
) -> Any:
    options = {"observer": RecordingObserver(), "batch_rows": 4, "queue_rows": 8, **options}
    return Batcher("m", predict, rows, lambda items: seconds, executor, **options)


async def test_an_idle_model_starts_immediately_and_a_busy_one_fills_the_next_batch(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate.predict, executor)
    first = await start_tasks(engine.submit([1]))
    await gate.busy()
    rest = await start_tasks(*(engine.submit([i]) for i in range(2, 8)))
    assert engine.row_counts == (6, 1)
    gate.open.set()
    assert await asyncio.gather(*first, *rest) == [[2 * i] for i in range(1, 8)]
    assert gate.batches == [[1], [2, 3, 4, 5], [6, 7]]


async def test_only_the_failing_item_gets_the_error(executor: Executor) -> None:
    engine = batcher(Gate(is_open=True).predict, executor)
    answers = await asyncio.gather(*(engine.submit([i]) for i in (1, -2, 3)), return_exceptions=True)
    assert answers[::2] == [[2], [6]]
    assert isinstance(answers[1], InferenceFailed)
    assert str(answers[1]) == "m failed on this input (ValueError)"
    assert [str(error) for error in engine.observer.failures] == ["negative"]


async def test_an_input_that_the_network_cannot_read_is_the_callers_error(executor: Executor) -> None:
    def compute(items: Sequence[int]) -> Sequence[int]:
        raise BadValue("2 is not allowed", "x")

    engine = batcher(compute, executor)
    with pytest.raises(BadValue, match=r"^2 is not allowed$"):
        await engine.submit([2])
    assert engine.observer.failures == []


async def test_a_wrong_number_of_results_is_a_failure_of_the_network(executor: Executor) -> None:
    engine = batcher(lambda items: [], executor)
    with pytest.raises(InferenceFailed, match="RuntimeError"):
        await engine.submit([1, 2])
    assert str(engine.observer.failures[-1]) == "m returned 0 results for 1 items"


async def test_running_out_of_memory_for_an_input_does_not_open_the_circuit_breaker(executor: Executor) -> None:
    def compute(items: Sequence[int]) -> Sequence[int]:
        raise MemoryError

    engine = batcher(compute, executor)
    for _ in range(4):
        with pytest.raises(OutOfMemory):
            await engine.submit([1])
    assert not engine.circuit_breaker.is_open()
    assert len(engine.observer.failures) == 4


async def test_a_full_queue_rejects_exactly_the_surplus(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate.predict, executor)
    tasks = await start_tasks(engine.submit([0]))
    await gate.busy()
    tasks += await start_tasks(*(engine.submit([i]) for i in range(1, 12)))
    assert [task.done() for task in tasks] == [False] * 9 + [True] * 3
    for task in tasks[9:]:
        assert isinstance(error := task.exception(), Overloaded)
        assert error.headers() == {"retry-after": "1"}
        assert error.message == "the queue of m is full: 8 of 8 rows are waiting; this request adds 1"
    assert engine.observer.rejections == ["queue_full"] * 3
    gate.open.set()
    assert await asyncio.gather(*tasks[:9]) == [[2 * i] for i in range(9)]


async def test_shutdown_finishes_accepted_requests_and_rejects_new_ones(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate.predict, executor)
    tasks = await start_tasks(engine.submit([1]))
    await gate.busy()
    tasks += await start_tasks(engine.submit([2]), engine.close(60))
    with pytest.raises(NotReady, match="m is stopping"):
        await engine.submit([3])
    gate.open.set()
    assert await asyncio.gather(*tasks) == [[2], [4], None]


class Lists:
    """A network that doubles the numbers in lists. A list of many numbers is a large item."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def predict(self, items: Sequence[list[int]]) -> list[list[int]]:
        numbers = self.gate.predict([number for item in items for number in item])
        return [[numbers.pop(0) for _ in item] for item in items]

    def split(self, item: list[int], rows: int) -> list[list[int]]:
        return [item[start : start + rows] for start in range(0, len(item), rows)]

    def join(self, results: Sequence[list[int]]) -> list[int]:
        return list(chain.from_iterable(results))


async def test_small_items_wait_for_one_part_of_each_large_item(executor: Executor) -> None:
    gate = Gate()
    network = Lists(gate)
    engine = batcher(network.predict, executor, len, splitter=network, batch_rows=64, queue_rows=999)
    tasks = await start_tasks(engine.submit([[1]]))
    await gate.busy()
    large, other = list(range(100, 140)), list(range(200, 220))
    tasks += await start_tasks(engine.submit([large]), engine.submit([other]), engine.submit([[2], [3, 4]]))
    assert engine.row_counts == (63, 1)
    gate.open.set()
    assert await asyncio.gather(*tasks) == [[[2]], [[2 * n for n in large]], [[2 * n for n in other]], [[4], [6, 8]]]
    assert gate.batches == [[1], [*large[:16], *other[:16], 2, 3, 4], [*large[16:32], *other[16:]], large[32:]]


async def test_the_parts_of_a_lone_large_item_fill_batches(executor: Executor) -> None:
    gate = Gate(is_open=True)
    network = Lists(gate)
    engine = batcher(network.predict, executor, len, splitter=network, batch_rows=64)
    assert await engine.submit([list(range(150))]) == [[2 * n for n in range(150)]]
    assert [len(batch) for batch in gate.batches] == [64, 64, 22]


async def test_an_item_of_more_rows_than_a_batch_is_computed_alone(executor: Executor) -> None:
    gate = Gate()
    engine = batcher(gate.predict, executor, lambda item: item, queue_rows=99)
    tasks = await start_tasks(*(engine.submit([rows]) for rows in (1, 3, 2, 9, 1, 1)))
    gate.open.set()
    await asyncio.gather(*tasks)
    assert gate.batches == [[1, 3], [2], [9], [1, 1]]


async def test_short_batches_are_computed_on_the_event_loop_and_long_ones_on_a_thread() -> None:
    executor, threads = Executor("compute", inline_seconds=0.5), list[str]()

    def predict(items: Sequence[int]) -> Sequence[int]:
        threads.append(threading.current_thread().name)
        return items

    for seconds in (0.1, 0.9):
        await batcher(predict, executor, seconds=seconds).submit([1])
    assert [name.startswith("compute") for name in threads] == [False, True]
    executor.close()


async def test_each_batch_is_reported_with_its_rows_and_times() -> None:
    now = 1000.0
    executor = Executor("inline", inline_seconds=1.0, clock=lambda: now)

    def compute(items: Sequence[int]) -> Sequence[int]:
        nonlocal now
        now += 2.0
        return items

    engine = batcher(compute, executor, lambda item: item, clock=lambda: now)
    trace = RequestTrace()
    current_trace.set(trace)
    await engine.submit([1, 3, 4])
    assert engine.observer.batches == [(4, 2.0), (4, 2.0)]
    assert engine.observer.dequeued == [(1, 0.0), (3, 0.0), (4, 2.0)]
    assert [(part.started_at, part.ended_at) for part in engine.observer.completed] == [
        (1000.0, 1002.0), (1000.0, 1002.0), (1002.0, 1004.0)
    ]  # fmt: skip
    assert all(part.trace is trace for part in engine.observer.completed)
    executor.close()


async def test_a_failed_item_is_reported_with_its_rows_and_its_time_in_the_queue(executor: Executor) -> None:
    engine = batcher(Gate(is_open=True).predict, executor, lambda item: 3)
    with pytest.raises(InferenceFailed):
        await engine.submit([-1])
    ((rows, seconds),) = engine.observer.dequeued
    assert rows == 3
    assert 0 <= seconds < 60


async def test_a_busy_model_delays_another_by_one_batch() -> None:
    executor, order = Executor("inline", inline_seconds=1.0), list[str]()

    def note(name: str) -> Any:
        def predict(items: Sequence[int]) -> Sequence[int]:
            order.append(name)
            return items

        return predict

    busy, idle = (batcher(note(name), executor, batch_rows=2) for name in ("busy", "idle"))
    await asyncio.gather(*(busy.submit([i]) for i in range(6)), idle.submit([9]))
    assert order == ["busy", "idle", "busy", "busy"]
    executor.close()


async def test_an_error_outside_the_network_fails_its_callers_immediately(executor: Executor) -> None:
    class FailingObserver(RecordingObserver):
        def on_failure(self, error: Exception) -> None:
            super().on_failure(error)
            if len(self.failures) == 1:
                raise LookupError("the observer fails")

    engine = batcher(Gate(is_open=True).predict, executor, observer=FailingObserver())
    with pytest.raises(InferenceFailed, match=r"^m failed \(LookupError\)$"):
        await engine.submit([-1])
    assert engine.row_counts == (0, 0)
    assert await engine.submit([2]) == [4]


async def test_a_cancelled_engine_answers_its_callers(executor: Executor) -> None:
    gate, before = Gate(), asyncio.all_tasks()
    engine = batcher(gate.predict, executor)
    requests = [asyncio.ensure_future(engine.submit([1])), asyncio.ensure_future(engine.submit([2]))]
    await gate.busy()
    for task in asyncio.all_tasks() - before - {*requests}:
        task.cancel()
    answers = await asyncio.gather(*requests, return_exceptions=True)
    gate.open.set()
    assert [str(answer) for answer in answers] == ["m stopped before it could answer"] * 2
    assert await engine.submit([3]) == [6]


async def test_the_engine_does_not_belong_to_the_request_that_started_it(executor: Executor) -> None:
    callers: list[str | None] = []

    def seconds(items: Sequence[int]) -> float:
        callers.append(current_caller.get())
        return 0.001

    engine: Any = Batcher("m", list, lambda item: 1, seconds, executor, RecordingObserver(), 4, 8)
    current_caller.set("alice")
    await engine.submit([1])
    assert callers == [None]


@pytest.mark.parametrize("inline_seconds", [0.0, 1.0])
async def test_a_failed_batch_leaves_no_tensors_in_memory(inline_seconds: float) -> None:
    """Otherwise its inputs, computed alone, and later requests may not have enough memory."""
    alive, references = list[int](), list[weakref.ref[set[int]]]()

    def predict(items: Sequence[int]) -> Sequence[int]:
        alive.append(sum(reference() is not None for reference in references))
        activations = {*items}  # as a tensor in a network's frame
        references.append(weakref.ref(activations))
        if len(items) > 1:
            raise MemoryError
        return items

    executor = Executor("test", inline_seconds=inline_seconds)
    gc.disable()
    try:
        assert await batcher(predict, executor).submit([1, 2, 3]) == [1, 2, 3]
        assert alive == [0] * 4
    finally:
        gc.enable()
        executor.close()
