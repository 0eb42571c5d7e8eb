"""Engines and observers that only record what a models does with them, and helpers of the models's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from app.engine.circuit_breaker import CircuitBreaker
from app.errors import QuartetError
from app.serving.model import Model
from app.serving.model_cache import ModelLoading
from app.serving.models import Models
from app.tasks import GENERATE_IMAGES

NAME, OTHER, CNN = "tiny-gan", "tiny-cgan", "tiny-cnn"
BYTES = 10  # size of each version
# The versions that a models of the test store keeps in memory
RESIDENT = ["tiny-cgan@1", "tiny-cgan@2", "tiny-gan@2", "tiny-gan@3"]
Start = Callable[..., Models]


class StubEngine:
    """A stub of an engine whose row counts a test sets."""

    def __init__(self, observer: Any) -> None:
        self.observer = observer
        self.row_counts = (0, 0)
        self.circuit_breaker = CircuitBreaker()
        self.closed_within: float | None = None

    async def close(self, seconds: float) -> None:
        self.closed_within = seconds


class Observer:
    """A stub of the observer of one version."""

    def __init__(self, observers: Observers, key: tuple[str, int]) -> None:
        self.key = key
        self._observers = observers

    def on_memory(self, size: int) -> None: ...

    def on_queue(self, queued: int, running: int) -> None:
        self._observers.loads.append((*self.key, queued, running))


class Observers:
    """An observer factory that records the reports."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, int, int, int]] = []
        self.versions: list[tuple[int, int, frozenset[Any]]] = []
        self._known: dict[tuple[str, int], Observer] = {}

    def for_version(self, model: str, version: int) -> Observer:
        return self._known.setdefault((model, version), Observer(self, (model, version)))

    def on_versions(self, ready: int, failed: int, known: frozenset[Any]) -> None:
        self.versions.append((ready, failed, known))


def ids(models: Models) -> list[str]:
    return [model.id for model in models.loaded()]


def resolved(models: Models, model: str | None = None, task: Any = GENERATE_IMAGES, request_id: str = "") -> str:
    return models.resolve(task, model, request_id).id


def rejection(function: Callable[..., Any], *arguments: Any) -> tuple[type[QuartetError], str, str | None]:
    with pytest.raises(QuartetError) as raised:
        function(*arguments)
    return type(raised.value), raised.value.message, raised.value.param


async def scanned(models: Models) -> None:
    """Scan the store, and wait until its versions are loaded."""
    await models.watcher.refresh()
    while models._reconcile_task and not models._reconcile_task.done():
        await models._reconcile_task


async def load_on_demand(models: Models, model: str) -> None:
    """Request a version that is not in memory, and wait for it."""
    with pytest.raises(ModelLoading) as loading:
        models.resolve(GENERATE_IMAGES, model)
    assert isinstance(await loading.value.task, Model)
