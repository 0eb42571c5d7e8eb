"""A future that is done never changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from app.engine.futures import set_exception, set_result


@pytest.fixture
def future() -> Iterator[asyncio.Future[int]]:
    loop = asyncio.new_event_loop()
    yield loop.create_future()
    loop.close()


def test_the_first_result_stays(future: asyncio.Future[int]) -> None:
    set_result(future, 1)
    set_result(future, 2)
    set_exception(future, ValueError("late"))
    future.cancel()
    assert future.result() == 1


def test_the_first_error_stays(future: asyncio.Future[int]) -> None:
    set_exception(future, ValueError("first"))
    set_exception(future, ValueError("second"))
    set_result(future, 2)
    with pytest.raises(ValueError, match="first"):
        future.result()


def test_a_cancelled_future_stays_cancelled(future: asyncio.Future[int]) -> None:
    future.cancel()
    set_result(future, 1)
    set_exception(future, ValueError("late"))
    assert future.cancelled()


def test_an_error_that_nobody_waits_for_is_not_logged() -> None:
    loop, logged = asyncio.new_event_loop(), list[object]()
    loop.set_exception_handler(lambda _, context: logged.append(context))
    future: asyncio.Future[int] = loop.create_future()
    set_exception(future, ValueError("nobody waits"))
    future.cancel()  # the engines cancel every future that nobody waits for any more
    del future
    loop.close()
    assert not logged
