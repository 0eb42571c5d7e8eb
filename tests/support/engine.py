"""An observer that records, and helpers for tests of the engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any


class RecordingObserver:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.rejections = 0
        self.failures: list[Exception] = []
        self.queue_seconds: list[float] = []
        self.completed_batches: list[list[Any]] = []
        self.first_token_seconds: list[float] = []
        self.inter_token_seconds: list[float] = []

    def on_dequeued(self, members: Sequence[Any]) -> None:
        self.queue_seconds += [member.started_at - member.queued_at for member in members]

    def on_batch(self, rows: int, seconds: float) -> None:
        self.batches.append(rows)

    def on_completed(self, members: Sequence[Any]) -> None:
        self.completed_batches.append(list(members))

    def on_first_token(self, member: Any, seconds: float) -> None:
        self.first_token_seconds.append(seconds)

    def on_inter_token(self, seconds: float) -> None:
        self.inter_token_seconds.append(seconds)

    def on_rejected(self, reason: str) -> None:
        self.rejections += 1

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)

    def on_loaded(self, size: int) -> None: ...

    def on_load(self, queued: int, running: int) -> None: ...


def one_millisecond(items: Sequence[Any]) -> float:
    """How long a batch should take."""
    return 0.001


async def start_tasks(*coroutines: Any) -> list[asyncio.Task[Any]]:
    """Run each up to its first wait, in order."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    return tasks
