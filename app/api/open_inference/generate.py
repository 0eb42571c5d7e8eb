"""Triton's generate extension. A JSON request without tensors gets one text, as a whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import openapi
from app.api.deadline import set_deadline
from app.api.inference import record_version, resolve_model, run_inference
from app.api.open_inference.decode import MAX_ID_LENGTH
from app.api.open_inference.paths import TextModelPath, add_routes, model_in_path
from app.api.open_inference.responses import FAILURES, GenerateParameters, GenerateRequest, GenerateResponse
from app.api.open_inference.tensors import TEXT_PARAMETERS, earlier_deadline, model_parameters
from app.api.openapi import request_body
from app.api.request_body import EXTRA_COMMAS, BodyReader, max_json_bytes, read_object, validate, with_limits
from app.api.responses import json_response, stream_response, success_response
from app.api.routes import generate_text
from app.api.routes.generate_text import TextInference
from app.api.sse import event
from app.errors import BadValue, quote_value
from app.serving.model import Model
from app.serving.models import Models
from app.settings import Settings
from app.tasks import GENERATE_TEXT
from app.tasks.text_generation import Continuation, TextGenerator

NATIVE_NAMES = {"text_input": "prompt", "max_tokens": "max_characters"}  # names of these fields in /v1/text/continue


class GenerateInference(TextInference):
    """Generates one text for a request to ``generate`` or ``generate_stream``."""

    stream_end = b""  # the protocol has no end marker

    def __init__(
        self,
        model: Model[TextGenerator],
        body: generate_text.GenerateTextRequest,
        request_id: str,
        streamed: bool,
        deadline: float,
    ) -> None:
        super().__init__(model, body)
        self.streamed = streamed
        self.deadline = deadline
        self.head = {"model_name": model.card.name, "model_version": str(model.card.version)}
        if request_id:
            self.head["id"] = request_id

    def engine_deadline(self, deadline: float) -> float:
        return self.deadline

    def respond(self, outputs: Sequence[Continuation]) -> Response:
        (text,) = outputs
        return json_response({**self.head, "text_output": text.text, **_end_fields(text)})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield an event for each new part of the text."""
        async with aclosing(generate_text.deltas(self.model, self.texts)) as steps:
            async for (delta,) in steps:
                end_fields = _end_fields(self.texts[0]) if delta.finished else {}
                yield event({**self.head, "text_output": delta.text, **end_fields})


def _end_fields(text: Continuation) -> dict[str, Any]:
    return {"finish_reason": text.finish_reason, "seed": text.seed}


def _take_id(body: dict[str, Any]) -> str:
    """Remove the request id from the body and return it, or return an empty text without an id. Raises BadValue."""
    request_id = body.pop("id", None)
    if request_id is None:
        return ""
    if not isinstance(request_id, str) or len(request_id) > MAX_ID_LENGTH:
        raise BadValue(
            f"id is {quote_value(request_id)}; it should be a string of at most {MAX_ID_LENGTH:,} characters", "id"
        )
    return request_id


def _fields(body: dict[str, Any], streamed: bool) -> dict[str, Any]:
    """Return the fields of a body and of its ``parameters`` in one dictionary, without ``stream``. Raises BadValue."""
    if "text_input" not in body:
        raise BadValue("text_input is missing", "text_input")
    parameters = body.pop("parameters", None)
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise BadValue(f"parameters is {quote_value(parameters)}; it should be an object", "parameters")
    for name in parameters:
        if name in body:
            raise BadValue(f"{quote_value(name)} was sent twice: beside text_input and in parameters", name)
    fields = {**body, **parameters}
    if (stream := fields.pop("stream", streamed)) is not streamed:
        other = "generate" if streamed else "generate_stream"
        allowed = f"use {other} instead" if isinstance(stream, bool) else "it should be a boolean"
        raise BadValue(f"stream is {quote_value(stream)}; {allowed}", "stream")
    if "max_tokens" in fields and "max_characters" in fields:
        raise BadValue("max_tokens is another name of max_characters; send one of them", "max_tokens")
    return fields


def _native_body(
    fields: dict[str, Any], text_request: type[generate_text.GenerateTextRequest]
) -> generate_text.GenerateTextRequest:
    """Return the fields as a body of ``/v1/text/continue``.

    Raises BadValue, whose message has the field names that the client sent.
    """
    parameters = {NATIVE_NAMES["max_tokens"] if name == "max_tokens" else name: fields[name] for name in fields}
    prompt = parameters.pop("text_input")
    try:
        return validate({"prompt": prompt, **model_parameters(parameters, TEXT_PARAMETERS)}, text_request)
    except BadValue as error:
        sent_name = next((name for name in fields if NATIVE_NAMES.get(name) == error.param), None)
        if sent_name is None or error.param is None:
            raise
        raise BadValue(error.message.replace(error.param, sent_name, 1), sent_name) from None


def _documented_body(settings: Settings) -> type[GenerateRequest]:
    """Return the Pydantic class of the body for the OpenAPI document. Requests are validated as native bodies."""
    at_most = {"le": settings.max_characters}
    return with_limits(
        GenerateRequest,
        text_input={"max_length": settings.max_prompt_characters},
        parameters=with_limits(GenerateParameters, max_characters=at_most, max_tokens=at_most),
    )


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the routes ``generate`` and ``generate_stream`` for texts. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=FAILURES)
    text_request = generate_text.request_model(settings)
    body_model = _documented_body(settings)
    limit = max_json_bytes(settings.max_body_bytes, generate_text.BYTES_PER_CHARACTER * settings.max_prompt_characters)
    reader = BodyReader(limit, settings.body_seconds, models.parse_executor)
    max_commas = settings.max_prompt_characters + EXTRA_COMMAS

    async def run(request: Request, name: str, streamed: bool) -> Response:
        deadline = set_deadline(request, settings.request_seconds)
        body = await read_object(request, reader, max_commas)
        version = await model_in_path(models, request, name, deadline)
        model = await resolve_model(request, models, GENERATE_TEXT, version.id, deadline)  # rejects other tasks
        record_version(model)
        request_id = _take_id(body)
        fields = _fields(body, streamed)
        earlier = earlier_deadline(fields, deadline)
        inference = GenerateInference(model, _native_body(fields, text_request), request_id, streamed, earlier)
        model.engine.admit(1)
        return await run_inference(request, models, inference, deadline)

    @add_routes(
        routes,
        "POST",
        "/generate",
        operation_id="generate",
        summary="Generate text",
        openapi_extra=request_body(body_model, openapi.V2_GENERATE_EXAMPLE),
        responses=success_response(GenerateResponse, description="The continuation of the prompt"),
    )
    async def generate_whole(request: Request, name: TextModelPath) -> Response:
        """Continue a prompt. `text_output` is the continuation without the prompt."""
        return await run(request, name, streamed=False)

    @add_routes(
        routes,
        "POST",
        "/generate_stream",
        operation_id="generate_stream",
        summary="Generate text as a stream",
        openapi_extra=request_body(body_model, openapi.V2_GENERATE_EXAMPLE),
        response_class=Response,
        responses={
            200: {
                "content": stream_response(
                    "Events with the fields of a `GenerateResponse`; only the last one has `finish_reason` and `seed`"
                ),
                "description": "Server-sent events",
            }
        },
    )
    async def generate_stream(request: Request, name: TextModelPath) -> Response:
        """Continue a prompt, and send the characters as server-sent events while the model generates them.

        The last event of the text has a `finish_reason`. There is no `[DONE]` event.
        """
        return await run(request, name, streamed=True)

    return routes
