"""Triton's statistics: the counts and times of each model, computed from the same metrics as ``/metrics``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.open_inference.metadata import model_operation
from app.api.open_inference.paths import FAILURES, TAG, card_in_path
from app.api.operation import Operation, Request
from app.api.responses import json_response
from app.observability.metrics import SUCCESS, Totals
from app.store import Card
from app.tasks import TASKS


class Duration(TypedDict):
    count: int
    ns: int
    """total duration in nanoseconds"""


NotMeasured = Annotated[Duration, Field(description="always 0, because it is not measured")]


class InferenceStatistics(TypedDict):
    success: Duration
    """answered requests"""
    fail: Duration
    """failed requests, including those that were rejected or cancelled"""
    queue: Duration
    """images, series, texts, and parts of large requests that left the queue"""
    compute_infer: Duration
    """batches, or rounds of the engine for text models"""
    compute_input: NotMeasured
    compute_output: NotMeasured
    cache_hit: Duration
    """always 0, because there is no cache"""
    cache_miss: Duration
    """always 0, because there is no cache"""


class ModelStatistics(TypedDict):
    name: str
    version: str
    last_inference: int
    """time of the last batch in milliseconds since 1970; 0 if there was none"""
    inference_count: int
    """number of rows, or of texts for text models"""
    execution_count: int
    """number of batches"""
    inference_stats: InferenceStatistics
    response_stats: dict[str, Any]
    batch_stats: list[Any]
    memory_usage: list[Any]


class StatisticsResponse(TypedDict):
    model_stats: list[ModelStatistics]


async def list_model_statistics(request: Request) -> Response:
    """Get the number of requests, the waiting time and the computing time of each version in memory."""
    return await _respond(request, [model.card for model in request.models.loaded()])


async def get_model_statistics(request: Request) -> Response:
    """Get the number of requests, the waiting time and the computing time of a version of a model.

    Without a version in the path, the response has all versions of the model that are in memory.
    """
    card = await card_in_path(request)
    cards = [card]
    if "version" not in request.path_params and "@" not in request.path_params["name"]:
        cards = [model.card for model in request.models.loaded() if model.card.name == card.name] or cards
    return await _respond(request, cards)


async def _respond(request: Request, cards: list[Card]) -> Response:
    totals = await request.service.metrics.totals()
    return json_response(StatisticsResponse(model_stats=[_statistics(card, totals) for card in cards]))


def _statistics(card: Card, totals: Totals) -> ModelStatistics:
    """Return the statistics of a version."""
    failures = {result for *_, result in totals} - {SUCCESS, ""}

    def total(metric: str, results: Collection[str] = ("",)) -> float:
        keys = [(f"quartet_{metric}", card.name, str(card.version), result) for result in results]
        return sum(totals.get(key, 0.0) for key in keys)

    def duration(metric: str, results: Collection[str] = ("",)) -> Duration:
        seconds = total(f"{metric}_seconds_sum", results)
        return {"count": int(total(f"{metric}_seconds_count", results)), "ns": round(seconds * 1e9)}

    queue, compute, none = duration("queue"), duration("compute"), duration("", ())
    return {
        "name": card.name,
        "version": str(card.version),
        "last_inference": int(total("last_batch_timestamp_seconds") * 1000),
        "inference_count": queue["count"] if TASKS[card.task].engine == "text" else int(total("batch_rows_sum")),
        "execution_count": compute["count"],
        "inference_stats": {
            "success": duration("version_request", [SUCCESS]),
            "fail": duration("version_request", failures),
            "queue": queue,
            "compute_infer": compute,
            "compute_input": none,
            "compute_output": none,
            "cache_hit": none,
            "cache_miss": none,
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [],
    }


OPERATIONS = [
    Operation(
        "GET",
        "/v2/models/stats",
        list_model_statistics,
        TAG,
        "Get the statistics of all models",
        StatisticsResponse,
        "Statistics of each version in memory",
        errors=FAILURES,
    ),
    model_operation(
        "/stats", get_model_statistics, "Get the statistics of a model", StatisticsResponse, "Statistics of the model"
    ),
]
