"""OpenAI's completions, for its clients as they are. A token is a character, its id the character's place in the card's
vocabulary.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from app.api import openapi
from app.api.deadline import Deadline, deadline, run_before_deadline
from app.api.inference import resolve_model
from app.api.openai import images
from app.api.openapi import request_body
from app.api.request import (
    EXTRA_COMMAS,
    BodyReader,
    ModelName,
    RequestBody,
    Seed,
    json_response,
    max_json_bytes,
    read_json,
    validate,
    with_limits,
)
from app.api.responses import ERROR_RESPONSES, MIN_LOG_PROBABILITY
from app.api.routes import generate_text
from app.api.sse import STREAM, EventStream, event
from app.engine.executor import Executor
from app.errors import BadValue, quote_value
from app.serving.loader import LoadedModel
from app.serving.registry import Registry
from app.settings import Settings
from app.tasks import GENERATE_TEXT
from app.tasks.text_generation import Continuation, TextGenerator
from app.tasks.token_sampling import LogProbs, SamplingOptions

NOTED = 80  # values that are told in the time of one character with its log-probabilities
SURE = 1e-12  # instead of top_p 0: only the likeliest is left

Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Text = {"type": "string"}
Ids = {"type": "array", "items": {"type": "integer"}}
PROMPT: dict[str, Any] = {"oneOf": [Text, {"type": "array", "items": {"oneOf": [Text, Ids]}}, Ids, {"type": "null"}]}


class StreamOptions(RequestBody):
    include_usage: bool = Field(False, description="count the characters in a last event of their own")
    include_obfuscation: bool = Field(False, description="not done; taken because clients send it")


class CompletionRequest(RequestBody):
    model: ModelName = None
    prompt: Any = Field(None, description="one or several texts, or lists of character ids", json_schema_extra=PROMPT)
    max_tokens: int | None = Field(None, ge=0, description="characters; 16 by default, 0 only with echo")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=1, description="not OpenAI's: of so many of the likeliest only")
    n: int | None = Field(None, ge=1, description="of each prompt; number i has the seed + i")
    best_of: int | None = Field(None, ge=1, description="as many as n")
    echo: bool | None = Field(None, description="begin the text with the prompt")
    logprobs: int | None = Field(None, ge=0, le=5, description="tell how likely each character was, and so many others")
    logit_bias: dict[str, Bias] | None = Field(None, description="by character id", max_length=1000)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: generate_text.Stops | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: str | None = Field(None, description="not served: the network reads forwards only")
    user: str | None = None


@dataclass(frozen=True)
class CompletionChoice:
    """A text, the prompt as it is told before it, and the notes of that."""

    text: Continuation
    prompt: str
    echoed: str
    notes: LogProbs | None


@dataclass(frozen=True)
class CompletionBuilder:
    """What a request asked for, under way."""

    live: LoadedModel[TextGenerator]
    body: CompletionRequest
    choices: Sequence[CompletionChoice]
    told: dict[str, Any]

    def written(self, choice: CompletionChoice) -> str:
        """The text without what was drawn only because at least one character is."""
        return "" if self.body.max_tokens == 0 else choice.text.text

    def size(self, choice: CompletionChoice, characters: int, first: bool = True) -> int:
        """How long it takes to tell so many characters of a choice, and what is echoed, in values."""
        told = characters + (len(choice.echoed) if first else 0)
        return told if self.body.logprobs is None else NOTED * told

    def choice(self, index: int, begin: int, new: str, finished: bool) -> dict[str, Any]:
        """Choice ``index`` from character ``begin`` on, with what is echoed before the first."""
        choice = self.choices[index]
        first = choice.echoed if begin == 0 else ""
        told = None if self.body.logprobs is None else self._logprobs(choice, first, begin, new)
        reason = choice.text.finish_reason if finished else None
        return {"index": index, "text": first + new, "logprobs": told, "finish_reason": reason}

    def _logprobs(self, choice: CompletionChoice, first: str, begin: int, new: str) -> dict[str, list[Any]]:
        assert choice.text.extras
        notes = choice.text.extras.notes
        assert notes
        end, offset = begin + len(new), 0 if first else len(choice.echoed) + begin
        chosen: list[float | None] = list(map(_finite, notes.tokens[begin:end]))
        best: list[dict[str, float] | None] = [
            self._best(character, value, likeliest)
            for character, value, likeliest in zip(
                new, notes.tokens[begin:end], notes.likeliest[begin:end], strict=True
            )
        ]
        if first and choice.notes:
            before = zip(first[1:], choice.notes.tokens, choice.notes.likeliest, strict=True)
            chosen = [None, *map(_finite, choice.notes.tokens), *chosen]
            best = [None, *(self._best(*each) for each in before), *best]
        tokens = list(first + new)
        offsets = list(range(offset, offset + len(tokens)))
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": best, "text_offset": offsets}

    def _best(self, character: str, value: float, likeliest: list[tuple[int, float]]) -> dict[str, float]:
        vocabulary = self.live.predictor.vocabulary
        found = {vocabulary[index]: _finite(logs) for index, logs in likeliest if logs > MIN_LOG_PROBABILITY}
        return {**found, character: _finite(value)}

    def usage(self) -> dict[str, int]:
        """Characters: of each prompt once, of all its texts."""
        read = sum(len(choice.prompt) for choice in self.choices[:: self.body.n or 1])
        written = sum(len(self.written(choice)) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _finite(value: float) -> float:
    return max(round(value, 8), MIN_LOG_PROBABILITY)


def router(registry: Registry, settings: Settings) -> APIRouter:
    """The routes, with the limits of the settings."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERROR_RESPONSES)
    _completions(routes, registry, settings)
    images.add(routes, registry, settings)
    return routes


