"""Run blocking functions on threads, or inline on the event loop when they are short.

All engines of a process share one executor with one thread, so their jobs run one after the other. A switch to a thread
costs 30 to 100 microseconds each way, and more while the thread and the event loop compete for the GIL. Short jobs
therefore run inline, which means on the event loop.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from app.engine.fair_queue import FairQueue, current_caller

INLINE_SIZE = 10_000  # characters or values; parsing this many takes about 0.5 ms

P = ParamSpec("P")
R = TypeVar("R")


def lower_priority(niceness: int) -> None:
    """Add ``niceness`` to the niceness of the current thread, on Linux only.

    The change is permanent, because only root may raise a priority. Nothing changes if the system forbids it, for
    example by a seccomp filter.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):  # an error here would end all threads of the executor
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


@dataclass(eq=False, slots=True)
class Ticket:
    """A job that waits for a free thread. The future ``started`` is resolved when the job gets a thread."""

    started: asyncio.Future[None]
    caller: str | None
    rows: int = 1


class Executor:
    """A pool of threads with a fair queue of at most ``max_waiting`` jobs.

    ``compute`` runs a job inline if it is expected to take at most ``inline_seconds`` seconds. On Linux, ``niceness``
    is added to the niceness of each thread. Each thread first calls ``prepare_thread``. Tests can pass a ``pool``.
    """

    def __init__(
        self,
        name: str,
        threads: int = 1,
        *,
        inline_seconds: float = 0.0,
        max_waiting: float = math.inf,
        niceness: int = 0,
        prepare_thread: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        pool: futures.Executor | None = None,
    ) -> None:

        def start() -> None:
            lower_priority(niceness)
            prepare_thread()

        self.text_seconds = 0.0  # seconds that all text engines have computed so far
        self._inline_seconds, self._clock = inline_seconds, clock
        self._free_threads = self._thread_count = threads
        self._queue: FairQueue[Ticket] = FairQueue("request parsing", max_waiting)
        self._pool = pool or futures.ThreadPoolExecutor(threads, name, initializer=start)
        self._started_at: dict[futures.Future[Any], float] = {}  # on the clock, for each running job

    def admit(self) -> None:
        """Raise Overloaded if too many jobs wait for one more."""
        self._queue.admit(1)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function on a thread, and return its result. Jobs are not rejected here; see ``admit``."""
        loop = asyncio.get_running_loop()

        def finish(future: futures.Future[R]) -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._finish, future)

        await self._wait_for_thread(loop)
        future = self._pool.submit(function, *args, **kwargs)
        self._started_at[future] = self._clock()
        future.add_done_callback(finish)  # even if the caller leaves earlier, the thread is busy until the job ends
        try:
            return await asyncio.wrap_future(future)
        finally:
            # The error in ``future`` has a traceback that refers to this frame. With this reference cycle, the tensors
            # in the frames of the traceback would stay in memory until the next garbage collection.
            del future

    async def _wait_for_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for a free thread, and reserve it."""
        if self._free_threads:
            self._free_threads -= 1
            return
        ticket = Ticket(loop.create_future(), current_caller.get())
        self._queue.append(ticket)
        try:
            await ticket.started
        except asyncio.CancelledError:
            if ticket.started.cancelled():
                self._queue.remove(ticket)
            else:  # the job was cancelled after it had received its thread
                self._release()
            raise

    def _finish(self, future: futures.Future[Any]) -> None:
        """Release the thread of a job that has ended."""
        del self._started_at[future]
        self._release()

    def _release(self) -> None:
        """Pass the thread of a job that has ended to the next waiting job, or count the thread as free."""
        while self._queue:
            started = self._queue.pop().started
            if not started.done():
                started.set_result(None)
                return
        self._free_threads += 1

    async def compute(
        self, expected_seconds: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[R, float]:
        """Run the function inline if it is expected to be short and no thread is busy, otherwise on a thread.

        Returns the result and the running time of the function in seconds, without the time in the queue.
        """

        def measured() -> tuple[R, float]:
            started_at = self._clock()
            return function(*args, **kwargs), self._clock() - started_at

        if expected_seconds > self._inline_seconds or self.busy:
            return await self.run(measured)
        return measured()

    @property
    def busy(self) -> bool:
        """Whether a thread is running a job. The thread is busy until the job ends, even if its caller has left."""
        return self._free_threads < self._thread_count

    def stalled_seconds(self) -> float:
        """Return 0 if a thread is free. Otherwise return the seconds since the last start of a job on a thread.

        The value grows without limit while all threads hang, even if their callers have left.
        """
        if len(self._started_at) < self._thread_count:
            return 0.0
        return self._clock() - max(self._started_at.values())

    def close(self) -> None:
        """Cancel waiting jobs and accept no new jobs. Running functions continue until they end."""
        for ticket in self._queue:
            ticket.started.cancel()
        self._pool.shutdown(wait=False)
