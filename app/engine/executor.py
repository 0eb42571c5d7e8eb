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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from app.engine.admission import AdmissionControl, current_caller
from app.engine.fair_queue import FairQueue

INLINE_SIZE = 10_000  # characters or values; parsing this many takes about 0.5 ms
INLINE_OVERRUN_SECONDS = 0.25  # an inline job that takes longer stops inline execution for ``NO_INLINE_SECONDS``
NO_INLINE_SECONDS = 10.0

REQUEST_STAGES = 4  # event-loop iterations that a short request needs: read, queue, compute, respond

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
    """A thread pool with a queue of jobs. Each engine submits one job at a time.

    A job that is expected to take at most ``inline_seconds`` seconds may run on the event loop instead. If
    ``max_waiting`` is above 0, ``run`` rejects new jobs while ``max_waiting`` jobs wait, and callers with API keys
    share the queue fairly. If ``max_waiting`` is 0, the queue has no limit and is first-in, first-out. On Linux,
    ``niceness`` is added to the niceness of each thread. Each thread first calls ``prepare_thread``.
    """

    def __init__(
        self,
        name: str,
        threads: int = 1,
        inline_seconds: float = 0.0,
        max_waiting: int = 0,
        niceness: int = 0,
        prepare_thread: Callable[[], object] = lambda: None,
    ) -> None:

        def start() -> None:
            lower_priority(niceness)
            prepare_thread()

        self._inline_seconds = inline_seconds
        self._admission = AdmissionControl("request parsing", None, max_waiting) if max_waiting else None
        self._free_threads = self._thread_count = threads
        self._queue: FairQueue[Ticket] = FairQueue()
        self._pool = ThreadPoolExecutor(threads, name, initializer=start)
        self._started_at: dict[Future[Any], float] = {}  # time.monotonic() at the start of each job
        self.small_item_at = -math.inf  # time.monotonic() when a batcher last took a small item
        self.text_seconds = 0.0  # seconds that all text engines have computed so far
        self._no_inline_until = -math.inf  # until time.monotonic() reaches this value, no job runs inline

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function on a thread.

        Raises:
            Overloaded: too many jobs wait.
            Exception: any exception that the function raises.
        """
        if self._admission and not self._free_threads:
            self._admission.admit(1, 0.0)
        return await self.run_admitted(function, *args, **kwargs)

    async def run_admitted(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a job of a request that was already admitted.

        Unlike ``run``, never reject the job, however many jobs wait.
        """
        loop = asyncio.get_running_loop()

        def finish(future: Future[R]) -> None:
            try:
                loop.call_soon_threadsafe(self._finish, future)
            except RuntimeError:  # the event loop is closed
                self._finish(future)

        await self._acquire(loop)
        try:
            future = self._pool.submit(function, *args, **kwargs)
        except BaseException:  # the pool is shut down
            self._release()
            raise
        self._started_at[future] = time.monotonic()
        future.add_done_callback(finish)  # even if the caller leaves earlier, the thread is busy until the job ends
        try:
            return await asyncio.wrap_future(future)
        finally:
            # The error in ``future`` has a traceback that refers to this frame. With this reference cycle, the tensors
            # in the frames of the traceback would stay in memory until the next garbage collection.
            del future

    async def _acquire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for a free thread, and reserve it."""
        if self._free_threads:
            self._free_threads -= 1
            return
        ticket = Ticket(loop.create_future(), current_caller.get() if self._admission else None)
        if self._admission:
            self._admission.add(ticket.caller, 1)
        self._queue.append(ticket)
        try:
            await ticket.started
        except asyncio.CancelledError:
            if ticket.started.cancelled():
                self._queue.discard(ticket)
            else:  # the job was cancelled after it had received its thread
                self._release()
            raise
        finally:
            if self._admission:
                self._admission.remove(ticket.caller, 1)

    def _finish(self, future: Future[Any]) -> None:
        """Release the thread of a job that has ended."""
        del self._started_at[future]
        self._release()

    def _release(self) -> None:
        """Pass the thread of a job that has ended to the next waiting job, or count the thread as free."""
        while self._queue:
            ticket = self._queue.pop()
            if not ticket.started.done():
                ticket.started.set_result(None)
                return
        self._free_threads += 1

    async def run_or_inline(self, size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function inline if ``size`` (characters or values) is small, otherwise as ``run`` does."""
        if size <= INLINE_SIZE:
            return function(*args, **kwargs)
        return await self.run(function, *args, **kwargs)

    async def run_admitted_or_inline(self, size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function inline if ``size`` (characters or values) is small, otherwise as ``run_admitted`` does."""
        if size <= INLINE_SIZE:
            return function(*args, **kwargs)
        return await self.run_admitted(function, *args, **kwargs)

    async def run_timed(
        self, expected_seconds: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[R, float]:
        """Run the function inline if it is expected to be short and no thread is busy, otherwise on a thread.

        Short means that ``expected_seconds`` is at most the executor's ``inline_seconds``. Returns the result and the
        running time of the function in seconds, without the time in the queue. After an inline job of more than
        ``INLINE_OVERRUN_SECONDS``, this method uses only threads for ``NO_INLINE_SECONDS``.
        """

        def measured() -> tuple[R, float]:
            started_at = time.perf_counter()
            return function(*args, **kwargs), time.perf_counter() - started_at

        started_at = time.monotonic()
        if expected_seconds > self._inline_seconds or self.busy or started_at < self._no_inline_until:
            return await self.run(measured)
        try:
            return measured()
        finally:
            if (now := time.monotonic()) - started_at > INLINE_OVERRUN_SECONDS:
                self._no_inline_until = now + NO_INLINE_SECONDS

    @staticmethod
    async def yield_to_requests() -> None:
        """Let requests that arrived during an inline batch proceed before the next batch.

        A request has ``REQUEST_STAGES`` stages, and each stage needs an iteration of the event loop. With a single
        iteration between two batches, the request would wait for one batch at each stage.
        """
        for _ in range(REQUEST_STAGES):
            await asyncio.sleep(0)

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
        return time.monotonic() - max(self._started_at.values())

    def close(self) -> None:
        """Cancel waiting jobs and accept no new jobs. Running functions continue until they end."""
        for ticket in self._queue:
            ticket.started.cancel()
        self._pool.shutdown(wait=False)  # the pool has no waiting jobs, because they wait in ``_queue``
