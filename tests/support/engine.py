"""Helpers for tests of the engines: an observer that records its calls, and a fake network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any


class RecordingObserver:
    """An observer that records the reports of an engine."""

    key = ("m", 1)

    def __init__(self) -> None:
        self.batches: list[tuple[int, float]] = []  # rows and seconds
        self.completed: list[Any] = []
        self.dequeued: list[Any] = []
        self.first_token_seconds: list[float] = []
        self.inter_token_seconds: list[float] = []
        self.rejections: list[str] = []
        self.failures: list[Exception] = []

    def on_dequeued(self, members: Sequence[Any]) -> None:
        self.dequeued += [(member.rows, member.started_at - member.queued_at) for member in members]

    def on_batch(self, rows: int, seconds: float) -> None:
        self.batches.append((rows, seconds))

    def on_completed(self, members: Sequence[Any]) -> None:
        self.completed += members

    def on_first_token(self, member: Any, seconds: float) -> None:
        self.first_token_seconds.append(seconds)

    def on_inter_token(self, seconds: float) -> None:
        self.inter_token_seconds.append(seconds)

    def on_rejected(self, reason: str) -> None:
        self.rejections.append(reason)

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)

    def on_memory(self, size: int) -> None: ...

    def on_queue(self, queued: int, running: int) -> None: ...


class Gate:
    """A fake network that waits until ``open`` is set, and then doubles numbers. It fails on negative numbers."""

    def __init__(self, is_open: bool = False) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        if is_open:
            self.open.set()

    def predict(self, items: Sequence[int]) -> list[int]:
        self.entered.set()
        assert self.open.wait(60)
        self.batches.append(list(items))
        if min(items) < 0:
            raise ValueError("negative")
        return [2 * item for item in items]

    async def busy(self) -> None:
        """Wait until the network is computing."""
        assert await asyncio.to_thread(self.entered.wait, 60)


async def start_tasks(*coroutines: Any) -> list[asyncio.Task[Any]]:
    """Start one task for each coroutine. In this order, each task runs until it first waits."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    return tasks
