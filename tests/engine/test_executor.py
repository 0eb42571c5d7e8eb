"""The executor: threads, inline execution, limits, cancellation and shutdown."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine import Gate, start_tasks
from support.waiting import wait_until

from app.engine.admission import current_caller
from app.engine.executor import INLINE_OVERRUN_SECONDS, INLINE_SIZE, NO_INLINE_SECONDS, REQUEST_STAGES, Executor
from app.errors import Overloaded

pytestmark = pytest.mark.anyio


async def test_waiting_jobs_are_limited_and_leave_when_cancelled() -> None:
    executor, gate, done = Executor("parse", max_waiting=3), Gate(), list[int]()
    (running,) = await start_tasks(executor.run(gate.predict, [0]))
    await gate.busy()
    waiting = await start_tasks(*(executor.run(done.append, number) for number in range(5)))
    assert [task.done() for task in waiting] == [False] * 3 + [True] * 2
    for task in waiting[3:]:
        with pytest.raises(Overloaded, match="the queue of request parsing is full: 3 of 3 rows are waiting") as raised:
            await task
        assert raised.value.retry_after == 1
    waiting[1].cancel()
    (late,) = await start_tasks(executor.run(done.append, 9))
    (last,) = await start_tasks(executor.run_admitted(done.append, 10))  # admitted requests are never rejected
    running.cancel()  # the thread is busy until the function ends
    await asyncio.sleep(0)
    assert not done
    gate.open.set()
    await asyncio.gather(waiting[0], waiting[2], late, last)
    assert done == [0, 2, 9, 10]
    assert await executor.run(int) == 0
    executor.close()


async def test_a_job_cancelled_when_it_gets_its_thread_releases_the_thread() -> None:
    executor, gate = Executor("parse", max_waiting=3), Gate()
    (running,) = await start_tasks(executor.run(gate.predict, [0]))
    await gate.busy()
    cancelled_task, other = await start_tasks(executor.run(int), executor.run(int))
    release = executor._release

    def release_and_cancel() -> None:
        release()
        cancelled_task.cancel()  # before the job starts

    executor._release = release_and_cancel  # type: ignore[method-assign]
    gate.open.set()
    await running
    assert await other == 0
    assert cancelled_task.cancelled()
    executor._release = release  # type: ignore[method-assign]
    assert await executor.run(int) == 0
    executor.close()


async def test_a_thread_whose_caller_left_counts_as_busy() -> None:
    """A process that stops must not wait for a thread whose caller was cancelled."""
    executor, gate = Executor("test"), Gate()
    (running,) = await start_tasks(executor.run(gate.predict, [0]))
    await gate.busy()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert executor.busy
    gate.open.set()
    await executor.run(int)
    while executor.busy:  # noqa: ASYNC110  # the thread is released by a callback on the event loop
        await asyncio.sleep(0.001)
    executor.close()


async def test_closing_the_executor_cancels_waiting_jobs() -> None:
    executor, gate = Executor("parse", max_waiting=3), Gate()
    running, waiting = await start_tasks(executor.run(gate.predict, [0]), executor.run(int))
    await gate.busy()
    executor.close()
    gate.open.set()
    answers = await asyncio.gather(running, waiting, return_exceptions=True)
    assert answers[0] == [0]
    assert isinstance(answers[1], asyncio.CancelledError)


async def test_a_job_that_overruns_by_far_turns_inline_execution_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.executor.INLINE_OVERRUN_SECONDS", 0.0)
    executor, where = Executor("test", inline_seconds=1.0), list[int]()
    for _ in range(3):
        await executor.run_timed(0.001, lambda: where.append(threading.get_ident()))
    assert where[0] == threading.get_ident()
    assert threading.get_ident() not in where[1:]
    monkeypatch.setattr("app.engine.executor.NO_INLINE_SECONDS", 0.0)
    with pytest.raises(ZeroDivisionError):
        await executor.run_timed(0.001, lambda: 1 / 0)
    executor.close()


async def test_inline_execution_is_off_for_a_while_after_an_overrun(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    fake = SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now - 500)
    monkeypatch.setattr("app.engine.executor.time", fake)
    executor = Executor("test", inline_seconds=1.0)

    def job(seconds: float, *, name: str) -> tuple[str, bool]:
        nonlocal now
        now += seconds
        return name, threading.current_thread() is threading.main_thread()

    async def runs_inline(expected_seconds: float, seconds: float) -> bool:
        (name, inline), measured = await executor.run_timed(expected_seconds, job, seconds, name="a")
        assert (name, measured) == ("a", seconds)
        await executor.run(int)  # returns when the thread is free
        return inline

    assert await runs_inline(1.0, INLINE_OVERRUN_SECONDS)
    assert not await runs_inline(1.5, 0.0)
    assert await runs_inline(0.0, INLINE_OVERRUN_SECONDS + 0.25)
    until = now + NO_INLINE_SECONDS
    assert not await runs_inline(0.0, 0.0)
    now = until - 0.25
    assert not await runs_inline(0.0, 0.0)
    now = until
    assert await runs_inline(0.0, 0.0)
    executor.close()


async def test_jobs_run_on_the_threads_of_the_executor_unless_inline_execution_is_chosen() -> None:
    executor = Executor("compute")
    for job in (executor.run, lambda function: executor.run_timed(0.001, function)):
        assert "compute_0" in str(await job(lambda: threading.current_thread().name))
    executor.close()


async def test_an_executor_with_one_thread_never_starts_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second job is submitted while the thread still reports the end of the first job."""
    executor, loop = Executor("test"), asyncio.get_running_loop()
    first_waits, second_submitted = threading.Event(), threading.Event()
    call_soon_threadsafe = loop.call_soon_threadsafe

    def report_and_wait(*arguments: Any) -> Any:
        handle = call_soon_threadsafe(*arguments)
        assert second_submitted.wait(10)
        return handle

    def thread_of_first_job() -> int:
        assert first_waits.wait(10)
        return threading.get_ident()

    monkeypatch.setattr(loop, "call_soon_threadsafe", report_and_wait)
    first = await start_tasks(executor.run(thread_of_first_job))
    first_waits.set()
    while executor.busy:  # noqa: ASYNC110  # the thread is released by a callback on the event loop
        await asyncio.sleep(0.001)
    second = await start_tasks(executor.run(threading.get_ident))
    second_submitted.set()
    assert len({await task for task in (*first, *second)}) == 1
    executor.close()


