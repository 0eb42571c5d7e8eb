"""Set or cancel a future at most once. A future that is already done, for example cancelled, stays unchanged."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

Result = TypeVar("Result")


def set_result(future: asyncio.Future[Result], value: Result) -> None:
    """Set the result unless the future is done."""
    if not future.done():
        future.set_result(value)


def set_exception(future: asyncio.Future[Any], error: Exception) -> None:
    """Set the exception unless the future is done."""
    if not future.done():
        future.set_exception(error)


def cancel(future: asyncio.Future[Any]) -> None:
    """Cancel the future unless it is done.

    An exception that is already set is marked as retrieved: asyncio would log it as unhandled.
    """
    if not future.cancel() and not future.cancelled():
        future.exception()
