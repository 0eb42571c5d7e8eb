"""Set the result or the exception of a future, unless the future is already done, for example cancelled."""

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
