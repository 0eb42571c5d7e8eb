"""Response schemas of the Open Inference Protocol V2, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, RootModel

from app.api.open_inference.decode import MAX_ID_LENGTH
from app.api.request_body import Seed
from app.api.responses import ResponseModel, error_responses
from app.api.routes.generate_text import Stops
from app.store import TaskName


class InferenceError(ResponseModel):
    """The body of every error response under /v2."""

    error: str


FAILURES = error_responses(
    InferenceError,
    "400: invalid value. 401: missing or unknown API key. 404: unknown model. 408: the body arrived too slowly. "
    "413: too large.",
)

REPOSITORY_FAILURES: dict[int | str, dict[str, Any]] = {  # of ``load`` and ``unload``, which change the store
    "4XX": {
        **FAILURES["4XX"],
        "description": "400: invalid value. 401: missing or unknown admin key. 404: unknown model or version. "
        "408: the body arrived too slowly. 409: a setting or the state of the store does not allow the request. "
        "413: too large.",
    },
    "5XX": {
        **FAILURES["5XX"],
        "description": f"{FAILURES['5XX']['description']} 507: the store cannot be read or written.",
    },
}


class ServerLive(ResponseModel):
    live: bool


class ServerReady(ResponseModel):
    live: bool
    ready: bool


class ServerMetadata(ResponseModel):
    name: str
    version: str
    extensions: list[str]


class ModelNames(ResponseModel):
    models: list[str]


class TensorMetadata(ResponseModel):
    name: str
    datatype: str
    shape: list[int] = Field(description="size of each dimension; -1 if the size varies")


class ModelProperties(ResponseModel):
    task: TaskName
    title: str
    parameters: str = Field(description="parameters that a request may have, separated by commas")


class ModelMetadata(ResponseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    properties: ModelProperties


class TensorConfiguration(ResponseModel):
    name: str
    data_type: str
    dims: list[int] = Field(description="size of each dimension except the rows; -1 if the size varies")


class ModelConfiguration(ResponseModel):
    name: str
    platform: str
    backend: str
    max_batch_size: int = Field(description="largest number of rows in a request")
    input: list[TensorConfiguration]
    output: list[TensorConfiguration]
    dynamic_batching: dict[str, Any]


class ModelReady(ResponseModel):
    name: str
    ready: Literal[True]


class Duration(ResponseModel):
    count: int
    ns: int = Field(description="total duration in nanoseconds")


class InferenceStatistics(ResponseModel):
    success: Duration = Field(description="answered requests")
    fail: Duration = Field(description="failed requests, including those that were rejected or cancelled")
    queue: Duration = Field(
        description="images, series, texts, and requests for generated images or tensors that left the queue"
    )
    compute_infer: Duration = Field(description="batches, or rounds of the engine for text models")
    compute_input: Duration = Field(description="always 0, because it is not measured")
    compute_output: Duration = Field(description="always 0, because it is not measured")
    cache_hit: Duration = Field(description="always 0, because there is no cache")
    cache_miss: Duration = Field(description="always 0, because there is no cache")


class ModelStatistics(ResponseModel):
    name: str
    version: str
    last_inference: int = Field(description="time of the last batch in milliseconds since 1970; 0 if there was none")
    inference_count: int = Field(description="number of rows, or of texts for text models")
    execution_count: int = Field(description="number of batches")
    inference_stats: InferenceStatistics
    response_stats: dict[str, Any]
    batch_stats: list[Any]
    memory_usage: list[Any]


class StatisticsResponse(ResponseModel):
    model_stats: list[ModelStatistics]


class ResponseOutput(ResponseModel):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = Field(
        None, description="values in row-major order, with null for NaN; left out if the values are binary"
    )
    parameters: dict[str, Any] | None = Field(
        None, description="`binary_data_size`: number of bytes of the values after the JSON part"
    )


class InferenceResponse(ResponseModel):
    model_name: str
    model_version: str
    id: str | None = Field(None, description="only if the request has one")
    outputs: list[ResponseOutput]


class GenerateParameters(BaseModel):
    """Sampling parameters."""

    max_characters: int = Field(200, ge=1, description="largest length of the continuation in characters")
    max_tokens: int = Field(  # the schema has no default, because clients that send all defaults would send both names
        default_factory=lambda: 200, ge=1, description="alias of `max_characters`. Send only one of them."
    )
    temperature: float = Field(
        0.8, ge=0, le=10, description="sampling temperature. 0 always takes the most probable character."
    )
    top_k: int | None = Field(None, ge=1, description="sample only from the k most probable characters")
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample only from the most probable characters whose probabilities add up to p"
    )
    stop: Stops | None = Field(None, description="strings that end the text. The returned text does not contain them.")
    seed: Seed | None = Field(None, description="random seed. The same seed gives the same text.")


class GenerateRequest(BaseModel):
    id: str = Field("", max_length=MAX_ID_LENGTH, description="your own id for the request, which the response repeats")
    text_input: str = Field(description="the prompt")
    parameters: GenerateParameters = Field(
        description="sampling parameters. Each of them may also be sent beside `text_input` instead.",
        default_factory=lambda: GenerateParameters.model_validate({}),
    )


class GenerateResponse(ResponseModel):
    model_name: str
    model_version: str
    id: str | None = Field(None, description="only if the request has one")
    text_output: str = Field(description="the continuation, without the prompt")
    finish_reason: Literal["length", "stop"]
    seed: int


class RepositoryEntry(ResponseModel):
    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class RepositoryIndex(RootModel[list[RepositoryEntry]]):
    pass


class ModelLoaded(ResponseModel):
    name: str
    version: str
    load: Literal[True]


class ModelUnloaded(ResponseModel):
    name: str
    unload: Literal[True]
