"""Triton's statistics: the counts and times of each model, computed from the same metrics as ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.deadline import set_deadline
from app.api.open_inference.paths import ModelPath, add_routes, model_in_path
from app.api.open_inference.responses import FAILURES, StatisticsResponse
from app.api.openapi import WITH_TIMEOUT
from app.api.responses import json_response, success_response
from app.observability.metrics import SUCCESS, Metrics, Totals
from app.serving.model import Model
from app.serving.models import Models
from app.tasks import TASKS


def router(models: Models, metrics: Metrics) -> APIRouter:
    """Return the routes ``/v2/models/stats`` and ``/v2/models/{name}/stats``.

    Add these routes before the routes of ``metadata``, which would take "stats" as the name of a model.
    """
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=FAILURES)

    @routes.get(
        "/models/stats",
        operation_id="list_model_statistics",
        summary="Get the statistics of all models",
        responses=success_response(StatisticsResponse, description="Statistics of each version in memory"),
    )
    async def all_statistics() -> Response:
        """Get the number of requests, the waiting time and the computing time of each version in memory."""
        totals = await metrics.totals(models.settings.request_seconds)
        return json_response({"model_stats": [_statistics(model, totals) for model in models.loaded()]})

    @add_routes(
        routes,
        "GET",
        "/stats",
        operation_id="get_model_statistics",
        summary="Get the statistics of a model",
        openapi_extra=WITH_TIMEOUT,
        responses=success_response(StatisticsResponse, description="Statistics of the model"),
    )
    async def statistics(request: Request, name: ModelPath) -> Response:
        """Get the number of requests, the waiting time and the computing time of a version of a model.

        Without a version in the path, the response has all versions of the model that are in memory.
        """
        deadline = set_deadline(request, models.settings.request_seconds)
        model = await model_in_path(models, request, name, deadline)
        versions = [model]
        if "version" not in request.path_params and "@" not in name:
            versions = [each for each in models.loaded() if each.card.name == name] or versions
        totals = await metrics.totals(models.settings.request_seconds)
        return json_response({"model_stats": [_statistics(each, totals) for each in versions]})

    return routes


def _statistics(model: Model, totals: Totals) -> dict[str, Any]:
    """Return the statistics of a version.

    ``success`` and ``fail`` count requests, with their durations. ``queue`` counts the items that were taken from the
    queue: images, series, texts, and parts of large requests. ``compute_infer`` counts batches, or rounds of the engine
    for text models. ``inference_count`` counts rows, or texts for text models. ``last_inference`` is the time of the
    last batch, in milliseconds since 1970. ``compute_input`` and ``compute_output`` are not measured and always 0.
    """
    key = model.card.name, str(model.card.version)
    own = {(metric, result): total for (metric, *version, result), total in totals.items() if tuple(version) == key}

    def total(metric: str) -> float:
        return own.get((f"quartet_{metric}", ""), 0.0)

    def requests(are_counted: Callable[[str], bool]) -> dict[str, int]:
        ends = (
            sum(value for (metric, result), value in own.items() if metric == name and are_counted(result))
            for name in ("quartet_version_request_seconds_count", "quartet_version_request_seconds_sum")
        )
        return _duration(*ends)

    queue = _duration(total("queue_seconds_count"), total("queue_seconds_sum"))
    compute = _duration(total("compute_seconds_count"), total("compute_seconds_sum"))
    unmeasured = ("compute_input", "compute_output", "cache_hit", "cache_miss")
    return {
        "name": model.card.name,
        "version": str(model.card.version),
        "last_inference": int(total("last_batch_timestamp_seconds") * 1000),
        "inference_count": queue["count"] if TASKS[model.card.task].engine == "text" else int(total("batch_rows_sum")),
        "execution_count": compute["count"],
        "inference_stats": {
            "success": requests(SUCCESS.__eq__),
            "fail": requests(SUCCESS.__ne__),
            "queue": queue,
            "compute_infer": compute,
            **{name: _duration(0, 0) for name in unmeasured},
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [],
    }


def _duration(count: float, seconds: float) -> dict[str, int]:
    return {"count": int(count), "ns": round(seconds * 1e9)}
