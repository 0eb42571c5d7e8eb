"""Threads that work off the event loop. All engines of a process compute on one, so that they take turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

SMALL = 10_000  # characters or values

P = ParamSpec("P")
R = TypeVar("R")


class Lane:
    """First come, first served. Each engine has at most one job in the lane that computes: none can crowd it."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self.name = name
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._waiting_since: dict[int, float] = {}
        self._job = 0

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
        """The same, but small work is done at once: 10,000 values take half a millisecond, and so need not queue."""
        if size <= SMALL:
            return function(*args, **kwargs)
        return await self.run(function, *args, **kwargs)

    async def timed(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, float]:
        """The same, and how many seconds it took once its turn had come."""

        def measured() -> tuple[R, float]:
            begun = time.perf_counter()
            return function(*args, **kwargs), time.perf_counter() - begun

        return await self.run(measured)

    def unanswered(self) -> float:
        """For how many seconds the oldest job has waited or run: 0 when idle, ever more when the thread hangs."""
        now = time.monotonic()
        return now - min(self._waiting_since.values(), default=now)

    def close(self) -> None:
        """Take no more jobs; the one under way ends on its own."""
        self._threads.shutdown(wait=False, cancel_futures=True)
