"""The thread that computes. All engines of a process share one, so that they take turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Lane:
    """One thread, first come first served. Each engine has at most one job in it, so a busy one cannot crowd it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._waiting_since: dict[int, float] = {}
        self._job = 0

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute on the thread. Raises whatever the function raises."""
        self._job += 1
        job = self._job
        self._waiting_since[job] = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))
        finally:
            del self._waiting_since[job]

    def unanswered(self) -> float:
        """For how many seconds the oldest job has waited or run: 0 when idle, ever more when the thread hangs."""
        return time.monotonic() - min(self._waiting_since.values(), default=time.monotonic())

    def close(self) -> None:
        """Take no more jobs; the one under way ends on its own."""
        self._thread.shutdown(wait=False, cancel_futures=True)
