"""Build the application, and serve it with ``quartet serve``.

Importing this module does not build the application.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the modules below import torch
    from app.server.startup import prepare_process

    prepare_process()

import asyncio
import gc
import sys
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache, lru_cache, partial
from importlib import import_module
from pkgutil import walk_packages

import orjson
import torch
from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from limits.aio.storage import Storage
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import api
from app.api.admin_key import admin_key
from app.api.batch_jobs import run_batches
from app.api.errors import error_response
from app.api.middleware.api_keys import ApiKeys, api_keys, close_storage, limit_storage
from app.api.middleware.body_memory import BodyMemoryLimit
from app.api.middleware.cors import cors
from app.api.middleware.trusted_host import host_check
from app.api.openapi import build_document
from app.api.operation import Operation, Router, Service, unknown_path
from app.api.shadow import ShadowTraffic
from app.observability.access_log import AccessLog
from app.observability.logs import configure_logging
from app.observability.metrics import Metrics
from app.observability.middleware import RequestTelemetry
from app.observability.shared_metrics import SharedMetrics
from app.observability.tracing import create_tracer
from app.records.batches import Batches
from app.records.capture import open_records
from app.server.process import run_service
from app.server.system import cores
from app.serving.device import limit_threads, trim_heap
from app.serving.models import Models
from app.serving.preload import Preloaded
from app.settings import Settings
from app.store.disk import Disk

# Imported before the workers are forked, so that they share its memory.
MODULES = [import_module(module.name) for module in walk_packages(api.__path__, "app.api.")]
NO_TELEMETRY = {"tracing": False, "metrics": False, "logs": False}  # ``RequestTelemetry`` replaces FastAPI's telemetry
REPORT_SECONDS = 0.5
DOCUMENTS = 8  # encoded documents that are kept, one for each path of a proxy
SUMMARY = "Trained PyTorch networks for images, text and series behind one HTTP service"
DESCRIPTION = """Four kinds of networks: a CNN classifies images, an RNN continues text, an LSTM forecasts series, and a
GAN generates images.

To send a request from this page, open an operation, click *Try it out*, then *Execute*. The examples use the models
that come with Quartet. To classify an image, choose a file first.

