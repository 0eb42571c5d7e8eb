"""OpenAI's completions: ``/v1/completions``.

A token is one character. Its id is the index of the character in the vocabulary of the model card.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, starmap
from typing import Annotated, Any, Literal, NotRequired

import orjson
from pydantic import Field
from typing_extensions import TypedDict

from app.api.inference import Call, Protocol, TextDelta, json_endpoint
from app.api.operation import Operation
from app.api.request_body import ModelName, RequestBody, Seed, limited
from app.api.responses import ERROR_RESPONSES, MIN_LOG_PROBABILITY, stream_response
from app.api.routes.continue_text import Stops, stop_list
from app.errors import BadValue, quote_value
from app.limits import Limits
from app.tasks import CONTINUE
from app.tasks.text_generation import Continuation, ContinueAnswer, ContinueJob

VALUES_PER_PART = 1000  # log-probabilities that are encoded at a time
MIN_TOP_P = 1e-12  # replaces a top_p of 0, so that only the most probable character can be sampled
MAX_BIASES = 1000
DEFAULT_TOKENS = 16

Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Text = {"type": "string"}
Ids = {"type": "array", "items": {"type": "integer"}}
PROMPT: dict[str, Any] = {"oneOf": [Text, {"type": "array", "items": {"oneOf": [Text, Ids]}}, Ids, {"type": "null"}]}


class StreamOptions(RequestBody):
    include_usage: bool = False
    """whether the stream ends with an event that has the numbers of characters"""
    include_obfuscation: bool = False
    """accepted and ignored"""


class CompletionRequest(RequestBody):
    model: ModelName = None
    prompt: Any = Field(None, json_schema_extra=PROMPT)
    """one or several texts or lists of character ids, at most {max_prompt_characters:,} characters in all; prompts
    times `n` is at most {max_texts}"""
    max_tokens: int | None = Field(None, ge=0, json_schema_extra=limited("max_characters"))
    """largest length of the text in characters. The default is 16. 0 requires `echo`."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=1)
    """sample only from the k most probable characters (not in OpenAI's API)"""
    n: int | None = Field(None, ge=1, json_schema_extra=limited("max_texts"))
    """number of texts for each prompt. Text i uses the seed plus i."""
    best_of: int | None = Field(None, ge=1)
    """must be equal to `n`"""
    echo: bool | None = None
    """whether to repeat the prompt before the text"""
    logprobs: int | None = Field(None, ge=0, le=5)
    """number of most probable characters whose log-probabilities are returned at each position. If this field is set,
    even to 0, the response also has the log-probability of each character of the text."""
    logit_bias: dict[str, Bias] | None = Field(None, max_length=MAX_BIASES)
    """numbers that are added to the logits of characters, by character id"""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: Stops | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    """not supported, because the model reads only the prompt before the text"""
    user: str | None = None


