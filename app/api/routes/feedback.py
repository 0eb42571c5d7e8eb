"""Feedback on answers: ``/v1/feedback``."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import asdict
from typing import Annotated, cast

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.operation import Operation, Request
from app.api.request_body import RequestBody, read_json
from app.api.responses import ERROR_RESPONSES, json_response
from app.engine.fair_queue import current_caller
from app.errors import BadValue, NotFound, NotReady, quote_value
from app.records.captured import Truth, measure
from app.store import StoreError

Value = Annotated[float, Field(ge=-1e150, le=1e150)]


class FeedbackRequest(RequestBody):
    """Exactly one of `label`, `values`, `accepted` and `text`, as the task of the request needs."""

    request_id: str = Field(max_length=200)
    """the `x-request-id` of the answer"""
    item: int = Field(0, ge=0)
    """which image, text or series of the answer, from 0"""
    label: str | None = Field(None, max_length=1000)
    """the right label of an image"""
    values: list[Value | None] | None = Field(None, min_length=1, max_length=10_000)
    """the actual values of a series, from `first_step` of its forecast; null: not known yet"""
    first_step: int = Field(0, ge=0)
    accepted: bool | None = None
    """whether the text was used as it was"""
    text: str | None = Field(None, max_length=100_000)
    """the corrected text"""


class FeedbackFigure(TypedDict):
    model: str
    version: int
    name: str
    """`accuracy` and `confidence` of images, which should be equal; `mase` and `coverage_95` of forecasts; `accepted`
    of texts"""
    count: int
    mean: float
    interval: list[float]
    """95 % interval of the mean"""


class FeedbackFigures(TypedDict):
    data: list[FeedbackFigure]


class FeedbackStored(TypedDict):
    stored: bool


async def give_feedback(request: Request) -> Response:
    """State what was true, for a captured request.

    Later feedback on the same item and step replaces earlier feedback.
    """
    capture = request.service.capture
    assert capture  # without it, this operation does not exist
    body = await read_json(request, FeedbackRequest)
    given = [name for name in ("label", "values", "accepted", "text") if getattr(body, name) is not None]
    if len(given) != 1:
        raise BadValue(f"the body has {' and '.join(given) or 'no truth'}; send one of label, values, accepted, text")
    truth = Truth(**body.model_dump(exclude={"request_id"}))

    caller = current_caller.get()

    def store() -> None:
        answers = capture.database.find(body.request_id)
        if not answers or answers[0].key != caller:
            problem = "it was not captured with this key, is deleted, or not stored yet, which takes up to a second"
            raise NotFound(f"there is no request {quote_value(body.request_id)}: {problem}", "request_id")
        measured = {}
        for each in answers:
            labels = request.models.store.card(each.model, each.version).labels
            measured[each.version] = measure(each, truth, labels or [])
        capture.database.add_feedback(body.request_id, truth, measured)

    try:
        await asyncio.to_thread(store)
    except StoreError as error:  # the version was deleted
        raise NotFound(str(error), "request_id") from error
    except (sqlite3.Error, OSError) as error:
        raise NotReady(f"the feedback cannot be stored now: {error}") from error
    return json_response(FeedbackStored(stored=True))


async def get_feedback(request: Request) -> Response:
    """Get the figures of each version according to the feedback, at most a few seconds old."""
    return json_response(FeedbackFigures(data=feedback(request)))


def feedback(request: Request) -> list[FeedbackFigure]:
    """Return the figures of all versions; none if the service captures no requests."""
    capture = request.service.capture
    return [cast(FeedbackFigure, asdict(figure)) for figure in (capture.figures if capture else [])]


OPERATIONS = [
    Operation(
        "POST",
        "/v1/feedback",
        give_feedback,
        "Feedback",
        "Give feedback",
        FeedbackStored,
        "The feedback is stored",
        body=FeedbackRequest,
        example={"request_id": "my-request-1", "label": "horse"},
        errors=ERROR_RESPONSES,
    ),
    Operation(
        "GET", "/v1/feedback", get_feedback, "Feedback", "Get figures", FeedbackFigures, "The figures of each version",
        errors=ERROR_RESPONSES,
    ),
]  # fmt: skip
