"""An answer that is owed: it is given once, and whoever stopped waiting for it is left alone."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

Result = TypeVar("Result")


def set_result(future: asyncio.Future[Result], value: Result) -> None:
    if not future.done():
        future.set_result(value)


def set_exception(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def cancel(future: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more; one that was given stays."""
    if not future.cancel() and not future.cancelled():
        future.exception()  # looked at, so that it is not reported as an error that nobody noticed
