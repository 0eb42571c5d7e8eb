"""Text generation: ``/v1/text/continue``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict

from app.api.errors import MANY, ONE
from app.api.inference import Call, Protocol, TextDelta, json_endpoint
from app.api.operation import Operation
from app.api.request_body import Described, ModelName, RequestBody, Seed, limited, text_or_list
from app.api.responses import ERROR_RESPONSES, ModelAnswer, model_fields, stream_response
from app.limits import Limits
from app.tasks import CONTINUE
from app.tasks.text_generation import ContinueAnswer, ContinueJob

MAX_STOP_LENGTH = 100  # characters
MAX_STOPS = 16
DEFAULT_CHARACTERS = 200

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[
    Annotated[Stop, Tag(ONE)] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag(MANY)],
    Discriminator(text_or_list),
]


class SamplingFields(Described):
    """The sampling parameters that several protocols share. Each of them is a field of ``ContinueJob``."""

    max_characters: int = Field(DEFAULT_CHARACTERS, ge=1, json_schema_extra=limited("max_characters"))
    """largest length of the continuation in characters"""
    temperature: float = Field(0.8, ge=0, le=10)
    """sampling temperature. 0 always takes the most probable character."""
    top_k: int | None = Field(None, ge=1)
    """sample only from the k most probable characters"""
    top_p: float | None = Field(None, gt=0, le=1)
    """sample only from the most probable characters whose probabilities add up to p"""
    stop: Stops | None = None
    """strings that end the text. The returned text does not contain them."""
    seed: Seed | None = None
    """random seed. The same seed gives the same text."""

    def sampling(self, limits: Limits) -> dict[str, Any]:
        """Return these parameters as fields of a ``ContinueJob``."""
        fields = {name: getattr(self, name) for name in SamplingFields.model_fields}
        if "max_characters" not in self.model_fields_set:
            fields["max_characters"] = min(DEFAULT_CHARACTERS, limits.max_characters)
        return {**fields, "stop": stop_list(self.stop)}


def stop_list(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


class PromptField(RequestBody):
    prompt: str = Field("", json_schema_extra=limited("max_prompt_characters", "maxLength"))
    """the text to continue; may be empty"""


class ContinueRequest(SamplingFields, PromptField):
    n: int = Field(1, ge=1, json_schema_extra=limited("max_texts"))
    """number of continuations. Continuation i uses the seed plus i."""
    stream: bool = False
    """whether to send the text as server-sent events while it is generated"""
    model: ModelName = None


class TextResult(TypedDict):
    text: str
    """the continuation, without the prompt"""
    finish_reason: Literal["length", "stop"]
    """`length` if `max_characters` was reached, or `stop` if a stop string was found"""
    seed: int


class ContinueResponse(ModelAnswer):
    results: list[TextResult]
    """the `n` continuations"""
    unknown_characters: list[str]
    """characters of the prompt that the model does not know"""


class TextEvent(TypedDict):
    """An event of a stream. Only the last event of a text has the last three fields."""

    index: int
    text: str
    finish_reason: NotRequired[Any]
    seed: NotRequired[int]
    unknown_characters: NotRequired[list[str]]


def encode(call: Call[Any], job: ContinueJob, answer: ContinueAnswer) -> ContinueResponse:
    results: Any = [
        {"text": text.text, "finish_reason": text.finish_reason, "seed": text.seed} for text in answer.texts
    ]
    return {**model_fields(call.model), "results": results, "unknown_characters": list(answer.unknown)}


def encode_delta(call: Call[Any], job: ContinueJob, answer: ContinueAnswer, delta: TextDelta) -> TextEvent:
    content: TextEvent = {"index": delta.index, "text": delta.text}
    if delta.finished:
        text = answer.texts[delta.index]
        content["finish_reason"], content["seed"] = text.finish_reason, text.seed
        content["unknown_characters"] = list(answer.unknown)
    return content


@json_endpoint(CONTINUE, ContinueRequest, Protocol(encode, encode_delta))
def continue_text(body: ContinueRequest, limits: Limits) -> ContinueJob:
    """Continue a prompt character by character.

    With `stream`, the service sends the characters as server-sent events while the model generates them.
    """
    return ContinueJob([body.prompt], n=body.n, streamed=body.stream, **body.sampling(limits))


OPERATIONS = [
    Operation(
        "POST",
        "/v1/text/continue",
        continue_text,
        "Tasks",
        "Generate text",
        ContinueResponse,
        "The continuations of the prompt",
        stream_response("With `stream`: events with new characters of a text, then `[DONE]`"),
        ContinueRequest,
        {"prompt": "ROMEO:", "max_characters": 200, "temperature": 0.8, "seed": 1},
        errors=ERROR_RESPONSES,
    )
]
