"""The threads for file access: the order of their jobs, errors, abandoned jobs, and their end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from support.waiting import wait_until

from app.store.disk_pool import DiskPool


def current_thread(*_: object) -> threading.Thread:
    return threading.current_thread()


def test_a_job_runs_in_a_named_daemon_thread_that_ends_after_the_last_job() -> None:
    disk = DiskPool("disk")
    for _ in range(2):  # the next job starts another thread
        thread = asyncio.run(disk.run(current_thread))
        assert (thread.name, thread.daemon) == ("disk", True)  # an exiting process does not wait for a daemon
        thread.join(30)
        assert not thread.is_alive()


def test_arguments_results_and_errors_are_passed_on() -> None:
    def failing() -> None:
        raise FileNotFoundError("x")

    disk = DiskPool("disk")
    assert asyncio.run(disk.run(divmod, 7, 2)) == (3, 1)
    assert asyncio.run(disk.run(int, "ff", base=16)) == 255
    assert asyncio.run(disk.run_within(30, int, "ff", base=16)) == 255
    with pytest.raises(FileNotFoundError, match="x"):
        asyncio.run(disk.run(failing))


@pytest.mark.anyio
async def test_an_exception_of_any_class_is_passed_on_and_the_next_job_runs() -> None:
    class Panic(BaseException):
        """An exception that is no Exception, as the exceptions of some libraries in Rust."""

    def failing() -> None:
        raise Panic("x")

    disk = DiskPool("disk")
    jobs = [asyncio.create_task(disk.run_within(30, function)) for function in (failing, int)]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert isinstance(results[0], Panic)
    assert results[1] == 0


@pytest.mark.anyio
async def test_a_job_whose_thread_cannot_be_started_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    disk, calls = DiskPool("disk"), list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing_start)
        with pytest.raises(RuntimeError, match="can't start"):
            await disk.run(calls.append, 1)
    await disk.run(calls.append, 2)
    assert calls == [2]


@pytest.mark.anyio
async def test_jobs_run_in_turn_in_one_thread_and_abandoned_ones_never() -> None:
    disk, event, calls = DiskPool("disk"), threading.Event(), list[int]()
    first = asyncio.create_task(disk.run(event.wait, 30))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await disk.run_within(0.01, calls.append, 1)
    others = [asyncio.create_task(disk.run(current_thread)) for _ in range(2)]
    last = asyncio.create_task(disk.run(calls.append, 2))
    await asyncio.sleep(0)  # the jobs are queued; otherwise the thread could end between two of them
    event.set()
    assert await first
    assert await others[0] is await others[1]
    await last
    assert calls == [2]


@pytest.mark.anyio
async def test_a_pool_runs_as_many_jobs_at_once_as_it_has_threads() -> None:
    disk, together, release = DiskPool("disk", 2), threading.Barrier(3), threading.Event()

    def wait() -> None:
        together.wait(60)
        release.wait(60)

    running = [asyncio.create_task(disk.run(wait)) for _ in range(2)]
    await asyncio.to_thread(together.wait, 60)
    third = asyncio.create_task(disk.run(release.is_set))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(third), 0.01)
    release.set()
    await asyncio.gather(*running)
    assert await third  # it ran after one of the others


@pytest.mark.anyio
async def test_a_job_whose_caller_has_left_ends_without_an_error() -> None:
    disk, started, release = DiskPool("disk"), threading.Event(), threading.Event()
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))

    def hang() -> None:
        started.set()
        release.wait(30)

    running = asyncio.create_task(disk.run(hang))
    await asyncio.to_thread(started.wait, 30)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    release.set()
    assert await disk.run(int) == 0  # the thread can still run jobs
    assert not errors


def test_a_job_may_end_after_its_event_loop_is_closed() -> None:
    disk, started, release = DiskPool("disk"), threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def hang() -> None:
        threads.append(threading.current_thread())
        started.set()
        release.wait(30)

    async def leave() -> None:
        task = asyncio.create_task(disk.run(hang))
        await asyncio.to_thread(started.wait, 30)
        task.cancel()

    asyncio.run(leave())
    release.set()
    wait_until(lambda: not threads[0].is_alive())
    assert asyncio.run(disk.run(int)) == 0
