"""Set a future at most once. A future that is already done, for example cancelled, stays unchanged."""

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
