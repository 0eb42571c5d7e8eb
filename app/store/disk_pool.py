"""Run functions that access files on threads, so that they do not block the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class DiskPool:
    """Runs functions that access files, in the order of the calls, on at most ``max_threads`` threads.

    A file system that does not answer, such as a network volume, blocks only these threads. Neither the event loop nor
    the exit of the process waits for a thread. A thread starts when there is a job, and ends when no jobs wait.
    """

    def __init__(self, name: str, max_threads: int = 1) -> None:
        self._name, self._max_threads = name, max_threads
        self._jobs: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()
        self._threads = 0

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function on a thread. Return its result, or raise its exception.

        Raises:
            RuntimeError: no thread can be started. The function is never run.
        """
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._threads < self._max_threads:  # if no thread can be started, the job must not run later
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._threads += 1
            self._jobs.append((future, lambda: function(*args, **kwargs)))
        return await future

    async def run_within(self, seconds: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function as ``run`` does, but wait for at most ``seconds`` seconds.

        Raises:
            TimeoutError: the function has not ended in time. If it has not started yet, it is never run.
        """
        async with asyncio.timeout(seconds):
            return await self.run(function, *args, **kwargs)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._threads -= 1
                    return
                future, function = self._jobs.popleft()
            if future.cancelled():
                continue
            result: Any = None
            error: BaseException | None = None
            try:
                result = function()
            except BaseException as raised:  # with any exception, the thread must go on to run the next jobs
                error = raised
            with suppress(RuntimeError):  # the event loop is closed
                future.get_loop().call_soon_threadsafe(_resolve, future, result, error)
            del future, function, result, error  # do not keep these objects alive until the next job


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():  # the caller does not wait any more
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(result)