Every error has the form `{"error": {"message", "type", "param", "code"}}`. Under `/v2`, the form is
`{"error": message}`."""
TAGS = [
    {"name": "Tasks", "description": "Quartet's own endpoints: one for each task."},
    {"name": "Feedback", "description": "Which answers turned out to be right."},
    {"name": "OpenAI", "description": "Endpoints for OpenAI's clients."},
    {"name": "Batches", "description": "OpenAI's files and batch jobs."},
    {"name": "KServe time series", "description": "KServe's time series protocol."},
    {"name": "Models", "description": "The models that are served."},
    {
        "name": "Open Inference Protocol",
        "description": "The protocol of KServe and Triton (V2). Every network takes and returns tensors. All paths of "
        "a model also exist with `/versions/{version}` after its name.",
    },
    {"name": "Health", "description": "Health checks and metrics."},
    {
        "name": "Administration",
        "description": "Manage the versions in the store. Requests need the admin key as a bearer token.",
    },
]


def create_app(
    settings: Settings | None = None,
    counters: Storage | None = None,
    preloaded: Preloaded | None = None,
    shared: SharedMetrics | None = None,
    disk: Disk | None = None,
) -> FastAPI:
    """Build the application.

    Workers share ``counters``, ``preloaded`` and ``shared``. ``disk`` is the file system of the store. Other servers
    than that of ``quartet serve`` lack its limits on slow connections and its graceful shutdown.

    Raises:
        SettingsError: a setting, the device or the store cannot be used.
    """
    settings = settings or Settings()
    torch.set_num_threads(settings.threads or cores())
    metrics = Metrics(create_tracer(settings.otlp_endpoint), settings.workers, shared)
    log = AccessLog(settings.log_format)
    models, counters = Models(settings, metrics, preloaded, disk=disk), counters or limit_storage(settings)
    key, keys = admin_key(settings), api_keys(settings, counters, metrics.on_rate_limited)
    records, capture = open_records(settings, metrics.on_captured)
    shadows, batches = ShadowTraffic(models, capture) if capture else None, Batches(records) if records else None
    metrics.capture = capture
    parts = {"Administration": key, "Feedback": capture, "Batches": batches}
    tags = [tag for tag in TAGS if parts.get(tag["name"], True)]
    app: FastAPI = FastAPIOffline(
        title="Quartet",
        summary=SUMMARY,
        description=DESCRIPTION,
        version="0.1.0",
        openapi_tags=tags,
        lifespan=lambda _: _lifespan(app, service, counters, log, keys),
        redirect_slashes=False,
        docs_url=None,  # see app/api/routes/page.py
        telemetry=NO_TELEMETRY,
    )
    app.state.models = models
    operations = all_operations(key, [*(tag["name"] for tag in tags), ""])
    app.openapi = cache(lambda: build_document(app, operations, settings))  # type: ignore[method-assign]  # as documented
    app.add_exception_handler(HTTPException, _missing_file)
    document = lru_cache(DOCUMENTS)(partial(_encoded_document, app))
    service: Service = Service(models, metrics, key, capture, shadows, batches, app.version, document)
    router = Router(service, operations, app.routes, app.build_middleware_stack(), host_check(settings), keys)
    spooled = {operation.path for operation in operations if operation.spools_body}
    limited = BodyMemoryLimit(router, settings.max_buffered_bytes, spooled=spooled, limits=settings.limits)
    # Errors of RequestTelemetry do not pass ``limited``, but pages of allowed origins should be able to read them.
    telemetry = RequestTelemetry(
        cors(limited, settings), metrics, log, lambda error, path: cors(error_response(error, path), settings)
    )
    app.middleware_stack = telemetry
    app.state.on_rejected = telemetry.on_rejected
    return app


def all_operations(key: str | None, tags: Sequence[str]) -> list[Operation]:
    """Return the rows of the HTTP API that have one of ``tags``, in their order.

    Each module of ``app.api`` may have ``OPERATIONS``. Without an admin key, there are no operations that need it.
    """
    operations = [row for module in MODULES for row in getattr(module, "OPERATIONS", ()) if key or not row.is_admin]
    return sorted((row for row in operations if row.tag in tags), key=lambda operation: tags.index(operation.tag))


def _encoded_document(app: FastAPI, root_path: str) -> bytes:
    """Return the OpenAPI document as JSON. It states the path under which a proxy serves the application."""
    return orjson.dumps({**app.openapi(), **({"servers": [{"url": root_path}]} if root_path else {})})


async def _missing_file(request: Request, error: Exception) -> Response:
    """Answer a request for a file of the documentation that does not exist."""
    return error_response(unknown_path(request.scope), request.scope["path"])


@asynccontextmanager
async def _lifespan(
    app: FastAPI, service: Service, counters: Storage | None, log: AccessLog, keys: ApiKeys | None
) -> AsyncIterator[None]:
    """Load the models at the start, watch the files while the application runs, and close everything at the end."""
    models, capture, batches = service.models, service.capture, service.batches
    limit_threads()  # the event loop computes small batches, and may run in another thread than ``create_app``
    await models.start()
    gc.collect()
    trim_heap()
    gc.freeze()  # the garbage collector skips the loaded models from now on; checking them would delay requests
    gc.set_threshold(10_000, 20, 20)  # collect rarely, because requests leave few reference cycles
    endless = [models.watch(), models.recovery.watch(), _report(models)]
    endless += [keys.ring.watch(models.disk, models.settings.limits.key_check_seconds)] if keys else []
    endless += [run_batches(app, models, batches)] if batches else []
    endless += [service.shadows.run()] if service.shadows else []
    background = [asyncio.create_task(coroutine) for coroutine in endless]
    yield
    for task in background:
        task.cancel()
    if batches:
        await asyncio.to_thread(batches.release)
    await models.close()
    if counters:
        await close_storage(counters)
    if capture:
        await asyncio.to_thread(capture.close)
    if batches:
        batches.database.close()
    await asyncio.to_thread(log.close)
    if tracer := service.metrics.tracer:
        await asyncio.to_thread(tracer.close)


async def _report(models: Models) -> None:
    """Update this worker's metrics at intervals, because any worker may answer /metrics for all workers."""
    while True:
        models.report()
        await asyncio.sleep(REPORT_SECONDS)


def main() -> None:
    """Run the service with the settings of the environment until it is stopped."""
    settings = Settings()
    configure_logging(settings.log_level, settings.log_format)
    sys.exit(run_service(settings, create_app))


if __name__ == "__main__":
    ArgumentParser(
        prog="quartet serve",
        usage="QUARTET_PORT=8111 quartet serve",
        description="Serve the networks of the model store over HTTP. The command has no options. Its settings are "
        "environment variables; docs/reference/settings.md describes them.",
    ).parse_args()
    main()