def _completions(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    parsing, prompts = registry.parse_executor, generate_text.request_model(settings)
    bodies = with_limits(CompletionRequest, max_tokens={"le": settings.max_characters}, n={"le": settings.max_texts})
    limit = max_json_bytes(settings.max_body_bytes, generate_text.BYTES_PER_CHARACTER * settings.max_prompt_characters)
    reading = BodyReader(limit, settings.body_seconds, parsing)
    most = settings.max_prompt_characters + generate_text.STOPS * generate_text.LONGEST_STOP + 1000 + EXTRA_COMMAS

    @routes.post(
        "/completions",
        openapi_extra=request_body(bodies, openapi.COMPLETION_EXAMPLE),
        responses={200: {"content": STREAM}},
    )
    async def complete(request: Request) -> Response:
        """OpenAI's completions: streamed or not, of one prompt or several."""
        until = deadline(request, settings.request_seconds)
        body = await read_json(request, bodies, reading, most)
        live = await resolve_model(request, registry, GENERATE_TEXT, body.model, until)
        _check(body)
        live.engine.admit(body.n or 1)
        answer = await run_before_deadline(
            request, parsing, _length(body.prompt), _begun, live, body, prompts, settings
        )
        if body.stream:
            return EventStream(request, _events(answer, parsing), until, x_model=live.id)
        async with Deadline(request, until):
            await live.engine.submit([choice.text for choice in answer.choices])
            size = sum(answer.size(choice, len(answer.written(choice))) for choice in answer.choices)
            return await parsing.run_admitted_or_inline(size, _whole, answer)


def _whole(answer: CompletionBuilder) -> Response:
    choices = [answer.choice(index, 0, answer.written(choice), True) for index, choice in enumerate(answer.choices)]
    return json_response({**answer.told, "choices": choices, "usage": answer.usage()})


def _length(prompt: Any) -> int:
    """Characters of a prompt, or ids, about: what is no text and no list is refused at once."""
    if isinstance(prompt, list):
        return sum(len(each) if isinstance(each, str | list) else 1 for each in prompt)
    return len(prompt) if isinstance(prompt, str) else 0


def _check(body: CompletionRequest) -> None:
    """Raises BadValue for fields that do not go together."""
    if body.best_of not in (None, body.n or 1):
        n = body.n or 1
        raise BadValue(f"best_of is {quote_value(body.best_of)}; it should be {n} as n is: all are given", "best_of")
    if body.suffix:
        raise BadValue(
            f"suffix is {quote_value(body.suffix)}; the network reads forwards only, so leave it out", "suffix"
        )
    if body.stream_options and not body.stream:
        raise BadValue("stream_options are given without stream", "stream_options")
    if body.max_tokens == 0 and not body.echo:
        raise BadValue("max_tokens is 0; without echo it should be greater than 0", "max_tokens")


def _begun(
    live: LoadedModel[TextGenerator],
    body: CompletionRequest,
    prompts: type[generate_text.GenerateTextRequest],
    settings: Settings,
) -> CompletionBuilder:
    """The texts of a request, ready to be continued. Raises BadValue."""
    predictor = live.predictor
    found, n = _prompts(body.prompt, predictor), body.n or 1
    if len(found) * n > settings.max_texts:
        raise BadValue(
            f"{len(found)} prompts with n {n} are {len(found) * n} texts; allowed are {settings.max_texts}", "n"
        )
    if (length := sum(map(len, found))) > settings.max_prompt_characters:
        allowed = f"allowed are {settings.max_prompt_characters:,}"
        raise BadValue(f"prompt has {length:,} characters in all; {allowed}", "prompt")
    extras, noting = _extras(body, predictor), body.echo and body.logprobs is not None
    if noting and length * n > settings.max_prompt_characters:  # each of them with its log-probabilities
        why = f"prompt has {length:,} characters in all, echoed with logprobs {n} times"
        raise BadValue(f"{why}; allowed are {settings.max_prompt_characters:,}", "n")
    choices = []
    for prompt in found:
        native = validate({"prompt": prompt, **_native(body)}, prompts)
        notes = LogProbs(body.logprobs or 0) if noting and prompt else None
        begun, _ = generate_text.start_texts(predictor, native, extras, notes)
        choices += [CompletionChoice(text, prompt, prompt if body.echo else "", notes) for text in begun]
    told = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": live.card.name,
        "system_fingerprint": live.id,
    }
    return CompletionBuilder(live, body, choices, told)


