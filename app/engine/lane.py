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
from typing import ParamSpec, TypeVar

SMALL = 10_000  # characters or values: half a millisecond
OVERRUN = 0.25  # seconds on the event loop, of what was expected to be short, after which nothing is believed short
DISTRUST = 10.0  # for so many seconds

P = ParamSpec("P")
R = TypeVar("R")


class Lane:
    """First come, first served. Each engine has at most one job in the lane that computes: none can crowd it.

    ``at_once``: seconds that a job may be expected to take and still be done on the event loop.
    """

    def __init__(self, name: str, threads: int = 1, at_once: float = 0.0) -> None:
        self.name = name
        self._at_once = at_once
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._waiting_since: dict[int, float] = {}
        self._job = 0
        self._distrusted = -math.inf  # until when nothing is done at once
        self.computed = 0.0  # seconds, of all ``timed`` jobs so far

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute on a thread. Raises whatever the function raises."""
        self._job += 1
        job = self._job
        self._waiting_since[job] = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))
        finally:
            del self._waiting_since[job]

    async def run_if_long(self, size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The same, but what has a small size is done at once."""
        if size <= SMALL:
            return function(*args, **kwargs)
        return await self.run(function, *args, **kwargs)

    async def timed(
        self, expected: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[R, float]:
        """The same for what is expected to take so many seconds; gives also how many it took once its turn had come.

        What is done at once is followed by everybody else's turn, so that the event loop is never held by a queue. When
        it takes far longer than was expected, nothing is done at once for a while.
        """

        def measured() -> tuple[R, float]:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs), time.perf_counter() - begun
            finally:
                self.computed += time.perf_counter() - begun

        begun = time.monotonic()
        if expected > self._at_once or self._waiting_since or begun < self._distrusted:
            return await self.run(measured)
        try:
            return measured()
        finally:
            if (now := time.monotonic()) - begun > OVERRUN:
                self._distrusted = now + DISTRUST

    def unanswered(self) -> float:
        """For how many seconds the oldest job has waited or run: 0 when idle, ever more when the thread hangs."""
        now = time.monotonic()
        return now - min(self._waiting_since.values(), default=now)

    def close(self) -> None:
        """Take no more jobs; the one under way ends on its own."""
        self._threads.shutdown(wait=False, cancel_futures=True)
