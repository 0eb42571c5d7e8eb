"""Feedback on answers: ``/v1/feedback``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.operation import Operation, Request
from app.api.request_body import read_json
from app.api.responses import ERROR_RESPONSES, json_response
from app.engine.fair_queue import current_caller
from app.errors import BadValue, NotFound, quote_value
from app.records.captured import FeedbackRequest, measure
from app.records.database import FeedbackFigure
from app.store import StoreError


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
    caller = current_caller.get()

    def store() -> None:
        answers = capture.database.find(body.request_id)
        if not answers or answers[0].key != caller:
            problem = "it was not captured with this key, is deleted, or not stored yet, which takes up to a second"
            raise NotFound(f"there is no request {quote_value(body.request_id)}: {problem}", "request_id")
        measured = {}
        for each in answers:
            labels = request.models.store.card(each.model, each.version).labels
            measured[each.version] = measure(each, body, labels or [])
        capture.database.add_feedback(body, measured)

    try:
        await asyncio.to_thread(store)
    except StoreError as error:  # the version was deleted
        raise NotFound(str(error), "request_id") from error
    return json_response(FeedbackStored(stored=True))


async def get_feedback(request: Request) -> Response:
    """Get the figures of each version according to the feedback, at most a few seconds old."""
    return json_response({"data": feedback(request)})


def feedback(request: Request) -> Sequence[FeedbackFigure]:
    """Return the figures of all versions; none if the service captures no requests."""
    return request.service.capture.figures if request.service.capture else ()


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