def _native(body: CompletionRequest) -> dict[str, Any]:
    """The fields of the native endpoint, but for the prompt."""
    given = {
        "max_characters": 16 if body.max_tokens is None else max(body.max_tokens, 1),
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": None if body.top_p is None else max(body.top_p, SURE),
        "n": body.n or 1,
    }
    return {**given, "top_k": body.top_k, "stop": body.stop or None, "seed": body.seed}


def _prompts(prompt: Any, predictor: TextGenerator) -> list[str]:
    """What may be one text or several, of characters or of their ids. Raises BadValue."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not isinstance(prompt, list) or not prompt:
        raise BadValue(
            f"prompt is {quote_value(prompt)}; it should be a text, or a list of texts or character ids", "prompt"
        )
    if type(prompt[0]) is int:
        prompt = [prompt]
    return [_prompt(each, predictor.vocabulary[: predictor.unknown]) for each in prompt]


def _prompt(prompt: Any, vocabulary: Sequence[str]) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise BadValue(f"prompt has {quote_value(prompt)}; it should be a text or a list of character ids", "prompt")
    for index in prompt:
        if type(index) is not int or not 0 <= index < len(vocabulary):
            raise BadValue(
                f"prompt has {quote_value(index)}: out of vocabulary; ids are 0 to {len(vocabulary) - 1}", "prompt"
            )
    return "".join([vocabulary[index] for index in prompt])


def _extras(body: CompletionRequest, predictor: TextGenerator) -> Callable[[], SamplingOptions] | None:
    """What makes the extras of each text; None when the request asks for none. Raises BadValue."""
    presence, frequency = body.presence_penalty or 0.0, body.frequency_penalty or 0.0
    if body.logprobs is None and not body.logit_bias and not presence and not frequency:
        return None
    bias = np.zeros(len(predictor.vocabulary))
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < predictor.unknown):
            told = f"logit_bias has {quote_value(key)}: out of vocabulary; ids are 0 to {predictor.unknown - 1}"
            raise BadValue(told, "logit_bias")
        bias[int(key)] = value
    logprobs = body.logprobs
    return lambda: SamplingOptions(bias, presence, frequency, None if logprobs is None else LogProbs(logprobs))


async def _events(answer: CompletionBuilder, parsing: Executor) -> AsyncGenerator[bytes, None]:
    """An event for each piece of a choice, and where it is asked for one that counts."""
    counting = bool(answer.body.stream_options and answer.body.stream_options.include_usage)
    blank: dict[str, Any] = {"usage": None} if counting else {}

    def told(pieces: Sequence[generate_text.TextDelta]) -> bytes:
        events = []
        for piece in pieces:
            new = "" if answer.body.max_tokens == 0 else piece.text
            choice = answer.choice(piece.place, piece.begin, new, piece.finished)
            events.append(event({**answer.told, "choices": [choice], **blank}))
        return b"".join(events)

    async with aclosing(generate_text.deltas(answer.live, [choice.text for choice in answer.choices])) as growth:
        async for pieces in growth:
            size = sum(answer.size(answer.choices[one.place], len(one.text), one.begin == 0) for one in pieces)
            yield await parsing.run_admitted_or_inline(size, told, pieces)
    if counting:
        yield event({**answer.told, "choices": [], "usage": answer.usage()})
