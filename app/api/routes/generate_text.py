"""Go on with texts."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from app.api import openapi
from app.api.deadline import Deadline, deadline, run_before_deadline
from app.api.inference import resolve_model
from app.api.openapi import request_body
from app.api.request import (
    EXTRA_COMMAS,
    MAX_SEED,
    BodyReader,
    ModelName,
    RequestBody,
    Seed,
    json_response,
    max_json_bytes,
    read_json,
    with_limits,
)
from app.api.responses import TextResponse, success_response, with_model
from app.api.sse import STREAM, EventStream, event
from app.serving.loader import LoadedModel
from app.serving.registry import Registry
from app.settings import Settings
from app.tasks import GENERATE_TEXT
from app.tasks.text_generation import Continuation, TextGenerator
from app.tasks.token_sampling import LogProbs, SamplingOptions

BYTES_PER_CHARACTER = 12  # bytes that a character can take in JSON
LONGEST_STOP = 100  # characters
STOPS = 16

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


def _text_or_list(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


Stops = Annotated[
    Annotated[Stop, Tag("one")] | Annotated[list[Stop], Field(max_length=STOPS), Tag("many")],
    Discriminator(_text_or_list),
]


class GenerateTextRequest(RequestBody):
    prompt: str = Field("", description="what the text begins with; empty: from nothing")
    max_characters: int = Field(200, ge=1)
    temperature: float = Field(0.8, ge=0, le=10, description="0 takes the likeliest character each time")
    top_k: int | None = Field(None, ge=1, description="draw from so many of the likeliest characters only")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest that have this probability")
    stop: Stops | None = Field(None, description="where a text ends: a string or a list of them; left out of the text")
    seed: Seed | None = Field(None, description="the same seed gives the same text")
    n: int = Field(1, ge=1, description="how many continuations; number i has the seed + i")
    stream: bool = Field(False, description="send the text while it is written, as server-sent events")
    model: ModelName = None


def request_model(settings: Settings) -> type[GenerateTextRequest]:
    """The body, with the limits of the settings."""
    return with_limits(
        GenerateTextRequest,
        prompt={"max_length": settings.max_prompt_characters},
        max_characters={"le": settings.max_characters},
        n={"le": settings.max_texts},
    )


def start_texts(
    predictor: TextGenerator,
    body: GenerateTextRequest,
    extras: Callable[[], SamplingOptions] | None = None,
    notes: LogProbs | None = None,
) -> tuple[list[Continuation], list[str]]:
    """The texts that a request asks for, ready to be continued, and the characters that the network does not know.

    ``extras`` makes what each of them asks for besides; ``notes`` are to be taken of the prompt.
    """
    prompt, unknown = predictor.parse(body.prompt)
    prompt.notes = notes
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    first = secrets.randbelow(2**32) if body.seed is None else body.seed
    choice = body.max_characters, body.temperature, body.top_k, body.top_p, stop
    seeds = [(first + i) % MAX_SEED for i in range(body.n)]
    return [predictor.begin(prompt, *choice, seed, extras and extras()) for seed in seeds], unknown


class TextDelta(NamedTuple):
    """What is new of a text: number ``place`` of those that are followed has grown from character ``begin`` on."""

    place: int
    begin: int
    text: str
    finished: bool


def add(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    """``/v1/text/continue``, with the limits of the settings."""
    parsing, prompts = registry.parse_executor, request_model(settings)
    limit = max_json_bytes(settings.max_body_bytes, BYTES_PER_CHARACTER * settings.max_prompt_characters)
    reading = BodyReader(limit, settings.body_seconds, parsing)
    most = (
        settings.max_prompt_characters + STOPS * LONGEST_STOP + EXTRA_COMMAS
    )  # commas, also those of the stop strings

    @routes.post(
        "/text/continue",
        openapi_extra=request_body(prompts, openapi.GENERATE_TEXT_EXAMPLE),
        responses=success_response(TextResponse, STREAM),
    )
    async def continue_text(request: Request) -> Response:
        """Go on with a text, character by character. With `stream` the characters come as they are drawn."""
        until = deadline(request, settings.request_seconds)
        body = await read_json(request, prompts, reading, most)
        live = await resolve_model(request, registry, GENERATE_TEXT, body.model, until)
        live.engine.admit(body.n)
        texts, unknown = await run_before_deadline(
            request, parsing, len(body.prompt), start_texts, live.predictor, body
        )
        if body.stream:
            return EventStream(request, _events(live, texts, unknown), until, x_model=live.id)
        async with Deadline(request, until):
            done = await live.engine.submit(texts)
        results = [{"text": text.text, "finish_reason": text.finish_reason, "seed": text.seed} for text in done]
        return json_response(with_model(live, results=results, unknown_characters=unknown))


async def deltas(live: LoadedModel, texts: Sequence[Continuation]) -> AsyncGenerator[list[TextDelta], None]:
    """The new pieces of texts each time some have grown; the last one of each comes when it is finished, even empty."""
    shown, open_texts = [0] * len(texts), set(range(len(texts)))
    async with aclosing(live.stream(texts)) as growth:
        async for _ in growth:
            pieces = []
            for index in sorted(open_texts):
                text, finished = texts[index], texts[index].finished
                new = text.settled[shown[index] :]
                if finished:
                    open_texts.remove(index)
                if new or finished:
                    pieces.append(TextDelta(index, shown[index], new, finished))
                shown[index] += len(new)
            if pieces:
                yield pieces


async def _events(live: LoadedModel, texts: list[Continuation], unknown: list[str]) -> AsyncGenerator[bytes, None]:
    """An event for each text that has grown, and for each that is finished one that says why."""
    async with aclosing(deltas(live, texts)) as growth:
        async for pieces in growth:
            events = []
            for piece in pieces:
                told: dict[str, Any] = {"index": piece.place, "text": piece.text}
                if piece.finished:
                    text = texts[piece.place]
                    told |= {"finish_reason": text.finish_reason, "seed": text.seed, "unknown_characters": unknown}
                events.append(event(told))
            yield b"".join(events)
