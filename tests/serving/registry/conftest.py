"""Fixtures of the models's tests: a store, and registries whose loading is a stub."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.networks import publish_tiny
from support.stubs.registry import BYTES, NAME, OTHER, Observers, Start, StubEngine

from app.serving.model import LoadFailure, Model
from app.serving.models import Models
from app.settings import Settings
from app.store import Store, rollout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a store with three versions of the default model tiny-gan, and two of tiny-cgan.

    The newest version of each model is active. The version before was active earlier, so it is resident too.
    """
    for name in (NAME, NAME, NAME, OTHER, OTHER):
        publish_tiny(tmp_path / "store", name)
    for name, previous in ((NAME, 2), (OTHER, 1)):
        (tmp_path / "store" / name / rollout.FILE).write_text(json.dumps({"previous": previous}))
    return tmp_path / "store"


@pytest.fixture
async def start(folder: Path) -> AsyncIterator[Start]:
    """Yield a function that creates a models. Loading fails for ``damaged`` versions, and may wait for ``hold``."""
    registries: list[Models] = []

    def start(
        damaged: tuple[tuple[str, int], ...] = (), hold: threading.Event | None = None, **settings: Any
    ) -> Models:
        models = Models(Settings(store=folder, device="cpu", **settings), Observers())  # type: ignore[arg-type]

        def load(name: str, number: int, in_background: bool = False) -> Model | LoadFailure:
            assert not hold or not in_background or hold.wait(30)
            if (name, number) in damaged:
                return LoadFailure(name, number, "damaged")
            engine: Any = StubEngine(models.observers.for_version(name, number))
            card = Store(folder).card(name, number)
            return Model(card, None, engine, bytes=BYTES)  # type: ignore[arg-type]

        models.loader.load = load  # type: ignore[method-assign]
        registries.append(models)
        return models

    yield start
    for models in registries:
        await models.close()
