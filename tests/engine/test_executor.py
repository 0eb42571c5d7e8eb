"""The executor: threads, limits, cancellation, stalls and shutdown."""

from __future__ import annotations

import asyncio
import threading
from concurrent import futures
from typing import Any

import pytest
from support.engine import Gate, start_tasks

from app.engine.executor import Executor
from app.engine.fair_queue import current_caller
from app.errors import Overloaded

pytestmark = pytest.mark.anyio


class Pool(futures.Executor):
    """A pool without threads, whose jobs end when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        future: futures.Future[Any] = futures.Future()
        future.set_running_or_notify_cancel()
        self.jobs.append((future, function, args))
        return future

    def end(self) -> None:
        future, function, args = self.jobs.pop(0)
        future.set_result(function(*args))


async def idle(executor: Executor) -> bool:
    """Wait until no thread is busy. A thread is released by a callback on the event loop."""
    async with asyncio.timeout(60):
        while executor.busy:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return True


async def test_waiting_jobs_are_limited_and_leave_when_cancelled() -> None:
    executor, gate, done = Executor("parse", max_waiting=3), Gate(), list[int]()
    (running,) = await start_tasks(executor.run(gate.predict, [0]))
    await gate.busy()
    waiting = []
    for number in range(3):
        executor.admit()
        waiting += await start_tasks(executor.run(done.append, number))
    with pytest.raises(Overloaded, match="the queue of request parsing is full: 3 of 3 rows are waiting") as raised:
        executor.admit()
    assert raised.value.retry_after == 1
    waiting[1].cancel()
    await asyncio.sleep(0)
    executor.admit()
    (late,) = await start_tasks(executor.run(done.append, 9))
    (last,) = await start_tasks(executor.run(done.append, 10))  # jobs that need no admission are never rejected
    running.cancel()  # the thread is busy until the function ends
    await asyncio.sleep(0)
    assert not done
    gate.open.set()
    await asyncio.gather(waiting[0], waiting[2], late, last)
    assert done == [0, 2, 9, 10]
    executor.close()


async def test_a_job_cancelled_when_it_gets_its_thread_releases_the_thread() -> None:
    class CancellingPool(Pool):
        def end(self) -> None:
            super().end()
            asyncio.get_running_loop().call_soon(cancelled.cancel)  # after the thread is passed on

    pool = CancellingPool()
    executor = Executor("test", pool=pool)
    running, cancelled, other = await start_tasks(*(executor.run(int) for _ in range(3)))
    pool.end()
    await running
    await asyncio.gather(cancelled, return_exceptions=True)
    while pool.jobs:
        Pool.end(pool)
        await asyncio.sleep(0)
    assert await other == 0
    assert cancelled.cancelled()
    assert await idle(executor)


async def test_closing_the_executor_cancels_waiting_jobs() -> None:
    executor, gate = Executor("test"), Gate()
    running, waiting = await start_tasks(executor.run(gate.predict, [0]), executor.run(int))
    await gate.busy()
    executor.close()
    gate.open.set()
    assert await running == [0]
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="shutdown"):
        await executor.run(int)


async def test_jobs_of_callers_take_turns() -> None:
    executor, gate, done = Executor("test"), Gate(), list[str]()
    tasks = await start_tasks(executor.run(gate.predict, [0]))
    await gate.busy()
    for caller, name in (("a", "a1"), ("a", "a2"), ("b", "b1")):
        current_caller.set(caller)
        tasks += await start_tasks(executor.run(done.append, name))
    gate.open.set()
    await asyncio.gather(*tasks)
    assert done == ["a1", "b1", "a2"]
    executor.close()


async def test_threads_are_stalled_since_the_last_start_of_a_job() -> None:
    now = 1000.0
    executor, release = Executor("test", threads=2, clock=lambda: now), threading.Event()
    first = await start_tasks(executor.run(release.wait))
    now += 5
    assert executor.stalled_seconds() == 0  # the other thread is free
    second = await start_tasks(executor.run(release.wait))
    first[0].cancel()  # the thread still hangs if its caller leaves
    now += 3
    assert executor.stalled_seconds() == 3
    assert executor.busy
    release.set()
    await asyncio.gather(*first, *second, return_exceptions=True)
    assert await idle(executor)
    assert executor.stalled_seconds() == 0
    executor.close()
