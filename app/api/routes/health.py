"""Health checks for process managers and load balancers, and metrics for Prometheus."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, Response

from app.api.openapi import json_content
from app.api.responses import LiveStatus, ReadyStatus, success_response
from app.observability.metrics import Metrics
from app.serving.models import Models
from app.serving.plan import State


def router(models: Models, metrics: Metrics) -> APIRouter:
    """Return the routes ``/health/live``, ``/health/ready`` and ``/metrics``."""
    routes = APIRouter(tags=["Health"])

    @routes.get(
        "/health/live",
        operation_id="check_live",
        summary="Check that the process is alive",
        responses=status_responses(LiveStatus, "The process is alive", "The compute thread hangs"),
    )
    async def check_live() -> Response:
        """Respond with status 503 if the compute thread has hung for twice `QUARTET_LIVENESS_TIMEOUT_SECONDS`.

        In this case, the process should be restarted.
        """
        seconds = models.executor.stalled_seconds()
        live = seconds < 2 * models.settings.liveness_timeout_seconds
        return status_response({"live": live, "seconds_since_progress": round(seconds, 3)}, live)

    @routes.get(
        "/health/ready",
        operation_id="check_ready",
        summary="Check that the service is ready for requests",
        responses=status_responses(ReadyStatus, "The service is ready", "The service is not ready"),
    )
    async def check_ready() -> Response:
        """List the versions in memory, and the versions that could not be loaded.

        The status is 503 if the service is not ready.
        """
        problems = models.problems()
        failed = [{"model": entry.name, "version": entry.version, "reason": entry.reason} for entry in models.failures]
        ready = sorted(version.label for version in models.versions() if version.state is State.READY)
        content = {"ready": not problems, "problems": problems, "models": ready, "failed": failed}
        return status_response(content, not problems)

    @routes.get(
        "/metrics",
        operation_id="get_metrics",
        summary="Get metrics for Prometheus",
        response_class=PlainTextResponse,
        response_description="Metrics in Prometheus' text format",
    )
    async def get_metrics() -> Response:
        """Get counters, gauges and histograms of all workers in Prometheus' text format."""
        models.report()
        content = await metrics.render(models.settings.request_seconds)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return routes


def status_responses(model: type[BaseModel], good: str, bad: str) -> dict[int | str, dict[str, Any]]:
    """Return the argument ``responses`` of a route for a health check. ``good`` and ``bad`` describe the responses."""
    return {**success_response(model, description=good), 503: {"content": json_content(model), "description": bad}}


def status_response(content: dict[str, Any], healthy: bool) -> Response:
    return Response(orjson.dumps(content), 200 if healthy else 503, media_type="application/json")
