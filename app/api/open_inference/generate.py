"""Triton's generate extension. A JSON request without tensors gets one text, as a whole or as a stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NotRequired

from pydantic import Field, RootModel
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.inference import Call, Protocol, TextDelta, resolve, run_job
from app.api.open_inference.decode import MAX_ID_LENGTH
from app.api.open_inference.paths import FAILURES, TAG, card_in_path, model_path
from app.api.open_inference.tensors import model_parameters, shorten_deadline
from app.api.operation import Operation, Request
from app.api.request_body import Described, RequestBody, limited, read_json, validate
from app.api.responses import stream_response
from app.api.routes.continue_text import SamplingFields
from app.errors import BadValue, quote_value
from app.limits import Limits
from app.store import Card
from app.tasks import CONTINUE
from app.tasks.text_generation import Continuation, ContinueAnswer, ContinueJob

ALIAS = "max_tokens"  # of ``max_characters``


class AnyFields(RootModel[dict[str, Any]]):
    """A body before its parameters have been found."""


class GenerateParameters(SamplingFields):
    """Sampling parameters."""

    # The schema has no default, because clients that send all defaults would send both names.
    max_tokens: int = Field(default_factory=lambda: 200, ge=1, json_schema_extra=limited("max_characters"))
    """alias of `max_characters`. Send only one of them."""


class GenerateFields(GenerateParameters, RequestBody):
    """The fields of a body and of its ``parameters``, except ``id`` and ``stream``."""

    text_input: str


class GenerateRequest(Described):
    id: str = Field("", max_length=MAX_ID_LENGTH)
    """your own id for the request, which the response repeats"""
    text_input: str = Field(json_schema_extra=limited("max_prompt_characters", "maxLength"))
    """the prompt"""
    parameters: GenerateParameters = Field(default_factory=lambda: GenerateParameters.model_validate({}))
    """sampling parameters. Each of them may also be sent beside `text_input` instead."""


class GenerateResponse(TypedDict):
    """One text. In a stream, only the last event has a ``finish_reason`` and a ``seed``."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    """only if the request has one"""
    text_output: str
    """the continuation, without the prompt"""
    finish_reason: NotRequired[Literal["length", "stop"]]
    seed: NotRequired[int]


def encode(call: Call[None], job: ContinueJob, answer: ContinueAnswer) -> GenerateResponse:
    (text,) = answer.texts
    return _content(call.model.card, job, text.text, text)


def encode_delta(call: Call[None], job: ContinueJob, answer: ContinueAnswer, delta: TextDelta) -> GenerateResponse:
    return _content(call.model.card, job, delta.text, answer.texts[0] if delta.finished else None)


def _content(card: Card, job: ContinueJob, output: str, end: Continuation | None) -> GenerateResponse:
    content: Any = {"model_name": card.name, "model_version": str(card.version)}
    if job.request_id:
        content["id"] = job.request_id
    content["text_output"] = output
    if end:
        content |= {"finish_reason": end.finish_reason, "seed": end.seed}
    return content


PROTOCOL = Protocol(encode, encode_delta, stream_end=b"")  # the protocol has no end marker


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
    if ALIAS in fields and "max_characters" in fields:
        raise BadValue("max_tokens is another name of max_characters; send one of them", ALIAS)
    return fields


def decode(fields: dict[str, Any], limits: Limits) -> ContinueJob:
    """Return the job for the fields of a request. Raises BadValue."""
    own = {name: fields.pop(name) for name in ("text_input", ALIAS) if name in fields}
    body = validate({**own, **model_parameters(fields, PARAMETERS)}, GenerateFields)
    sampling, names = body.sampling(limits), {"prompt": "text_input"}
    if ALIAS in own:
        sampling["max_characters"], names["max_characters"] = body.max_tokens, ALIAS
    return ContinueJob([body.text_input], **sampling, names=names)


PARAMETERS = tuple(SamplingFields.model_fields)


async def _run(request: Request, streamed: bool) -> Response:
    limits = request.limits
    body = (await read_json(request, AnyFields)).root
    card = await card_in_path(request)
    model = await resolve(request, CONTINUE, f"{card.name}@{card.version}")
    request_id = _take_id(body)
    fields = _fields(body, streamed)
    shorten_deadline(request, fields)
    job = replace(decode(fields, limits), streamed=streamed, request_id=request_id)
    job.check(limits)
    model.engine.admit(job.rows)
    return await run_job(Call(request, None, model), job, PROTOCOL)


async def generate(request: Request) -> Response:
    """Continue a prompt. `text_output` is the continuation without the prompt."""
    return await _run(request, streamed=False)


async def generate_stream(request: Request) -> Response:
    """Continue a prompt, and send the characters as server-sent events while the model generates them.

    The last event of the text has a `finish_reason`. There is no `[DONE]` event.
    """
    return await _run(request, streamed=True)


_whole = Operation(
    "POST",
    "/v2/models/{name}/generate",
    generate,
    TAG,
    "Generate text",
    GenerateResponse,
    "The continuation of the prompt",
    body=GenerateRequest,
    example={"text_input": "ROMEO:", "parameters": {"max_characters": 200, "temperature": 0.8, "seed": 1}},
    parameters=model_path("shakespeare-rnn"),
    errors=FAILURES,
    versioned=True,
)
OPERATIONS = [
    _whole,
    replace(
        _whole,
        path="/v2/models/{name}/generate_stream",
        endpoint=generate_stream,
        summary="Generate text as a stream",
        response=None,
        answer="Server-sent events",
        other_answers=stream_response(
            "Events with the fields of a `GenerateResponse`; only the last one has `finish_reason` and `seed`"
        ),
    ),
]
