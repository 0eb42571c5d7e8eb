"""Text generation: ``/v1/text/continue``."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from app.api import openapi
from app.api.inference import Inference, InferenceBody, JsonEndpoint
from app.api.openapi import request_body
from app.api.request_body import MAX_SEED, ModelName, Seed, text_or_list, with_limits
from app.api.responses import (
    ERROR_RESPONSES,
    TextResponse,
    json_response,
    stream_response,
    success_response,
    with_model,
)
from app.api.sse import event
from app.serving.model import Model
from app.serving.models import Models
from app.settings import Settings
from app.tasks import GENERATE_TEXT
from app.tasks.text_generation import Continuation, TextGenerator, memory_bytes
from app.tasks.token_sampling import LogProbs, SamplingOptions

BYTES_PER_CHARACTER = 12  # largest size of a character in JSON
MAX_STOP_LENGTH = 100  # characters
MAX_STOPS = 16

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[
    Annotated[Stop, Tag("one")] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("many")],
    Discriminator(text_or_list),
]


class GenerateTextRequest(InferenceBody):
    prompt: str = Field("", description="the text to continue; may be empty")
    max_characters: int = Field(200, ge=1, description="largest length of the continuation in characters")
    temperature: float = Field(
        0.8, ge=0, le=10, description="sampling temperature. 0 always takes the most probable character."
    )
    top_k: int | None = Field(None, ge=1, description="sample only from the k most probable characters")
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample only from the most probable characters whose probabilities add up to p"
    )
    stop: Stops | None = Field(None, description="strings that end the text. The returned text does not contain them.")
    seed: Seed | None = Field(None, description="random seed. The same seed gives the same text.")
    n: int = Field(1, ge=1, description="number of continuations. Continuation i uses the seed plus i.")
    stream: bool = Field(False, description="whether to send the text as server-sent events while it is generated")
    model: ModelName = None


def request_model(settings: Settings) -> type[GenerateTextRequest]:
    """Return the Pydantic class of the body, with the limits in ``settings``."""
    return with_limits(
        GenerateTextRequest,
        prompt={"max_length": settings.max_prompt_characters},
        max_characters={"le": settings.max_characters},
        n={"le": settings.max_texts},
    )


def start_texts(
    predictor: TextGenerator,
    body: GenerateTextRequest,
    make_options: Callable[[], SamplingOptions] | None = None,
    prompt_log_probs: LogProbs | None = None,
) -> tuple[list[Continuation], list[str]]:
    """Return two lists: the texts that a request asks for, and the characters of the prompt that are unknown.

    The texts are not yet submitted to the engine. ``make_options`` makes the sampling options of each text.
    ``prompt_log_probs`` records the log-probabilities of the prompt.
    """
    prompt, unknown = predictor.parse(body.prompt)
    prompt.log_probs = prompt_log_probs
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    first_seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    sampling = body.max_characters, body.temperature, body.top_k, body.top_p, stop
    seeds = [(first_seed + i) % MAX_SEED for i in range(body.n)]
    return [predictor.begin(prompt, *sampling, seed, make_options and make_options()) for seed in seeds], unknown


class TextDelta(NamedTuple):
    """New characters of the text ``text_index``, from position ``start``. ``finished`` is true for its last delta."""

    text_index: int
    start: int
    text: str
    finished: bool


async def deltas(model: Model, texts: Sequence[Continuation]) -> AsyncGenerator[list[TextDelta], None]:
    """Yield the new characters of ``texts`` as they are generated. The last ``TextDelta`` of a text may be empty."""
    sent, unfinished = [0] * len(texts), set(range(len(texts)))
    async with aclosing(model.stream(texts)) as steps:
        async for _ in steps:
            step_deltas = []
            for index in sorted(unfinished):
                text, finished = texts[index], texts[index].finished
                new = text.streamable_text[sent[index] :]
                if finished:
                    unfinished.remove(index)
                if new or finished:
                    step_deltas.append(TextDelta(index, sent[index], new, finished))
                sent[index] += len(new)
            if step_deltas:
                yield step_deltas


class TextInference(Inference[TextGenerator]):
    """Generates the texts of a request to ``/v1/text/continue``."""

    def __init__(self, model: Model[TextGenerator], body: GenerateTextRequest) -> None:
        super().__init__(model)
        self.rows, self.parse_size, self.streamed = body.n, len(body.prompt), body.stream
        self.body = body
        self.texts: list[Continuation] = []
        self.unknown: list[str] = []

    def parse(self) -> list[Continuation]:
        self.texts, self.unknown = start_texts(self.model.predictor, self.body)
        self.memory_bytes = memory_bytes(self.texts)
        return self.texts

    def respond(self, outputs: Sequence[Continuation]) -> Response:
        results = [{"text": text.text, "finish_reason": text.finish_reason, "seed": text.seed} for text in outputs]
        return json_response(with_model(self.model, results=results, unknown_characters=self.unknown))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield an event for each ``TextDelta``. The last event of a text contains its finish reason."""
        async with aclosing(deltas(self.model, self.texts)) as steps:
            async for step_deltas in steps:
                events = []
                for delta in step_deltas:
                    content: dict[str, Any] = {"index": delta.text_index, "text": delta.text}
                    if delta.finished:
                        text = self.texts[delta.text_index]
                        content |= {
                            "finish_reason": text.finish_reason,
                            "seed": text.seed,
                            "unknown_characters": self.unknown,
                        }
                    events.append(event(content))
                yield b"".join(events)


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the route ``/v1/text/continue``. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v1", tags=["Tasks"], responses=ERROR_RESPONSES)
    body_model = request_model(settings)
    endpoint = JsonEndpoint(
        models,
        GENERATE_TEXT,
        body_model,
        lambda _, model, body: TextInference(model, body),
        content_bytes=BYTES_PER_CHARACTER * settings.max_prompt_characters,
        content_commas=settings.max_prompt_characters + MAX_STOPS * MAX_STOP_LENGTH,
    )

    @routes.post(
        "/text/continue",
        operation_id="generate_text",
        summary="Generate text",
        openapi_extra=request_body(body_model, openapi.GENERATE_TEXT_EXAMPLE),
        responses=success_response(
            TextResponse,
            "The continuations of the prompt",
            stream_response("With `stream`: events with new characters of a text, then `[DONE]`"),
        ),
    )
    async def continue_text(request: Request) -> Response:
        """Continue a prompt character by character.

        With `stream`, the service sends the characters as server-sent events while the model generates them.
        """
        return await endpoint.run(request)

    return routes