@pytest.mark.parametrize(("max_waiting", "order"), [(9, ["a1", "b1", "a2"]), (0, ["a1", "a2", "b1"])])
async def test_keys_take_turns_only_in_a_queue_with_a_limit(max_waiting: int, order: list[str]) -> None:
    executor, gate, done = Executor("test", max_waiting=max_waiting), Gate(), list[str]()
    tasks = await start_tasks(executor.run(gate.predict, [0]))
    await gate.busy()
    for caller, name in (("a", "a1"), ("a", "a2"), ("b", "b1")):
        current_caller.set(caller)
        tasks += await start_tasks(executor.run(done.append, name))
    gate.open.set()
    await asyncio.gather(*tasks)
    assert done == order
    executor.close()


async def test_requests_get_one_iteration_of_the_event_loop_for_each_stage() -> None:
    loop, handles = asyncio.get_running_loop(), list[asyncio.Handle]()

    def run_in_next_iteration() -> None:
        handles.append(loop.call_soon(run_in_next_iteration))

    run_in_next_iteration()
    await Executor.yield_to_requests()
    handles.pop().cancel()
    assert len(handles) == REQUEST_STAGES


async def test_only_small_jobs_run_inline() -> None:
    executor = Executor("test")

    def job(number: int, *, name: str) -> tuple[int, str, bool]:
        return number, name, threading.current_thread() is threading.main_thread()

    for run in (executor.run_or_inline, executor.run_admitted_or_inline):
        assert await run(INLINE_SIZE, job, 1, name="a") == (1, "a", True)
        assert await run(INLINE_SIZE + 1, job, 2, name="b") == (2, "b", False)
    executor.close()


