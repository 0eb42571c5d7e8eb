"""How long a request is worked on: until its answer is there, its caller hangs up, or its deadline passes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from fastapi import Request

from app.api.headers import header
from app.engine.executor import INLINE_SIZE, Executor
from app.errors import BadValue, CallerGone, QuartetError, TimedOut, quote_value

DEADLINE = "quartet.until"  # in the scope of a request: when its time is over, by the event loop's clock
DISCONNECT_CHECK_SECONDS = 0.02  # seconds; whether a caller is still there is only asked when the answer takes longer


def deadline(request: Request, max_seconds: float) -> float:
    """The time of the event loop at which the request's time is over, ``longest`` seconds from now at the latest.

    Raises BadValue for an ``x-request-timeout`` that is no number of seconds.
    """
    stated = header(request, b"x-request-timeout", repr(max_seconds))
    try:
        seconds = float(stated)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        told = f"x-request-timeout is {quote_value(stated)}; it should be a number of seconds greater than 0"
        raise BadValue(told, "x-request-timeout")
    until = asyncio.get_running_loop().time() + min(seconds, max_seconds)
    request.scope[DEADLINE] = until  # which its body must keep too
    return until


P = ParamSpec("P")
R = TypeVar("R")


async def run_before_deadline(
    request: Request, executor: Executor, size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """``Executor.run_if_long`` for a request whose body has been read: as long as its caller and its time last.

    Raises whatever the function raises, Overloaded, CallerGone and TimedOut.
    """
    until = request.scope.get(DEADLINE)
    if size <= INLINE_SIZE or until is None:
        return await executor.run_or_inline(size, function, *args, **kwargs)
    async with Deadline(request, until):
        return await executor.run(function, *args, **kwargs)


class Deadline:
    """Ends what stands in its ``async with`` when the caller hangs up or the time is over: CallerGone, TimedOut.

    The body must have been read: what comes after it can only be the end of the connection.
    """

    def __init__(self, request: Request, at: float) -> None:
        self._request = request
        self._at = at
        self._error: QuartetError | None = None
        self._disconnect_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._timer = self._loop.call_at(min(self._loop.time() + DISCONNECT_CHECK_SECONDS, self._at), self._on_timer)

    def _on_timer(self) -> None:
        if self._loop.time() >= self._at:
            self._end(TimedOut("the deadline passed before the answer was whole; x-request-timeout is in seconds"))
            return
        self._timer = self._loop.call_at(self._at, self._on_timer)
        if self._disconnect_task is None:
            self._disconnect_task = self._loop.create_task(self._watch_disconnect())

    async def _watch_disconnect(self) -> None:
        await self._request.receive()
        self._end(CallerGone("the caller hung up before there was an answer"))

    def _end(self, error: QuartetError) -> None:
        if self._error is None:
            self._error = error
            self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._disconnect_task is not None:
            self._disconnect_task.cancel()
        if self._error and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._error from None
