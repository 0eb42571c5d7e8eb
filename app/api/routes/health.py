"""Health checks for process managers and load balancers, and metrics for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.openapi import json_content
from app.api.operation import Endpoint, Operation, Request
from app.api.responses import json_response
from app.serving.plan import State

TAG = "Health"


class LiveStatus(TypedDict):
    live: bool
    seconds_since_progress: float
    """seconds since the compute thread started its current job; 0 if it is idle"""


class FailedModel(TypedDict):
    model: str
    version: int
    reason: str


class ReadyStatus(TypedDict):
    ready: bool
    problems: list[str]
    models: list[str]
    """versions in memory, as `name@version`"""
    failed: list[FailedModel]
    """versions that could not be loaded"""


def is_live(request: Request) -> bool:
    return request.models.executor.stalled_seconds() < 2 * request.limits.liveness_timeout_seconds


async def check_live(request: Request) -> Response:
    """Respond with status 503 if the compute thread has hung for a minute.

    In this case, the process should be restarted.
    """
    seconds, live = request.models.executor.stalled_seconds(), is_live(request)
    return status_response(LiveStatus(live=live, seconds_since_progress=round(seconds, 3)), live)


async def check_ready(request: Request) -> Response:
    """List the versions in memory, and the versions that could not be loaded.

    The status is 503 if the service is not ready.
    """
    models = request.models
    problems = models.problems()
    content: ReadyStatus = {
        "ready": not problems,
        "problems": problems,
        "models": sorted(version.label for version in models.versions() if version.state is State.READY),
        "failed": [
            {"model": entry.name, "version": entry.version, "reason": entry.reason} for entry in models.failures
        ],
    }
    return status_response(content, not problems)


async def get_metrics(request: Request) -> Response:
    """Get counters, gauges and histograms of all workers in Prometheus' text format."""
    request.models.report()
    content = await request.service.metrics.render()
    return Response(content, media_type=CONTENT_TYPE_LATEST)


def status_response(content: Any, healthy: bool) -> Response:
    return json_response(content, 200 if healthy else 503)


def status_operation(path: str, endpoint: Endpoint, tag: str, response: Any) -> Operation:
    """Return the operation of a health check, whose path ends in ``live`` or ``ready``."""
    summary, good, bad = {
        "live": ("Check that the process is alive", "The process is alive", "The compute thread hangs"),
        "ready": (
            "Check that the service is ready for requests",
            "The service is ready",
            "The service is not ready",
        ),
    }[path.rpartition("/")[2]]
    failure = {503: {"content": json_content(response), "description": bad}}
    return Operation("GET", path, endpoint, tag, summary, response, good, errors=failure, any_query=True)


OPERATIONS = [
    status_operation("/health/live", check_live, TAG, LiveStatus),
    status_operation("/health/ready", check_ready, TAG, ReadyStatus),
    Operation(
        "GET",
        "/metrics",
        get_metrics,
        TAG,
        "Get metrics for Prometheus",
        answer="Metrics in Prometheus' text format",
        other_answers={"text/plain": {"schema": {"type": "string"}}},
        any_query=True,
    ),
]
