"""Where computing happens. All engines of a process compute in one lane, so that they take turns.

What takes no longer than it is worth is done at once, on the event loop itself: a change of threads costs 30 to 100
microseconds each way, and more when both want Python's lock. All else goes to a thread, and the loop stays free.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from app.engine.admission import AdmissionControl, current_caller
from app.engine.fair_queue import FairQueue

INLINE_SIZE = 10_000  # characters or values: half a millisecond
INLINE_OVERRUN_SECONDS = (
    0.25  # seconds on the event loop, of what was expected to be short, after which nothing is believed short
)
NO_INLINE_SECONDS = 10.0  # for so many seconds

REQUEST_STAGES = 4  # turns of the event loop that a short request takes: it is read, queued, computed, answered

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(eq=False, slots=True)
class Ticket:
    """A job that waits for a thread."""

    started: asyncio.Future[None]
    caller: str | None
    rows: int = 1


class Executor:
    """First come, first served. Each engine has at most one job in the lane that computes: none can crowd it.

    ``at_once``: seconds that a job may be expected to take and still be done on the event loop. ``most``: how many jobs
    may wait where they are of requests, and shared by callers with keys as a queue is; 0: they are of engines.
    """

    def __init__(self, name: str, threads: int = 1, inline_seconds: float = 0.0, max_waiting: int = 0) -> None:
        self.name = name
        self._inline_seconds = inline_seconds
        self._admission = AdmissionControl("what is to be read", None, max_waiting) if max_waiting else None
        self._free_threads = self._thread_count = threads
        self._queue: FairQueue[Ticket] = FairQueue()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._waiting_since: dict[int, float] = {}
        self._last_job = 0
        self.text_seconds = 0.0  # seconds, of all turns of texts so far
        self._no_inline_until = -math.inf  # until when nothing is done at once

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute on a thread. Raises whatever the function raises, and Overloaded when too many jobs wait."""
        if self._admission and not self._free_threads:
            self._admission.admit(1, 0.0)
        return await self.run_admitted(function, *args, **kwargs)

    async def run_admitted(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The same for what ends a request that was let in: it is never refused."""
        self._last_job += 1
        job, loop = self._last_job, asyncio.get_running_loop()
        self._waiting_since[job] = time.monotonic()

        def over(_: object) -> None:
            try:
                loop.call_soon_threadsafe(self._release)
            except RuntimeError:  # the loop is closed: nobody waits
                self._release()

        try:
            await self._acquire(loop)
            try:
                begun = self._pool.submit(function, *args, **kwargs)
            except BaseException:  # the lane is closed
                self._release()
                raise
            begun.add_done_callback(over)  # also when nobody waits for it any more
            return await asyncio.wrap_future(begun)
        finally:
            del self._waiting_since[job]

    async def _acquire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for a thread that is free."""
        if self._free_threads:
            self._free_threads -= 1
            return
        turn = Ticket(loop.create_future(), current_caller.get() if self._admission else None)
        if self._admission:
            self._admission.add(turn.caller, 1)
        self._queue.append(turn)
        try:
            await turn.started
        except asyncio.CancelledError:
            if turn.started.cancelled():
                self._queue.discard(turn)
            else:  # it had its turn already
                self._release()
            raise
        finally:
            if self._admission:
                self._admission.remove(turn.caller, 1)

    def _release(self) -> None:
        """A thread is free for whoever is next."""
        while self._queue:
            turn = self._queue.pop()
            if not turn.started.done():
                turn.started.set_result(None)
                return
        self._free_threads += 1

    async def run_or_inline(self, size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The same, but what has a small size is done at once."""
        if size <= INLINE_SIZE:
            return function(*args, **kwargs)
        return await self.run(function, *args, **kwargs)

    async def run_admitted_or_inline(self, size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``finish``, but what has a small size is done at once."""
        if size <= INLINE_SIZE:
            return function(*args, **kwargs)
        return await self.run_admitted(function, *args, **kwargs)

    async def run_timed(
        self, expected_seconds: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[R, float]:
        """The same for what is expected to take so many seconds; gives also how many it took once its turn had come.

        What is done at once is followed by everybody else's turn, so that the event loop is never held by a queue. When
        it takes far longer than was expected, nothing is done at once for a while.
        """

        def measured() -> tuple[R, float]:
            begun = time.perf_counter()
            return function(*args, **kwargs), time.perf_counter() - begun

        begun = time.monotonic()
        if expected_seconds > self._inline_seconds or self._waiting_since or begun < self._no_inline_until:
            return await self.run(measured)
        try:
            return measured()
        finally:
            if (now := time.monotonic()) - begun > INLINE_OVERRUN_SECONDS:
                self._no_inline_until = now + NO_INLINE_SECONDS

    @staticmethod
    async def yield_to_requests() -> None:
        """Between two batches that may have been computed on the event loop: whoever came meanwhile is answered.

        With one turn of the loop for each stage of a request, it would wait for as many batches as it has stages.
        """
        for _ in range(REQUEST_STAGES):
            await asyncio.sleep(0)

    @property
    def busy(self) -> bool:
        """Whether a thread computes, for somebody or for nobody any more."""
        return self._free_threads < self._thread_count

    def oldest_job_seconds(self) -> float:
        """For how many seconds the oldest job has waited or run: 0 when idle, ever more when the thread hangs."""
        now = time.monotonic()
        return now - min(self._waiting_since.values(), default=now)

    def close(self) -> None:
        """Take no more jobs; the one under way ends on its own."""
        for turn in self._queue:
            turn.started.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
