"""The service: ``python -m app.main``, or ``uvicorn --factory app.main:create_app``. Nothing is built at import."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
import uvicorn
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.responses import RedirectResponse

from app.api import failures, health, models, tasks
from app.api.bodies import Buffered
from app.api.heads import BoundedHttp
from app.engine.registry import Registry
from app.settings import Settings
from app.telemetry import Metrics, Telemetry

DESCRIPTION = """Four kinds of trained networks behind one service: a CNN classifies images, an RNN continues text,
an LSTM forecasts series, a GAN draws images. Every example below works as it stands: *Try it out*, *Execute*.
To send a picture of your own to `/v1/images/classify`, choose `multipart/form-data` above its body."""


def cores() -> int:
    """The cores that this process may run on, which can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application. Raises SettingsError for a setting, device or store that cannot be used."""
    settings = settings or Settings()
    torch.set_num_threads(settings.threads or cores())
    metrics = Metrics()
    registry = Registry(settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(registry.load)
        yield
        await registry.close()

    app = FastAPIOffline(
        title="Quartet", description=DESCRIPTION, version="0.1.0", lifespan=lifespan, redirect_slashes=False
    )
    failures.install(app)
    app.add_middleware(Buffered, limit=settings.max_buffered_bytes)
    app.add_middleware(Telemetry, metrics=metrics, failure=failures.response)
    app.include_router(tasks.router(registry, settings))
    app.include_router(models.router(registry))
    app.include_router(health.router(registry, metrics))

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    return app


class Server(uvicorn.Server):
    """Prints its address once it answers there: with port 0 nobody could know it before."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers[:1]:
            host, port = server.sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"Quartet serves on http://{host}:{port} - try it at http://{host}:{port}/docs", flush=True)


def create_server(settings: Settings) -> Server:
    """The application behind its sockets. Raises as ``create_app`` does."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.stop_seconds),
        http=BoundedHttp,
    )
    return Server(config)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn drains, then raises the signal again: exit with 0
        signal.signal(number, lambda *_: None)
    settings = Settings()
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    create_server(settings).run()


if __name__ == "__main__":
    main()
