"""An answer that is owed: it is given once, and whoever stopped waiting for it is left alone."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

Answer = TypeVar("Answer")


def give(answer: asyncio.Future[Answer], value: Answer) -> None:
    if not answer.done():
        answer.set_result(value)


def fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def abandon(answer: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more; one that was given stays."""
    if not answer.cancel() and not answer.cancelled():
        answer.exception()  # looked at, so that it is not reported as an error that nobody noticed
