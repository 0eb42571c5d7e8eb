"""Fixtures: stores of tiny networks, and the real service on a free port."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from support.markers import starts_processes
from support.networks import SECOND_NETWORKS, TINY, publish_tiny
from support.service import ROOT, TEST, HeldGenerator, Serve, serving
from support.stand_in_device import stand_in  # noqa: F401 - torch must know the device before the first gradient
from support.waiting import locked

from app.cli import models
from app.settings import Settings
from app.tasks.image_generation import ImageSampler, LatentBatch
from app.tasks.text_generation import Continuation, TextGenerator

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


TRAINING_FILES = (
    "test_training.py",
    "test_own_data.py",
    "test_photos.py",
    "test_forecaster_finetune.py",
    "test_new_architecture.py",
    "test_known_columns.py",
    "test_backtest_report.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start processes or a browser, and tests that train. ``make quick`` deselects them."""
    for item in items:
        if starts_processes(item) or "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")
        if item.path.name in TRAINING_FILES:
            item.add_marker("trainings")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no speed and recalibrate batch norms with few images: both take long and change no other result."""
    monkeypatch.setattr("app.tasks.speed.SECONDS", 0.0)
    monkeypatch.setattr("training.loops.gan.RECALIBRATION_BATCHES", 2)
    monkeypatch.setattr("training.loops.gan.PREVIEW_BATCHES", 2)


@pytest.fixture(autouse=True)
def _no_log_of_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the readings of tests out of training/LOG.md."""
    monkeypatch.setattr("training.readings.LOG", tmp_path / "LOG.md")


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """Undo what trainings set for their whole process, because JSON with subnormal numbers is tested too."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def tiny_store(tmp_path: Path) -> Path:
    """Create a store with one tiny network for each task."""
    for name in TINY:
        publish_tiny(tmp_path / "store", name)
    return tmp_path / "store"


@pytest.fixture
def serve(tiny_store: Path) -> Serve:
    """Return a function that starts the service on the tiny store with the given settings."""
    return lambda prepare=None, **settings: serving(Settings(**{"store": tiny_store, **TEST, **settings}), prepare)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldGenerator]:
    """Make the image generators of services started later wait on an event. It is set at the end of the test."""
    held, predict = HeldGenerator(), ImageSampler.predict

    def predict_when_released(self: ImageSampler, items: Sequence[LatentBatch]) -> list[np.ndarray]:
        held.hold(sum(map(len, items)))
        return predict(self, items)

    monkeypatch.setattr(ImageSampler, "predict", predict_when_released)
    yield held
    held.release.set()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each text step take at least 5 ms, so that a text of 4,000 characters outlasts a deadline of the test.

    This applies to services started later, which need ``inline_seconds=0``.
    """
    step = TextGenerator.step

    def slow_step(self: TextGenerator, texts: Sequence[Continuation]) -> None:
        time.sleep(0.005)
        step(self, texts)

    monkeypatch.setattr(TextGenerator, "step", slow_step)


@pytest.fixture(scope="session")
def shipped() -> Iterator[httpx.Client]:
    """Start the service with the networks of this repository."""
    with serving(Settings(store=ROOT / "models_store", **TEST)) as client:
        yield client


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def exported(shared_folder: Path) -> Callable[[str], Path]:
    """Export a network of this repository, such as ``mnist-gan-1.onnx``, and return the file.

    Each file is exported once, because some take many seconds.
    """
    folder = shared_folder / "exported"
    folder.mkdir(exist_ok=True)

    def exported(file: str) -> Path:
        path = folder / file
        with locked(folder / f"{file}.lock"):
            if not path.exists():
                name, _, number = path.stem.rpartition("-")
                version, store = f"{name}@{number}", str(ROOT / "models_store")
                assert models.main(["export", "--store", store, version, str(path), f"--{path.suffix[1:]}"]) == 0
        return path

    return exported


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Start the service with one tiny network for each task, a conditional generator and a second forecaster."""
    folder = tmp_path_factory.mktemp("tiny") / "store"
    for name in (*TINY, *SECOND_NETWORKS):
        publish_tiny(folder, name)
    with serving(Settings(store=folder, **TEST)) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium under Playwright, or skip the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()
