"""The executor of the engines."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from app.engine.executor import Executor


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    """Yield an executor with one thread."""
    executor = Executor("test")
    yield executor
    executor.close()
