"""What the tests share: tiny real networks in a store of their own, and the real service on a free port."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from app import store
from app.main import create_app
from app.networks import KINDS, build
from app.server.uvicorn_server import ListeningServer
from app.settings import Settings
from app.tasks.image_generation import ImageSampler, LatentBatch
from app.tasks.text_generation import Continuation, TextGenerator

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "tests" / "images"
TEST: dict[str, Any] = {"port": 0, "threads": 1, "shutdown_grace_seconds": 1}
VOCABULARY = [*"\n abcdefghij", store.UNKNOWN_CHARACTER]

TINY: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "tiny-cnn": ("classify", "lenet", {"conv": [2, 3], "hidden": [8, 8]}, {"labels": list("abcdefghij")}),
    "tiny-rnn": (
        "continue",
        "character-rnn",
        {"vocabulary": len(VOCABULARY), "hidden": 8},
        {"vocabulary": VOCABULARY},
    ),
    "tiny-lstm": ("forecast", "series-lstm", {"window": 10, "hidden": 4}, {"residuals": [0.1, 0.2, 0.3]}),
    "tiny-gan": ("sample", "gan-generator", {"latent": 4, "hidden": [8]}, {}),
}
# a second network of a task, for the tests that want it
CONDITIONAL: dict[str, Any] = {"latent": 4, "classes": 3, "widths": [4, 3, 2]}
FORECASTER: dict[str, Any] = {"context": 24, "patch": 12, "horizon": 6, "hidden": 8, "lags": 2, "members": 2}
MORE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "tiny-cgan": ("sample", "conditional-generator", CONDITIONAL, {"labels": ["x", "y", "z"]}),
    "tiny-forecaster": ("forecast", "forecaster", FORECASTER, {}),
}


def tiny_card(name: str, task: str, kind: str, sizes: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A card as the trainings write it."""
    return {
        "name": name,
        "task": task,
        "title": "untrained, for tests",
        "kind": kind,
        "sizes": asdict(KINDS[kind][1](**sizes)),
        "inputs": [],
        "outputs": [],
        "metrics": {},
        "data": {},
        "seed": 0,
        "command": "none",
        "commit": "none",
        "versions": {"torch": torch.__version__},
        "hardware": "none",
        "minutes": 0.0,
        "created": "2026-01-01T00:00:00+00:00",
        "notes": "",
        **more,
    }


def publish_tiny(folder: Path, name: str) -> store.Version:
    """One more version of a tiny network, with weights of its own."""
    task, kind, sizes, more = {**TINY, **MORE}[name]
    torch.manual_seed(len(list(store.all_versions(folder))) if folder.exists() else 0)
    return store.publish(folder, tiny_card(name, task, kind, sizes, more), build(kind, sizes).state_dict())


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


Serve = Callable[..., AbstractContextManager[httpx.Client]]
Prepare = Callable[[], Awaitable[None]]


@contextmanager
def serving(settings: Settings, prepare: Prepare | None = None) -> Iterator[httpx.Client]:
    """The service as it is, behind a real socket, and a client of it. ``prepare`` runs on its event loop first."""
    server = ListeningServer(create_app(settings), settings)
    started = threading.Event()
    startup = server.startup

    async def told(*arguments: Any, **named: Any) -> None:
        if prepare:
            await prepare()
        await startup(*arguments, **named)
        started.set()

    server.startup = told  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(60), "the service did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the service did not stop"


@pytest.fixture
def serve(tiny_store: Path) -> Serve:
    """Start the service on the tiny store, with other settings where given."""
    return lambda prepare=None, **settings: serving(Settings(**{"store": tiny_store, **TEST, **settings}), prepare)


class Held:
    """A generator that computes nothing from ``armed`` until ``release``; ``batches``: the rows it was given then."""

    def __init__(self) -> None:
        self.armed, self.entered, self.release = threading.Event(), threading.Event(), threading.Event()
        self.batches: list[int] = []

    def hold(self, rows: int) -> None:
        if self.armed.is_set():
            self.batches.append(rows)
            self.entered.set()
            assert self.release.wait(60)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Every generator of a service that is started from now on. It is let go at the end, whatever the test did."""
    held, predict = Held(), ImageSampler.predict

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


def address(client: httpx.Client) -> str:
    """``host:port`` of a service, for other clients."""
    return client.base_url.netloc.decode()


def image_bytes(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (32, 32), **options: Any) -> bytes:
    """A picture of noise in a format and mode."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 256, (*reversed(size), channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.squeeze(-1) if channels == 1 else noise, mode=None).convert(mode).save(file, kind, **options)
    return file.getvalue()
