"""The service: ``python -m app.main``, or ``uvicorn --factory app.main:create_app``. Nothing is built at import."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from limits.aio.storage import Storage
from packaging.version import Version

from app.api import errors
from app.api.kserve import timeseries
from app.api.middleware.api_keys import close_storage, document_security, limit_storage, with_api_keys
from app.api.middleware.cors import cors
from app.api.middleware.fast_routes import FastRoutes
from app.api.open_inference import routes
from app.api.openai import completions
from app.api.request import BodyLimit
from app.api.routes import admin, health, models, page, tasks
from app.observability.access_log import AccessLog, JsonFormatter
from app.observability.metrics import Metrics, shared_metrics
from app.observability.middleware import RequestTelemetry
from app.observability.tracing import create_tracer
from app.server.supervisor import Supervisor, can_fork, handles_sighup
from app.server.system import available_memory, cores, raise_file_limit, single_arena, trim_heap
from app.server.uvicorn_server import (
    ListeningServer,
    Watchdog,
    WorkerServer,
    announce,
    exit_if_orphaned,
    exit_on_signal,
    listen_at,
    tls_context,
)
from app.serving.loader import check_store, find_device
from app.serving.registry import Registry
from app.settings import Settings, SettingsError
from app.store import rollout

MOST_WORKERS = 16
OLDEST_TORCH = "2.6"  # as pyproject.toml asks for
REPORT_SECONDS = 0.5
DESCRIPTION = """Four kinds of trained networks behind one service: a CNN classifies images, an RNN continues text,
an LSTM forecasts series, a GAN draws images. Every example below works as it stands: *Try it out*, *Execute*.
To send a picture of your own to `/v1/images/classify`, choose `multipart/form-data` above its body."""


def create_app(settings: Settings | None = None, shared: Storage | None = None) -> FastAPI:
    """The application. ``shared``: where the requests of keys are counted, if other workers do it too.

    Raises SettingsError for a setting, device or store that cannot be used.
    """
    settings = settings or Settings()
    check_torch()
    torch.set_num_threads(settings.threads or cores())
    metrics, log = Metrics(create_tracer(settings.otlp_endpoint)), AccessLog(settings.log_format)
    registry, counted = Registry(settings, metrics), shared or limit_storage(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await registry.load()
        gc.collect()
        trim_heap()
        gc.freeze()  # what was loaded stays: looking through it again and again would hold requests up
        gc.set_threshold(10_000, 20, 20)  # what a request leaves behind has no cycles, as a rule
        beside = [asyncio.create_task(registry.watch()), asyncio.create_task(_report(registry))]
        yield
        for task in beside:
            task.cancel()
        await registry.close()
        if counted:
            await close_storage(counted)
        log.write()
        if metrics.tracer:
            await asyncio.to_thread(metrics.tracer.close)

    app = FastAPIOffline(
        title="Quartet", description=DESCRIPTION, version="0.1.0", lifespan=lifespan, redirect_slashes=False
    )
    app.state.registry = registry
    errors.install(app)
    busy = tasks.router(registry, settings)
    app.include_router(busy)
    others = [completions.router(registry, settings), timeseries.router(registry, settings)]
    for protocol in others:
        app.include_router(protocol)
    app.include_router(models.router(registry))
    key = admin.admin_key(settings)
    tensors = routes.router(registry, settings, metrics, key)
    app.include_router(tensors)
    app.include_router(health.router(registry, metrics))
    if key:
        app.include_router(admin.router(registry, settings, key))
    app.include_router(page.router())

    if settings.keys_file:
        document_security(app)

    # Before all else that FastAPI and Starlette put around their routes: what is busy does not pass through it.
    busiest = [route for each in (busy, *others) for route in each.routes]
    direct = FastRoutes(app.build_middleware_stack(), busiest, named=routes.busy_routes(tensors))
    buffered = BodyLimit(direct, settings.max_buffered_bytes, spooled={admin.SPOOLED} if key else ())
    inside = with_api_keys(buffered, settings, counted, errors.error_response, metrics.on_rate_limited)
    app.middleware_stack = telemetry = RequestTelemetry(cors(inside, settings), metrics, log, errors.error_response)
    app.state.refused = telemetry.on_refused
    return app


def check_torch() -> None:
    """Raises SettingsError for a torch that is older than what is tested: it would fail later and say less."""
    if Version(torch.__version__) < Version(OLDEST_TORCH):
        raise SettingsError(f"torch is {torch.__version__}, and {OLDEST_TORCH} is the oldest that serves here")


async def _report(registry: Registry) -> None:
    """Bring this worker's gauges up to date, for whichever worker is asked for all of them."""
    while True:
        registry.report()
        await asyncio.sleep(REPORT_SECONDS)


