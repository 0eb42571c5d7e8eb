"""Stop the work on a request when its deadline passes or its client disconnects."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from fastapi import Request

from app.api.connection import connection
from app.engine.executor import INLINE_SIZE, Executor
from app.errors import BadValue, CallerGone, TimedOut, quote_value

DEADLINE = "quartet.deadline"  # key in the ASGI scope: the request's deadline, in event-loop time
UNIT = "quartet.deadline_unit"  # key in the ASGI scope: how the client has set the deadline, for an error message

P = ParamSpec("P")
R = TypeVar("R")


def set_deadline(request: Request, max_seconds: float) -> None:
    """Set the deadline of a request to ``max_seconds`` from now, or earlier if ``x-request-timeout`` says so.

    It is stored in the ASGI scope, because it limits all steps from reading the body to sending the response.

    Raises:
        BadValue: the header is not a positive, finite number.
    """
    value = request.headers.get("x-request-timeout")
    seconds = max_seconds if value is None else min(_parse_seconds(value), max_seconds)
    request.scope[DEADLINE] = asyncio.get_running_loop().time() + seconds


def _parse_seconds(text: str) -> float:
    """Return the value of ``x-request-timeout``. Raises BadValue."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BadValue(
            f"x-request-timeout is {quote_value(text)}; it should be a number of seconds greater than 0",
            "x-request-timeout",
        )
    return seconds


async def run_before_deadline(
    request: Request, executor: Executor, size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Call ``function`` on the event loop if ``size`` is small, otherwise on a thread of ``executor``.

    The wait for the thread ends at the request's deadline. The caller must have read the body of the request. Errors
    that ``function`` raises are not caught.

    Raises:
        Overloaded: too many calls wait for a thread.
        CallerGone: the client disconnected.
        TimedOut: the deadline passed.
    """
    if size <= INLINE_SIZE:
        return function(*args, **kwargs)
    executor.admit()
    async with Deadline(request):
        return await executor.run(function, *args, **kwargs)


class Deadline:
    """An asynchronous context manager that cancels its block at the deadline, or when the client disconnects.

    The body of the request must have been read, so that the next ASGI message can only be the disconnect. Do not nest
    such blocks.

    Raises:
        CallerGone: the client disconnected.
        TimedOut: the deadline passed.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._is_gone = request, False
        self._timeout = asyncio.timeout_at(request.scope[DEADLINE])

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._server = connection(self._request)
        if self._server:
            self._server.watch_disconnect(self._on_disconnect)
        else:
            self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        await self._request.receive()
        self._on_disconnect()

    def _on_disconnect(self) -> None:
        if not self._timeout.expired():
            self._is_gone = True
            self._timeout.reschedule(0.0)

    async def __aexit__(self, *error: Any) -> None:
        if self._server:
            self._server.watch_disconnect(None)
        else:
            self._watcher.cancel()
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError:
            if self._is_gone:
                raise CallerGone("the client disconnected before the answer was complete") from None
            unit = self._request.scope.get(UNIT, "x-request-timeout is in seconds")
            raise TimedOut(f"the deadline passed before the answer was complete; {unit}") from None
