"""Endpoints under ``/v2`` that describe the server and the models: health, names, tensors, configuration.

They answer from the model card and from the table of versions. They never load a version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.deadline import DEADLINE
from app.api.open_inference.decode import ModelTensor, TensorModel
from app.api.open_inference.paths import FAILURES, TAG, card_in_path, model_path
from app.api.open_inference.tensors import tensor_model
from app.api.operation import Endpoint, Operation, Request
from app.api.responses import json_response
from app.api.routes.health import is_live, status_operation, status_response
from app.errors import NotReady
from app.store import Card, TaskName

EXTENSIONS = [
    *("binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters", "statistics")
]
PLATFORMS = {"onnx": "onnxruntime_onnx"}  # all other kinds are pytorch_safetensors
CONFIGURATION_TYPES = {"BYTES": "TYPE_STRING"}  # the name of every other type is TYPE_ plus the data type


class ServerLive(TypedDict):
    live: bool


class ServerReady(TypedDict):
    live: bool
    ready: bool


class ServerMetadata(TypedDict):
    name: str
    version: str
    extensions: list[str]


class ModelNames(TypedDict):
    models: list[str]


class TensorMetadata(TypedDict):
    name: str
    datatype: str
    shape: Sequence[int]
    """size of each dimension; -1 if the size varies"""


class ModelProperties(TypedDict):
    task: TaskName
    title: str
    parameters: str
    """parameters that a request may have, separated by commas"""


class ModelMetadata(TypedDict):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    properties: ModelProperties


class TensorConfiguration(TypedDict):
    name: str
    data_type: str
    dims: Sequence[int]
    """size of each dimension except the rows; -1 if the size varies"""


class ModelConfiguration(TypedDict):
    name: str
    platform: str
    backend: str
    max_batch_size: int
    """largest number of rows in a request"""
    input: list[TensorConfiguration]
    output: list[TensorConfiguration]
    dynamic_batching: dict[str, Any]


class ModelReady(TypedDict):
    name: str
    ready: Literal[True]


async def get_server_live(request: Request) -> Response:
    """Respond with status 503 if the compute thread has hung for a minute.

    In this case, the process should be restarted.
    """
    live = is_live(request)
    return status_response(ServerLive(live=live), live)


async def get_server_ready(request: Request) -> Response:
    """Respond with status 503 if the service is not ready. Clients should then use another server."""
    ready = not request.models.problems()
    return status_response(ServerReady(live=True, ready=ready), ready)


async def get_server_metadata(request: Request) -> Response:
    """Get the server's name, version and protocol extensions."""
    return json_response(ServerMetadata(name="quartet", version=request.service.version, extensions=EXTENSIONS))


async def list_model_names(request: Request) -> Response:
    """List the names of all models, whether they are loaded or not."""
    return json_response(ModelNames(models=sorted(request.models.version_sets)))


async def get_model_metadata(request: Request) -> Response:
    """Get the names, data types and shapes of a model's inputs and outputs. -1 marks a dimension that varies.

    All paths of a model also exist with `/versions/{version}` after the name.
    """
    card, tensors = await _describe(request)
    version_set = request.models.version_sets.get(card.name)
    numbers = version_set.numbers if version_set else [card.version]
    content: ModelMetadata = {
        "name": card.name,
        "versions": [str(number) for number in sorted(numbers)],
        "platform": _platform(card),
        "inputs": _metadata(tensors.inputs),
        "outputs": _metadata(tensors.outputs),
        "properties": {"task": card.task, "title": card.title, "parameters": ",".join(tensors.parameters)},
    }
    return json_response(content)


async def get_model_configuration(request: Request) -> Response:
    """Get a model's configuration in Triton's format."""
    card, tensors = await _describe(request)
    content: ModelConfiguration = {
        "name": card.name,
        "platform": _platform(card),
        "backend": "quartet",
        "max_batch_size": tensors.rows,
        "input": _configuration(tensors, tensors.inputs),
        "output": _configuration(tensors, tensors.outputs),
        "dynamic_batching": {},
    }
    return json_response(content)


async def get_model_ready(request: Request) -> Response:
    """Check that a model answers requests. Otherwise the status is 404 or 503, and the body has the reason.

    A version that its first request loads is ready.
    """
    # another process may have loaded or unloaded it
    await request.models.recheck(request.path_params["name"].partition("@")[0], request.scope[DEADLINE])
    card = await card_in_path(request)
    model = request.models.entry(card.name, card.version).model
    if problems := request.models.problems([model] if model else None):
        raise NotReady("; ".join(problems))
    return json_response(ModelReady(name=card.name, ready=True))


async def _describe(request: Request) -> tuple[Card, TensorModel]:
    """Return the card and the tensors of the model in the path. Raises as ``card_in_path`` does."""
    card = await card_in_path(request)
    return card, tensor_model(card, request.settings)


def _platform(card: Card) -> str:
    return PLATFORMS.get(card.kind, "pytorch_safetensors")


def _metadata(specs: Sequence[ModelTensor]) -> list[TensorMetadata]:
    return [{"name": spec.name, "datatype": spec.datatypes[0], "shape": spec.shape} for spec in specs]


def _configuration(tensors: TensorModel, specs: Sequence[ModelTensor]) -> list[TensorConfiguration]:
    return [
        {
            "name": spec.name,
            "data_type": CONFIGURATION_TYPES.get(spec.datatypes[0], f"TYPE_{spec.datatypes[0]}"),
            "dims": (spec.shape[1:] or [1]) if tensors.rows else spec.shape,
        }
        for spec in specs
    ]


def model_operation(part: str, endpoint: Endpoint, summary: str, response: Any, answer: str) -> Operation:
    """Return an operation that describes the model in its path."""
    return Operation(
        "GET",
        f"/v2/models/{{name}}{part}",
        endpoint,
        TAG,
        summary,
        response,
        answer,
        parameters=model_path("sine-lstm"),
        errors=FAILURES,
        waits_for_model=True,
        versioned=True,
    )


OPERATIONS = [
    status_operation("/v2/health/live", get_server_live, TAG, ServerLive),
    status_operation("/v2/health/ready", get_server_ready, TAG, ServerReady),
    Operation(
        "GET", "/v2", get_server_metadata, TAG, "Get the server's name and extensions", ServerMetadata, "The server"
    ),
    Operation("GET", "/v2/", get_server_metadata),
    Operation(
        "GET", "/v2/models", list_model_names, TAG, "List the names of all models", ModelNames, "The names",
        errors=FAILURES,
    ),
    model_operation("", get_model_metadata, "Get the tensors of a model", ModelMetadata, "The model"),
    model_operation(
        "/config", get_model_configuration, "Get the configuration of a model", ModelConfiguration, "The configuration"
    ),
    model_operation("/ready", get_model_ready, "Check that a model is ready", ModelReady, "The model is ready"),
]  # fmt: skip