async def test_only_jobs_that_are_not_admitted_yet_are_rejected() -> None:
    executor, gate = Executor("parse", max_waiting=1), Gate()
    tasks = await start_tasks(executor.run(gate.predict, [0]), executor.run(int))
    await gate.busy()
    with pytest.raises(Overloaded):
        await executor.run_or_inline(INLINE_SIZE + 1, int)
    (admitted,) = await start_tasks(executor.run_admitted_or_inline(INLINE_SIZE + 1, int))
    assert not admitted.done()
    gate.open.set()
    assert await asyncio.gather(*tasks, admitted) == [[0], 0, 0]
    executor.close()


async def test_without_a_limit_any_number_of_jobs_waits() -> None:
    executor, gate = Executor("test"), Gate()
    tasks = await start_tasks(executor.run(gate.predict, [0]), *(executor.run(int) for _ in range(50)))
    assert not any(task.done() for task in tasks)
    gate.open.set()
    assert await asyncio.gather(*tasks) == [[0], *[0] * 50]
    executor.close()


async def test_each_thread_and_place_in_the_queue_is_used_again() -> None:
    executor = Executor("parse", threads=2, max_waiting=1)
    for _ in range(3):
        release = threading.Event()
        running = await start_tasks(*(executor.run(release.wait) for _ in range(2)))
        (waiting,) = await start_tasks(executor.run(int))
        with pytest.raises(Overloaded, match="1 of 1 rows are waiting"):
            await executor.run(int)
        release.set()
        assert await asyncio.gather(*running, waiting) == [True, True, 0]
        assert not executor.busy
    executor.close()


async def test_threads_are_stalled_since_the_last_start_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("app.engine.executor.time", SimpleNamespace(monotonic=lambda: now))
    executor, release = Executor("test", threads=2), threading.Event()
    tasks = await start_tasks(executor.run(release.wait))
    now += 5
    tasks += await start_tasks(executor.run(release.wait))
    now += 3
    assert executor.stalled_seconds() == 3
    release.set()
    await asyncio.gather(*tasks)
    executor.close()


async def test_stalled_threads_are_noticed_even_if_their_callers_leave() -> None:
    executor, gate = Executor("test", threads=2), Gate()
    (first,) = await start_tasks(executor.run(gate.predict, [0]))
    await gate.busy()
    assert executor.stalled_seconds() == 0  # the other thread is free
    (running,) = await start_tasks(executor.run(gate.open.wait))
    first.cancel()
    seconds = executor.stalled_seconds()
    await asyncio.sleep(0.05)
    assert executor.stalled_seconds() >= seconds + 0.05
    gate.open.set()
    await running
    assert executor.stalled_seconds() == 0
    executor.close()


def test_a_thread_is_free_again_after_a_job_that_outlived_its_event_loop() -> None:
    executor, gate = Executor("test"), Gate()

    async def leave() -> None:
        task = asyncio.create_task(executor.run(gate.predict, [0]))
        await gate.busy()
        task.cancel()

    asyncio.run(leave())
    assert executor.busy
    gate.open.set()
    wait_until(lambda: not executor.busy)
    assert asyncio.run(executor.run(int)) == 0
    assert executor.stalled_seconds() == 0
    executor.close()


async def test_a_key_whose_waiting_job_was_cancelled_has_its_whole_share_again() -> None:
    executor, gate = Executor("parse", max_waiting=2), Gate()
    running = await start_tasks(executor.run(gate.predict, [0]))
    await gate.busy()
    current_caller.set("a")
    (cancelled,) = await start_tasks(executor.run(int))
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    current_caller.set("b")
    waiting = await start_tasks(executor.run(int))
    current_caller.set("a")
    waiting += await start_tasks(executor.run(int))
    gate.open.set()
    assert await asyncio.gather(*running, *waiting) == [[0], 0, 0]
    executor.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
async def test_niceness_is_added_to_that_of_the_process_for_the_threads_only() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, nice, normal = niceness(), Executor("nice", niceness=3), Executor("normal")
    assert await nice.run(niceness) == before + 3
    assert await normal.run(niceness) == niceness() == before
    nice.close()
    normal.close()


async def test_an_executor_works_if_the_system_forbids_other_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", forbidden)
    executor = Executor("nice", niceness=3)
    assert await executor.run(int) == 0
    executor.close()
