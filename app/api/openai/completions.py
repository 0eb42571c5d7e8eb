"""OpenAI's completions: ``/v1/completions``.

A token is one character. Its id is the index of the character in the vocabulary of the model card. The ids of a
network that reads bytes are the bytes of the text in UTF-8.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain, islice, starmap
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from app.api import openapi
from app.api.inference import Inference, InferenceBody, JsonEndpoint
from app.api.openai.responses import Completion
from app.api.openapi import request_body
from app.api.request_body import ModelName, RequestBody, Seed, validate, with_limits
from app.api.responses import ERROR_RESPONSES, MIN_LOG_PROBABILITY, json_response, stream_response, success_response
from app.api.routes import generate_text
from app.api.sse import event
from app.engine.executor import INLINE_SIZE, Executor
from app.errors import BadValue, quote_value
from app.serving.model import Model
from app.serving.models import Models
from app.settings import Settings
from app.tasks import GENERATE_TEXT
from app.tasks.text_generation import Continuation, TextGenerator, memory_bytes
from app.tasks.token_sampling import LogProbs, SamplingOptions

VALUES_PER_LOG_PROB = 80  # encoding a character with its log-probabilities takes as long as encoding this many values
VALUES_PER_PART = 1000  # log-probabilities that are encoded at a time
MIN_TOP_P = 1e-12  # replaces a top_p of 0, so that only the most probable character can be sampled
MAX_BIASES = 1000

Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Text = {"type": "string"}
Ids = {"type": "array", "items": {"type": "integer"}}
PROMPT: dict[str, Any] = {"oneOf": [Text, {"type": "array", "items": {"oneOf": [Text, Ids]}}, Ids, {"type": "null"}]}


class StreamOptions(RequestBody):
    include_usage: bool = Field(
        False, description="whether the stream ends with an event that has the numbers of characters"
    )
    include_obfuscation: bool = Field(False, description="accepted and ignored")


class CompletionRequest(InferenceBody):
    model: ModelName = None
    prompt: Any = Field(None, json_schema_extra=PROMPT)
    max_tokens: int | None = Field(
        None, ge=0, description="largest length of the text in characters. The default is 16. 0 requires `echo`."
    )
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(
        None, ge=1, description="sample only from the k most probable characters (not in OpenAI's API)"
    )
    n: int | None = Field(None, ge=1, description="number of texts for each prompt. Text i uses the seed plus i.")
    best_of: int | None = Field(None, ge=1, description="must be equal to `n`")
    echo: bool | None = Field(None, description="whether to repeat the prompt before the text")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=5,
        description="number of most probable characters whose log-probabilities are returned at each position. If this "
        "field is set, even to 0, the response also has the log-probability of each character of the text.",
    )
    logit_bias: dict[str, Bias] | None = Field(
        None, description="numbers that are added to the logits of characters, by character id", max_length=MAX_BIASES
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: generate_text.Stops | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: str | None = Field(
        None, description="not supported, because the model reads only the prompt before the text"
    )
    user: str | None = None


@dataclass(frozen=True)
class CompletionChoice:
    """One of the generated texts in a response.

    ``echo`` is the prompt if the response repeats the prompt, otherwise empty. ``prompt_log_probs`` holds the
    log-probabilities of the characters in ``echo``, or is None if the request does not ask for them.
    """

    text: Continuation
    prompt: str
    echo: str
    prompt_log_probs: LogProbs | None


class CompletionInference(Inference[TextGenerator]):
    """Generates the texts of a request to ``/v1/completions``. OpenAI's API calls these texts choices."""

    def __init__(
        self,
        model: Model[TextGenerator],
        body: CompletionRequest,
        text_request: type[generate_text.GenerateTextRequest],
        settings: Settings,
        executor: Executor,
    ) -> None:
        super().__init__(model)
        _check(body)
        self.predictor = model.predictor
        self.rows, self.parse_size, self.streamed = body.n or 1, _prompt_size(body.prompt), bool(body.stream)
        self.body = body
        self.text_request = text_request
        self.settings = settings
        self.executor = executor
        self.choices: list[CompletionChoice] = []
        self.head: dict[str, Any] = {}  # the fields that the response and all events have in common

    def parse(self) -> list[Continuation]:
        body, max_characters = self.body, self.settings.max_prompt_characters
        prompts, n = _prompts(body.prompt, self.predictor), body.n or 1
        if (count := len(prompts) * n) > self.settings.max_texts:
            raise BadValue(
                f"{len(prompts)} prompts with n {n} are {count} texts; the maximum is {self.settings.max_texts}",
                "n" if n > 1 else "prompt",
            )
        if (length := sum(map(len, prompts))) > max_characters:
            raise BadValue(
                f"prompt has {length:,} characters in all; the maximum is {max_characters:,}",
                "prompt",
            )
        make_options = _sampling_options(body, self.predictor)
        echo_log_probs = body.echo and body.logprobs is not None
        if echo_log_probs and length * n > max_characters:  # each choice has the log-probabilities of its prompt
            problem = f"prompt has {length:,} characters in all, echoed with logprobs {n} times"
            raise BadValue(f"{problem}; the maximum is {max_characters:,}", "n")
        for prompt in prompts:
            native = validate(
                {"prompt": prompt, **_native_fields(body, self.settings.max_characters)}, self.text_request
            )
            prompt_log_probs = LogProbs(body.logprobs or 0) if echo_log_probs and prompt else None
            texts, _ = generate_text.start_texts(self.predictor, native, make_options, prompt_log_probs)
            self.choices += [
                CompletionChoice(text, prompt, prompt if body.echo else "", prompt_log_probs) for text in texts
            ]
        sizes = [len(choice.text.prompt.characters) for choice in self.choices[::n]]
        self.predictor.check_prompt(sum(sizes), len(sizes))
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model.card.name,
            "system_fingerprint": self.model.id,
        }
        texts = [choice.text for choice in self.choices]
        self.memory_bytes = memory_bytes(texts)
        return texts

    def response_size(self, outputs: Sequence[Continuation]) -> int:
        return sum(self._choice_size(choice, 0, len(self._generated(choice))) for choice in self.choices)

    def respond(self, outputs: Sequence[Continuation]) -> Response:
        choices = [self._choice(index, 0, self._generated(choice), True) for index, choice in enumerate(self.choices)]
        return json_response({**self.head, "choices": choices, "usage": self._usage()})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield an event for each new part of a choice. If requested, a last event has the usage in characters."""
        include_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        no_usage: dict[str, Any] = {"usage": None} if include_usage else {}

        def encode(deltas: Sequence[generate_text.TextDelta]) -> bytes:
            events = []
            for delta in deltas:
                new = "" if self.body.max_tokens == 0 else delta.text
                choice = self._choice(delta.text_index, delta.start, new, delta.finished)
                events.append(event({**self.head, "choices": [choice], **no_usage}))
            return b"".join(events)

        async with aclosing(generate_text.deltas(self.model, [choice.text for choice in self.choices])) as steps:
            async for deltas in steps:
                size = sum(
                    self._choice_size(self.choices[delta.text_index], delta.start, len(delta.text)) for delta in deltas
                )
                yield encode(deltas) if size <= INLINE_SIZE else await self.executor.run(encode, deltas)
        if include_usage:
            yield event({**self.head, "choices": [], "usage": self._usage()})

    def _generated(self, choice: CompletionChoice) -> str:
        """Return the generated text. If max_tokens is 0, omit the single character that the network has generated."""
        return "" if self.body.max_tokens == 0 else choice.text.text

    def _choice_size(self, choice: CompletionChoice, start: int, length: int) -> int:
        """Return the cost of encoding ``length`` characters, in values. If ``start`` is 0, the echo counts, too."""
        characters = length + (len(choice.echo) if start == 0 else 0)
        return characters if self.body.logprobs is None else VALUES_PER_LOG_PROB * characters

    def _choice(self, index: int, start: int, new: str, finished: bool) -> dict[str, Any]:
        """Return choice ``index`` with the characters ``new`` at position ``start``. The echo precedes position 0."""
        choice = self.choices[index]
        echo = choice.echo if start == 0 else ""
        log_probs = None if self.body.logprobs is None else self._log_probs(choice, echo, start, new)
        reason = choice.text.finish_reason if finished else None
        return {"index": index, "text": echo + new, "logprobs": log_probs, "finish_reason": reason}

    def _log_probs(self, choice: CompletionChoice, echo: str, start: int, new: str) -> dict[str, Any]:
        assert choice.text.options
        recorded = choice.text.options.log_probs
        assert recorded
        end, offset = start + len(new), 0 if echo else len(choice.echo) + start
        token_log_probs: list[float | None] = list(map(_finite, recorded.tokens[start:end]))
        rows = zip(new, recorded.tokens[start:end], recorded.likeliest(start, end), strict=True)
        top_log_probs: Iterator[dict[str, float] | None] = starmap(self._top_log_probs, rows)
        if echo and (before := choice.prompt_log_probs):  # the first character of a prompt has no probability
            rows = zip(echo[1:], before.tokens, before.likeliest(), strict=True)
            token_log_probs = [None, *map(_finite, before.tokens), *token_log_probs]
            top_log_probs = chain([None], starmap(self._top_log_probs, rows), top_log_probs)
        tokens = list(echo + new)
        offsets = list(range(offset, offset + len(tokens)))
        return {
            "tokens": tokens,
            "token_logprobs": token_log_probs,
            "top_logprobs": _encoded(top_log_probs),
            "text_offset": offsets,
        }

    def _top_log_probs(self, character: str, log_prob: float, top: list[tuple[int, float]]) -> dict[str, float]:
        vocabulary = self.predictor.vocabulary
        log_probs = {vocabulary[index]: _finite(value) for index, value in top if value > MIN_LOG_PROBABILITY}
        return {**log_probs, character: _finite(log_prob)}

    def _usage(self) -> dict[str, int]:
        """Return the numbers of characters, or bytes if the network reads bytes. Several choices share one prompt."""
        prompts = [choice.text.prompt.characters for choice in self.choices[:: self.body.n or 1] if choice.prompt]
        prompt = sum(map(len, prompts))
        completion = 0 if self.body.max_tokens == 0 else sum(map(_size, self.choices))
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _size(choice: CompletionChoice) -> int:
    """Return the number of generated characters or bytes, without a stop string."""
    return choice.text.generated - choice.text.stop_length


def _encoded(values: Iterator[Any]) -> orjson.Fragment:
    """Encode a list as JSON in parts, because all objects at once would need several times the memory of the JSON."""
    parts = []
    while part := list(islice(values, VALUES_PER_PART)):
        parts.append(orjson.dumps(part)[1:-1])
    return orjson.Fragment(b"[%s]" % b",".join(parts))


def _finite(value: float) -> float:
    return max(round(value, 8), MIN_LOG_PROBABILITY)


def _prompt_size(prompt: Any) -> int:
    """Return the approximate number of characters or ids in a prompt that has not been checked."""
    if isinstance(prompt, list):
        return sum(len(each) if isinstance(each, str | list) else 1 for each in prompt)
    return len(prompt) if isinstance(prompt, str) else 0


def _check(body: CompletionRequest) -> None:
    """Raise BadValue for fields that contradict each other or are not supported."""
    if body.best_of not in (None, body.n or 1):
        raise BadValue(f"best_of is {quote_value(body.best_of)}; it should equal n, which is {body.n or 1}", "best_of")
    if body.suffix:
        raise BadValue(
            f"suffix is {quote_value(body.suffix)}; the network reads forwards only, so leave it out", "suffix"
        )
    if body.stream_options and not body.stream:
        raise BadValue("stream_options requires stream", "stream_options")
    if body.max_tokens == 0 and not body.echo:
        raise BadValue("max_tokens is 0; without echo it should be greater than 0", "max_tokens")


def _native_fields(body: CompletionRequest, limit: int) -> dict[str, Any]:
    """Return the fields for ``/v1/text/continue``, except the prompt. ``limit`` is the largest ``max_characters``."""
    return {
        "max_characters": min(16, limit) if body.max_tokens is None else max(body.max_tokens, 1),
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": None if body.top_p is None else max(body.top_p, MIN_TOP_P),
        "n": body.n or 1,
        "top_k": body.top_k,
        "stop": None if body.max_tokens == 0 else body.stop or None,  # the omitted character may be a stop string
        "seed": body.seed,
    }


def _prompts(prompt: Any, predictor: TextGenerator) -> list[str]:
    """Return the texts in the field ``prompt``, which is one or several strings or lists of character ids.

    Raises BadValue.
    """
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not isinstance(prompt, list) or not prompt:
        raise BadValue(
            f"prompt is {quote_value(prompt)}; it should be a string, or a list of strings or character ids", "prompt"
        )
    if type(prompt[0]) is int:
        prompt = [prompt]
    return [_prompt(each, predictor.vocabulary[: predictor.unknown]) for each in prompt]


def _prompt(prompt: Any, vocabulary: Sequence[str]) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise BadValue(f"prompt has {quote_value(prompt)}; it should be a string or a list of character ids", "prompt")
    for index in prompt:
        if type(index) is not int or not 0 <= index < len(vocabulary):
            raise BadValue(
                f"prompt has {quote_value(index)}: out of vocabulary; ids are 0 to {len(vocabulary) - 1}", "prompt"
            )
    return "".join([vocabulary[index] for index in prompt])


def _sampling_options(body: CompletionRequest, predictor: TextGenerator) -> Callable[[], SamplingOptions] | None:
    """Return a function that makes the options of one text. Raises BadValue.

    If the request needs no options, the result is None.
    """
    presence, frequency = body.presence_penalty or 0.0, body.frequency_penalty or 0.0
    if body.logprobs is None and not body.logit_bias and not presence and not frequency:
        return None
    bias = np.zeros(len(predictor.vocabulary))
    for key, value in (body.logit_bias or {}).items():
        if not (len(key) < 10 and key.isdecimal() and key == str(int(key)) and int(key) < predictor.unknown):
            raise BadValue(
                f"logit_bias has {quote_value(key)}: out of vocabulary; ids are 0 to {predictor.unknown - 1}",
                "logit_bias",
            )
        bias[int(key)] = value
    logprobs = body.logprobs
    return lambda: SamplingOptions(bias, presence, frequency, None if logprobs is None else LogProbs(logprobs))


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the route ``/v1/completions``. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERROR_RESPONSES)
    text_request = generate_text.request_model(settings)
    max_prompt, max_texts = settings.max_prompt_characters, settings.max_texts
    limits = f"at most {max_prompt:,} characters in all; prompts times `n` is at most {max_texts}"
    body_model = with_limits(
        CompletionRequest,
        prompt={"description": f"one or several texts or lists of character ids, {limits}"},
        max_tokens={"le": settings.max_characters},
        n={"le": max_texts},
    )
    endpoint = JsonEndpoint(
        models,
        GENERATE_TEXT,
        body_model,
        lambda _, model, body: CompletionInference(model, body, text_request, settings, models.parse_executor),
        content_bytes=generate_text.BYTES_PER_CHARACTER * max_prompt,
        content_commas=max_prompt + generate_text.MAX_STOPS * generate_text.MAX_STOP_LENGTH + MAX_BIASES,
    )

    @routes.post(
        "/completions",
        operation_id="create_completion",
        summary="Create a completion",
        openapi_extra=request_body(body_model, openapi.COMPLETION_EXAMPLE),
        responses=success_response(
            Completion,
            "The completions of the prompts",
            stream_response("With `stream`: a `Completion` with new characters in each event, then `[DONE]`"),
        ),
    )
    async def complete(request: Request) -> Response:
        """Continue one or several prompts, as OpenAI's completions endpoint does. A token is one character.

        With `stream`, the service sends the characters as server-sent events while the model generates them.
        """
        return await endpoint.run(request)

    return routes
