"""What the tests share: tiny real networks in a store of their own, and the real service on a free port."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.markers import starts_processes
from support.networks import MORE, TINY, publish_tiny
from support.service import ROOT, TEST, HeldGenerator, Serve, serving

from app.settings import Settings
from app.tasks.image_generation import ImageSampler, LatentBatch
from app.tasks.text_generation import Continuation, TextGenerator

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


TRAINING_FILES = ("test_training.py", "test_own_data.py", "test_forecaster_finetune.py", "test_new_architecture.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes or a browser, and those that train: ``make quick`` leaves them out."""
    for item in items:
        if starts_processes(item) or "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")
        if item.path.name in TRAINING_FILES:
            item.add_marker("trainings")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast a network is, is of no interest in tests."""
    monkeypatch.setattr("training.evaluation.speed.SECONDS", 0.0)


@pytest.fixture
def tiny_store(tmp_path: Path) -> Path:
    """A store with one tiny network for each task."""
    for name in TINY:
        publish_tiny(tmp_path / "store", name)
    return tmp_path / "store"


@pytest.fixture
def serve(tiny_store: Path) -> Serve:
    """Start the service on the tiny store, with other settings where given."""
    return lambda prepare=None, **settings: serving(Settings(**{"store": tiny_store, **TEST, **settings}), prepare)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldGenerator]:
    """Every generator of a service that is started from now on. It is let go at the end, whatever the test did."""
    held, predict = HeldGenerator(), ImageSampler.predict

    def holding(self: ImageSampler, items: Sequence[LatentBatch]) -> list[np.ndarray]:
        held.hold(sum(map(len, items)))
        return predict(self, items)

    monkeypatch.setattr(ImageSampler, "predict", holding)
    yield held
    held.release.set()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes five milliseconds: a text of 4,000 characters does not end while a test waits for it.

    Of a service that is started from now on, with ``inline_seconds=0``.
    """
    step = TextGenerator.step

    def slowly(self: TextGenerator, texts: Sequence[Continuation]) -> None:
        time.sleep(0.005)
        step(self, texts)

    monkeypatch.setattr(TextGenerator, "step", slowly)


@pytest.fixture(scope="session")
def shipped() -> Iterator[httpx.Client]:
    """The service with the networks of this repository."""
    with serving(Settings(store=ROOT / "models_store", **TEST)) as client:
        yield client


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The service with one tiny network for each task, and a generator that draws by label."""
    folder = tmp_path_factory.mktemp("tiny") / "store"
    for name in (*TINY, *MORE):
        publish_tiny(folder, name)
    with serving(Settings(store=folder, **TEST)) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven with Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven with Playwright")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()
