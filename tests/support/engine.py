"""Helpers for tests of the engines: an observer that records its calls, a fake network, and fake sleeps."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest


class RecordingObserver:
    """An observer that records all reports of an engine."""

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

    def on_memory(self, size: int) -> None: ...

    def on_queue(self, queued: int, running: int) -> None: ...


class Activations:
    """A fake network that counts its activations in memory, as tensors in a network's frames would occupy memory.

    It fails on more than one item, and on negative items. ``alive`` has, for each call, the activations of earlier
    calls that are still in memory.
    """

    def __init__(self) -> None:
        self.alive: list[int] = []
        self._references: list[weakref.ref[set[int]]] = []

    def predict(self, items: Sequence[int]) -> list[int]:
        self.alive.append(sum(reference() is not None for reference in self._references))
        activations = set(items)
        self._references.append(weakref.ref(activations))
        if len(items) > 1 or min(items) < 0:
            raise MemoryError
        return [2 * item for item in items]


class Gate:
    """A fake network that waits until ``open`` is set, and then doubles numbers. It fails on negative numbers."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []

    def predict(self, items: Sequence[int]) -> list[int]:
        self.entered.set()
        assert self.open.wait(10)
        self.batches.append(list(items))
        if min(items) < 0:
            raise ValueError("negative")
        return [2 * item for item in items]

    async def busy(self) -> None:
        """Wait until the network is computing."""
        assert await asyncio.to_thread(self.entered.wait, 10)


def record_sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make ``asyncio.sleep`` only yield to the event loop. Return a list to which each call appends its seconds.

    The services of other tests run in other threads of the same process. Their calls sleep as usual.
    """
    durations, sleep, thread = list[float](), asyncio.sleep, threading.get_ident()

    async def record(seconds: float) -> None:
        if threading.get_ident() == thread:
            durations.append(seconds)
            seconds = 0
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", record)
    return durations


def one_millisecond(items: Sequence[Any]) -> float:
    """Return 0.001 seconds as the expected duration of any batch."""
    return 0.001


async def start_tasks(*coroutines: Any) -> list[asyncio.Task[Any]]:
    """Start one task for each coroutine. In this order, each task runs until it first waits."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    return tasks