def create_server(settings: Settings) -> ListeningServer:
    """The application behind its sockets. Raises as ``create_app`` does."""
    return ListeningServer(create_app(settings), settings)


def plan_workers(settings: Settings) -> tuple[int, int]:
    """How many workers, and how many threads each computes with: all cores are used, and none twice.

    As many workers as cores, where memory allows: the networks here are small, and two threads on one product give
    less than two products at once (``make bench``). A GPU is one process's own. Raises SettingsError.
    """
    check_store(settings.store)
    device, available = find_device(settings.device), available_memory()
    alone = device.type == "cuda" or not can_fork()
    if alone and settings.workers > 1:
        why = "a GPU is one process's own" if can_fork() else "this system cannot share them"
        raise SettingsError(f"QUARTET_WORKERS is {settings.workers}: {why}; allowed are 0, 1")
    room = (
        cores()
        if available is None
        else int(available / 2 // rollout.worker_bytes(settings.store, settings.model_bytes))
    )
    workers = settings.workers or (1 if alone else max(1, min(cores() // max(settings.threads, 1), room, MOST_WORKERS)))
    return workers, settings.threads or max(1, cores() // workers)


def main() -> None:
    settings = Settings()
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if settings.log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonFormatter())
    workers, threads = plan_workers(settings)
    raise_file_limit()
    single_arena()
    if workers > 1:
        sys.exit(run_supervisor(settings, workers, threads))
    for number in (signal.SIGTERM, signal.SIGINT):  # before it serves; and uvicorn, once drained, raises it again
        signal.signal(number, exit_on_signal)
    if hears := handles_sighup():
        signal.signal(signal.SIGHUP, exit_on_signal)
    server = create_server(settings.model_copy(update={"threads": threads}))

    def hang_up(*_: object) -> None:
        if not server.should_exit:  # of a terminal that is closed, more than one may come
            signal.raise_signal(signal.SIGTERM)

    if hears:
        signal.signal(signal.SIGHUP, hang_up)
    server.watchdog = Watchdog(settings.liveness_timeout_seconds)
    run_server(server)


def run_server(server: ListeningServer | WorkerServer) -> None:
    """Until it is told to stop."""
    server.run()
    if (
        server.registry.executor.busy or server.registry.parse_executor.busy
    ):  # its thread would be waited for, and hangs
        os._exit(0)


def run_supervisor(settings: Settings, workers: int, threads: int) -> int:
    """Serve with several workers until told to stop. Gives the exit status. Raises SettingsError."""
    buffered, rows = settings.max_buffered_bytes, settings.queue_rows
    own = settings.model_copy(
        update={
            "threads": threads,
            "max_buffered_bytes": max(buffered // workers, min(buffered, settings.max_body_bytes)),  # one fits
            "queue_rows": max(1, rows // workers),
        }
    )
    tls_context(settings)
    listener, shared = listen_at(settings.host, settings.port), limit_storage(settings)
    try:
        figures = shared_metrics()
    except OSError as error:
        raise SettingsError(f"QUARTET_WORKERS is {workers}: they need a folder for their figures: {error}") from None
    with figures as forget:
        parent, seconds = (
            os.getpid(),
            2 * settings.shutdown_grace_seconds + 5,
        )  # for what runs, for the engines, and to spare

        def work(channel: socket.socket) -> None:
            exit_if_orphaned(parent, seconds)
            run_server(WorkerServer(create_app(own, shared), own, channel))

        return Supervisor(
            listener,
            work=work,
            count=workers,
            unready_after_seconds=settings.unready_after_seconds,
            liveness_timeout_seconds=settings.liveness_timeout_seconds,
            shutdown_grace_seconds=seconds,
            ready=lambda: announce(listener, settings),
            died=forget,
        ).run()


if __name__ == "__main__":
    main()