class CompletionLogprobs(TypedDict):
    """Log-probabilities. Each list has one entry for each character of the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: Annotated[Any, Field(json_schema_extra={"type": "array", "items": {"type": ["object", "null"]}})]
    text_offset: list[int]


class CompletionText(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["length", "stop"] | None
    """null in a stream until the text ends"""


class CompletionUsage(TypedDict):
    prompt_tokens: int
    """number of characters of the prompts"""
    completion_tokens: int
    """the same for the generated texts"""
    total_tokens: int


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    """Unix time in seconds"""
    model: str
    system_fingerprint: str
    """`name@version` of the model"""
    choices: list[CompletionText]
    """the `n` texts of each prompt"""
    usage: NotRequired[CompletionUsage | None]
    """left out of a stream without `include_usage`"""


CompletionCall = Call[CompletionRequest]


def encode(call: CompletionCall, job: ContinueJob, answer: ContinueAnswer) -> Completion:
    deltas = [TextDelta(index, 0, text.text, True) for index, text in enumerate(answer.texts)]
    return _completion(call, job, answer, deltas, has_usage=True)


def encode_delta(call: CompletionCall, job: ContinueJob, answer: ContinueAnswer, delta: TextDelta) -> Completion:
    completion = _completion(call, job, answer, [delta])
    return {**completion, "usage": None} if _includes_usage(call) else completion


def encode_end(call: CompletionCall, job: ContinueJob, answer: ContinueAnswer) -> Completion | None:
    return _completion(call, job, answer, [], has_usage=True) if _includes_usage(call) else None


def _includes_usage(call: CompletionCall) -> bool:
    return bool(call.body.stream_options and call.body.stream_options.include_usage)


def _completion(
    call: CompletionCall, job: ContinueJob, answer: ContinueAnswer, deltas: Sequence[TextDelta], has_usage: bool = False
) -> Completion:
    """Return a completion with the new characters of some texts."""
    completion: Completion = {
        "id": job.request_id,
        "object": "text_completion",
        "created": job.created,
        "model": call.model.card.name,
        "system_fingerprint": call.model.id,
        "choices": [_choice(call, job, answer, delta) for delta in deltas],
    }
    return {**completion, "usage": _usage(call, job, answer)} if has_usage else completion


def _choice(call: CompletionCall, job: ContinueJob, answer: ContinueAnswer, delta: TextDelta) -> CompletionText:
    """Return the characters of ``delta`` as a choice. An echo of the prompt precedes position 0."""
    if call.body.max_tokens == 0:  # omit the single character that the network has generated
        delta = replace(delta, text="")
    text, prompt = answer.texts[delta.index], answer.prompts[delta.index]
    echo = prompt if job.echo and delta.start == 0 else ""
    log_probs = None if job.log_probs is None else _log_probs(call, text, prompt if job.echo else "", echo, delta)
    reason: Any = text.finish_reason if delta.finished else None
    return {"index": delta.index, "text": echo + delta.text, "logprobs": log_probs, "finish_reason": reason}


def _log_probs(
    call: CompletionCall, text: Continuation, prompt: str, echo: str, delta: TextDelta
) -> CompletionLogprobs:
    """Return the log-probabilities of ``echo`` and of the new characters. ``prompt`` is echoed before all texts."""
    assert text.options
    assert text.options.log_probs
    vocabulary, recorded, start = call.model.predictor.vocabulary, text.options.log_probs, delta.start
    end, offset = start + len(delta.text), 0 if echo else len(prompt) + start

    def top_log_probs(character: str, log_prob: float, top: list[tuple[int, float]]) -> dict[str, float]:
        log_probs = {vocabulary[index]: _finite(value) for index, value in top if value > MIN_LOG_PROBABILITY}
        return {**log_probs, character: _finite(log_prob)}

    token_log_probs: list[float | None] = list(map(_finite, recorded.tokens[start:end]))
    rows = zip(delta.text, recorded.tokens[start:end], recorded.likeliest(start, end), strict=True)
    tops: Iterator[dict[str, float] | None] = starmap(top_log_probs, rows)
    if echo and (before := text.prompt.log_probs):  # the first character of a prompt has no probability
        rows = zip(echo[1:], before.tokens, before.likeliest(), strict=True)
        token_log_probs = [None, *map(_finite, before.tokens), *token_log_probs]
        tops = chain([None], starmap(top_log_probs, rows), tops)
    tokens = list(echo + delta.text)
    return {
        "tokens": tokens,
        "token_logprobs": token_log_probs,
        "top_logprobs": _encoded(tops),
        "text_offset": list(range(offset, offset + len(tokens))),
    }


def _encoded(values: Iterator[Any]) -> orjson.Fragment:
    """Encode a list as JSON in parts, because all objects at once would need several times the memory of the JSON."""
    parts = []
    while part := list(islice(values, VALUES_PER_PART)):
        parts.append(orjson.dumps(part)[1:-1])
    return orjson.Fragment(b"[%s]" % b",".join(parts))


def _finite(value: float) -> float:
    return max(round(value, 8), MIN_LOG_PROBABILITY)


def _usage(call: CompletionCall, job: ContinueJob, answer: ContinueAnswer) -> CompletionUsage:
    """Return the numbers of characters. Several choices share one prompt. A stop string does not count."""
    prompt = sum(map(len, answer.prompts[:: job.n]))
    completion = sum(text.generated - text.stop_length for text in answer.texts)
    completion = 0 if call.body.max_tokens == 0 else completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _check(body: CompletionRequest) -> None:
    """Raise BadValue for fields that contradict each other or are not supported."""
    if body.best_of not in (None, body.n or 1):
        raise BadValue(
            f"best_of is {quote_value(body.best_of)}; it should equal n, which is {quote_value(body.n or 1)}", "best_of"
        )
    if body.suffix:
        raise BadValue(
            f"suffix is {quote_value(body.suffix)}; the network reads forwards only, so leave it out", "suffix"
        )
    if body.stream_options and not body.stream:
        raise BadValue("stream_options requires stream", "stream_options")
    if body.max_tokens == 0 and not body.echo:
        raise BadValue("max_tokens is 0; without echo it should be greater than 0", "max_tokens")


def _prompts(prompt: Any) -> Sequence[Any]:
    """Return the texts or lists of character ids in the field ``prompt``. Raises BadValue."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not isinstance(prompt, list) or not prompt:
        raise BadValue(
            f"prompt is {quote_value(prompt)}; it should be a string, or a list of strings or character ids", "prompt"
        )
    if type(prompt[0]) is int:
        return [prompt]
    for each in prompt:
        if not isinstance(each, str | list):
            problem = "it should be a string or a list of character ids"
            raise BadValue(f"prompt has {quote_value(each)}; {problem}", "prompt")
    return prompt


@json_endpoint(CONTINUE, CompletionRequest, Protocol(encode, encode_delta, encode_end))
def create_completion(body: CompletionRequest, limits: Limits) -> ContinueJob:
    """Continue one or several prompts, as OpenAI's completions endpoint does. A token is one character.

    With `stream`, the service sends the characters as server-sent events while the model generates them.
    """
    _check(body)
    tokens = min(DEFAULT_TOKENS, limits.max_characters) if body.max_tokens is None else body.max_tokens
    return ContinueJob(
        _prompts(body.prompt),
        max(tokens, 1),
        1.0 if body.temperature is None else body.temperature,
        body.top_k,
        None if body.top_p is None else max(body.top_p, MIN_TOP_P),
        [] if body.max_tokens == 0 else stop_list(body.stop),  # the omitted character may be a stop string
        body.seed,
        body.n or 1,
        body.logit_bias or {},
        body.presence_penalty or 0.0,
        body.frequency_penalty or 0.0,
        body.logprobs,
        bool(body.echo),
        has_many=True,
        streamed=bool(body.stream),
        names={"max_characters": "max_tokens"},
        request_id=f"cmpl-{secrets.token_hex(12)}",
    )


OPERATIONS = [
    Operation(
        "POST",
        "/v1/completions",
        create_completion,
        "OpenAI",
        "Create a completion",
        Completion,
        "The completions of the prompts",
        stream_response("With `stream`: a `Completion` with new characters in each event, then `[DONE]`"),
        CompletionRequest,
        {"model": "shakespeare-rnn", "prompt": "ROMEO:", "max_tokens": 100, "temperature": 0.8, "seed": 1},
        errors=ERROR_RESPONSES,
    )
]
