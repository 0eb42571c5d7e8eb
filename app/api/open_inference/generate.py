"""Triton's generate extension: texts without tensors, whole or as they are written."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import openapi
from app.api.deadline import Deadline, deadline, run_before_deadline
from app.api.inference import resolve_model
from app.api.open_inference.decode import LONGEST_ID
from app.api.open_inference.models import TEXT_PARAMETERS, earlier_deadline, model_parameters
from app.api.open_inference.paths import TextModel, add_routes, model_in_path
from app.api.request import EXTRA_COMMAS, BodyReader, json_response, max_json_bytes, read_object, validate
from app.api.routes import generate_text
from app.api.sse import STREAM, EventStream, event
from app.errors import BadValue, quote_value
from app.serving.loader import LoadedModel
from app.serving.registry import Registry
from app.settings import Settings
from app.tasks import GENERATE_TEXT
from app.tasks.text_generation import Continuation

BODY = {
    "type": "object",
    "required": ["text_input"],
    "properties": {
        "id": {"type": "string", "maxLength": LONGEST_ID},
        "text_input": {"type": "string"},
        "parameters": {"type": "object", "description": f"{', '.join(TEXT_PARAMETERS)}; also beside text_input"},
    },
}
MOST = "max_characters"  # which other servers of texts call max_tokens
NAMED = {"text_input": "prompt", "max_tokens": MOST}  # as the native endpoint has them
EXTRA = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": BODY, "example": openapi.V2_GENERATE_EXAMPLE}},
    }
}


def add(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    """``generate`` and ``generate_stream`` of every model of texts, with the limits of the settings."""
    prompts = generate_text.request_model(settings)
    limit = max_json_bytes(settings.max_body_bytes, generate_text.BYTES_PER_CHARACTER * settings.max_prompt_characters)
    reading = BodyReader(limit, settings.body_seconds, registry.parse_executor)
    most = settings.max_prompt_characters + EXTRA_COMMAS

    async def begun(
        request: Request, name: str, until: float, streamed: bool
    ) -> tuple[LoadedModel, Continuation, dict[str, Any], float]:
        """The text that is asked for, what stands in every answer, and until when. Raises as all reading does."""
        found = await read_object(request, reading, most)
        version = await model_in_path(registry, request, name, until)
        live = await resolve_model(
            request, registry, GENERATE_TEXT, version.id, until
        )  # refused when it is for another task
        told = {"model_name": live.card.name, "model_version": str(live.card.version)}
        if identity := _identity(found):
            told["id"] = identity
        given = _given(found, streamed)
        until = earlier_deadline(given, until)
        body = _checked(given, prompts)
        live.engine.admit(1)
        (text,), _ = await run_before_deadline(
            request, registry.parse_executor, len(body.prompt), generate_text.start_texts, live.predictor, body
        )
        return live, text, told, until

    @add_routes(routes, "POST", "/generate", openapi_extra=EXTRA)
    async def generate(request: Request, name: TextModel) -> Response:
        """Go on with a text; `text_output` is the continuation alone."""
        until = deadline(request, settings.request_seconds)
        live, text, told, until = await begun(request, name, until, streamed=False)
        async with Deadline(request, until):
            await live.engine.submit([text])
        return json_response({**told, "text_output": text.text, **_end(text)})

    @add_routes(routes, "POST", "/generate_stream", openapi_extra=EXTRA, responses={200: {"content": STREAM}})
    async def generate_stream(request: Request, name: TextModel) -> Response:
        """The same while it is written: server-sent events, each with what is new. None says that it was the last."""
        until = deadline(request, settings.request_seconds)
        live, text, told, until = await begun(request, name, until, streamed=True)
        return EventStream(request, _events(live, text, told), until, last=b"", x_model=live.id)


async def _events(live: LoadedModel, text: Continuation, told: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    async with aclosing(generate_text.deltas(live, [text])) as growth:
        async for (piece,) in growth:
            yield event({**told, "text_output": piece.text, **(_end(text) if piece.finished else {})})


def _end(text: Continuation) -> dict[str, Any]:
    return {"finish_reason": text.finish_reason, "seed": text.seed}


def _identity(found: dict[str, Any]) -> str:
    """What the caller calls the request, taken out of the body; perhaps nothing. Raises BadValue."""
    given = found.pop("id", "")
    if not isinstance(given, str) or len(given) > LONGEST_ID:
        raise BadValue(f"id is {quote_value(given)}; it should be a text of at most {LONGEST_ID:,} characters", "id")
    return given


def _given(found: dict[str, Any], streamed: bool) -> dict[str, Any]:
    """What a body says, wherever in it, but ``stream``. Raises BadValue."""
    if "text_input" not in found:
        raise BadValue("text_input is missing", "text_input")
    nested = found.pop("parameters", {})
    if not isinstance(nested, dict):
        raise BadValue(f"parameters is {quote_value(nested)}; it should be an object", "parameters")
    for name in nested:
        if name in found:
            raise BadValue(f"{quote_value(name)} came beside text_input and in parameters; send one of them", name)
    given = {**found, **nested}
    if (stream := given.pop("stream", streamed)) is not streamed:
        other = "generate" if streamed else "generate_stream"
        told = f"for that there is {other}" if isinstance(stream, bool) else "it should be a boolean"
        raise BadValue(f"stream is {quote_value(stream)}; {told}", "stream")
    if "max_tokens" in given and "max_characters" in given:
        raise BadValue("max_tokens is another name of max_characters; send one of them", "max_tokens")
    return given


def _checked(
    given: dict[str, Any], prompts: type[generate_text.GenerateTextRequest]
) -> generate_text.GenerateTextRequest:
    """That as a body of the native endpoint. Raises BadValue, which names fields as they came."""
    parameters = {MOST if name == "max_tokens" else name: value for name, value in given.items()}
    prompt = parameters.pop("text_input")
    try:
        return validate({"prompt": prompt, **model_parameters(parameters, TEXT_PARAMETERS)}, prompts)
    except BadValue as error:
        theirs = next((name for name in given if NAMED.get(name) == error.param), None)
        if theirs is None or error.param is None:
            raise
        raise BadValue(error.message.replace(error.param, theirs, 1), theirs) from None
