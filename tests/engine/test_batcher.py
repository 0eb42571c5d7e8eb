"""The rules of batching, one example each. ``test_simulation`` tests them in any order of events."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
from support.engine import Gate, RecordingObserver

from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.observer import RequestTrace, current_trace
from app.errors import InferenceFailed

pytestmark = pytest.mark.anyio


def batcher(
    predict: Any, executor: Executor, rows: Any = lambda item: 1, seconds: float = 0.001, **options: Any
) -> Any:
    options = {"observer": RecordingObserver(), "batch_rows": 4, "queue_rows": 8, **options}
    return Batcher("m", predict, rows, lambda items: seconds, executor, **options)


async def test_a_wrong_number_of_results_is_a_failure_of_the_network(executor: Executor) -> None:
    engine = batcher(lambda items: [], executor)
    with pytest.raises(InferenceFailed, match="RuntimeError"):
        await engine.submit([1, 2])
    assert str(engine.observer.failures[-1]) == "m returned 0 results for 1 items"


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
