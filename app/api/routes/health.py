"""Whether the service answers: for whoever restarts it, routes to it, or draws its figures."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from app.observability.metrics import Metrics
from app.serving.model_cache import VersionState
from app.serving.registry import Registry


def router(registry: Registry, metrics: Metrics) -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.get("/health/live")
    async def live() -> Response:
        """503 when the engine has hung for twice `QUARTET_LIVENESS_TIMEOUT_SECONDS`: restart the process."""
        silent = registry.executor.oldest_job_seconds()
        return _status(
            {"live": silent < 2 * registry.settings.liveness_timeout_seconds, "seconds_unanswered": round(silent, 3)}
        )

    @routes.get("/health/ready")
    async def ready() -> Response:
        """503 when requests should go elsewhere; lists what is not served, and why."""
        problems = registry.problems()
        broken = [
            {"model": entry.name, "version": entry.version, "reason": entry.reason} for entry in registry.failures
        ]
        models = sorted(version.label for version in registry.versions() if version.state is VersionState.READY)
        return _status({"ready": not problems, "problems": problems, "models": models, "broken": broken})

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        registry.report()
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return routes


def _status(content: dict[str, Any]) -> Response:
    good = next(iter(content.values()))
    return Response(orjson.dumps(content), 200 if good else 503, media_type="application/json")
