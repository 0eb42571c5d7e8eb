"""Run the service on a real socket in the test process, and run its command line."""

from __future__ import annotations

import asyncio
import threading
import types
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn.server

from app.cli import models
from app.limits import Limits
from app.main import create_app
from app.server.http_server import Server, bind
from app.server.worker_table import WorkerTable
from app.settings import Settings
from app.store.disk import Disk

ROOT = Path(__file__).parents[2]

IMAGES = ROOT / "tests" / "images"

# Services of tests stop quickly, and look often for feedback and batch jobs.
LIMITS = Limits(last_request_seconds=0.02, figures_seconds=0.05, drift_seconds=0.05, batch_poll_seconds=0.05)

TEST: dict[str, Any] = {"port": 0, "threads": 1, "shutdown_grace_seconds": 1, "limits": LIMITS}


def make_settings(**values: Any) -> Settings:
    """Return settings. ``values`` may also have names of constants in ``Limits``."""
    changed = {name: values.pop(name) for name in vars(LIMITS) if name in values}
    values["limits"] = replace(values.get("limits", LIMITS), **changed)
    return Settings(**values)


Serve = Callable[..., AbstractContextManager[httpx.Client]]

Prepare = Callable[[], Awaitable[None]]


def shorten_uvicorn_sleeps() -> None:
    """Make uvicorn check every 10 ms instead of 100 ms whether to stop, because tests stop several hundred services."""

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))

    module = types.ModuleType("asyncio")
    module.__dict__.update(vars(asyncio), sleep=sleep)
    uvicorn.server.asyncio = module  # type: ignore[attr-defined]


shorten_uvicorn_sleeps()


@contextmanager
def serving(settings: Settings, prepare: Prepare | None = None, disk: Disk | None = None) -> Iterator[httpx.Client]:
    """Start the service on a real socket and yield a client.

    ``prepare`` runs on the event loop of the service before startup. ``disk`` is the file system of the store.
    """
    listener = bind(settings.host, settings.port)
    server = Server(create_app(settings, disk=disk), settings, listener, WorkerTable(1), on_ready=listener.listen)
    started = threading.Event()
    startup = server.startup

    async def prepare_and_start(*arguments: Any, **named: Any) -> None:
        if prepare:
            await prepare()
        await startup(*arguments, **named)
        started.set()

    server.startup = prepare_and_start  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(60), "the service did not start"
        port = listener.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the service did not stop"


def address(client: httpx.Client) -> str:
    """Return the address ``host:port`` of a client's service."""
    return client.base_url.netloc.decode()


def run_models_command(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run ``python -m app.models``; return its exit status, standard output and standard error."""
    try:
        status = models.main([arguments[0], "--store", str(folder), *arguments[1:]])
    except SystemExit as exit_error:  # raised by argparse
        status = int(exit_error.code or 0)
    return status, *capsys.readouterr()
