"""The Open Inference Protocol V2 (KServe, Triton) under ``/v2``: every network as a model of tensors.

Bodies are read by hand, whatever their Content-Type says: tritonclient sends none, or a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from app.api import openapi
from app.api.inference import Inference, run_inference
from app.api.open_inference import generate, repository, statistics
from app.api.open_inference.decode import (
    DECOMPRESSORS,
    JSON_LENGTH_HEADER,
    InferenceRequest,
    TensorSpec,
    decode_request,
    decompress,
)
from app.api.open_inference.encode import encode_response, requested_outputs
from app.api.open_inference.models import RequestModels, TensorModel, check_inputs, earlier_deadline, tensor_model
from app.api.open_inference.paths import SeriesModel, add_routes, model_in_path
from app.api.open_inference.responses import (
    FAILURES,
    InferenceResponse,
    ModelConfiguration,
    ModelMetadata,
    ModelNames,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
from app.api.openapi import BINARY, WITH_TIMEOUT, request_body
from app.api.request import BYTES_PER_VALUE, header, json_response, max_json_bytes, read_body, set_deadline
from app.api.responses import success_response
from app.errors import NotReady
from app.observability.metrics import Metrics
from app.serving.loader import LoadedModel
from app.serving.registry import Registry
from app.settings import Settings

# What is announced is what there is.
EXTENSIONS = [
    *("binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters", "statistics")
]
BUSY = ("/infer", "/generate", "/generate_stream")
PLATFORM = "pytorch_safetensors"
TYPES = {"BYTES": "TYPE_STRING"}  # of a configuration; the others are TYPE_ and their name
VALUE_BYTES = 26  # of a value in JSON; binary ones have 8


def router(registry: Registry, settings: Settings, metrics: Metrics, admin_key: str | None = None) -> APIRouter:
    """The routes, with the limits of the settings; models are loaded and unloaded for who has the admin key."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=FAILURES)
    _server(routes, registry)
    statistics.add(routes, registry, metrics)  # before the models, for its path looks like one called "stats"
    limits = RequestModels.build(settings)
    _models(routes, registry, limits)
    _infer(routes, registry, limits)
    generate.add(routes, registry, settings)
    repository.add(routes, registry, settings, admin_key)
    return routes


def busy_routes(routes: APIRouter) -> list[BaseRoute]:
    """Those by which networks are asked."""
    return [route for route in routes.routes if getattr(route, "path", "").endswith(BUSY)]


def _server(routes: APIRouter, registry: Registry) -> None:
    @routes.get(
        "/health/live",
        operation_id="get_server_live",
        summary="Check that the process is alive",
        responses={
            **success_response(ServerLive, description="The process is alive"),
            503: {"model": ServerLive, "description": "The engine hangs"},
        },
    )
    async def live() -> Response:
        """Answer 503 when the engine has hung for twice `QUARTET_LIVENESS_TIMEOUT_SECONDS`: restart the process."""
        good = registry.executor.oldest_job_seconds() < 2 * registry.settings.liveness_timeout_seconds
        return Response(orjson.dumps({"live": good}), 200 if good else 503, media_type="application/json")

    @routes.get(
        "/health/ready",
        operation_id="get_server_ready",
        summary="Check that the service takes requests",
        responses={
            **success_response(ServerReady, description="The service takes requests"),
            503: {"model": ServerReady, "description": "Send requests elsewhere"},
        },
    )
    async def ready() -> Response:
        """Answer 503 when requests should go to another server."""
        good = not registry.problems()
        content = {"live": True, "ready": good}
        return Response(orjson.dumps(content), 200 if good else 503, media_type="application/json")

    @routes.get(
        "",
        operation_id="get_server_metadata",
        summary="Get the server's name and extensions",
        responses=success_response(ServerMetadata, description="The server"),
    )
    @routes.get("/", include_in_schema=False)
    async def server(request: Request) -> Response:
        """Get the server's name, version and protocol extensions."""
        return json_response({"name": "quartet", "version": request.app.version, "extensions": EXTENSIONS})


def _models(routes: APIRouter, registry: Registry, limits: RequestModels) -> None:
    @routes.get(
        "/models",
        operation_id="list_model_names",
        summary="List the names of all models",
        responses=success_response(ModelNames, description="The names"),
    )
    async def models() -> Response:
        """List the names of all models, loaded or not."""
        return json_response({"models": sorted(registry.version_sets)})

    @add_routes(
        routes,
        "GET",
        "",
        operation_id="get_model_metadata",
        summary="Get the tensors of a model",
        openapi_extra=WITH_TIMEOUT,
        responses=success_response(ModelMetadata, description="The model"),
    )
    async def metadata(request: Request, name: SeriesModel) -> Response:
        """Get names, data types and shapes of a model's inputs and outputs; -1 is a dimension that varies.

        All paths of a model also exist with `/versions/{version}` after the name.
        """
        live = await model_in_path(registry, request, name, set_deadline(request, limits.settings.request_seconds))
        model, versions = tensor_model(live, limits), registry.version_sets[live.card.name].numbers
        told = {"name": live.card.name, "versions": [str(number) for number in sorted(versions)], "platform": PLATFORM}
        properties = {"task": live.card.task, "title": live.card.title, "parameters": ",".join(model.parameters)}
        tensors = {"inputs": _metadata(model.inputs), "outputs": _metadata(model.outputs)}
        return json_response({**told, **tensors, "properties": properties})

    @add_routes(
        routes,
        "GET",
        "/config",
        operation_id="get_model_configuration",
        summary="Get the configuration of a model",
        openapi_extra=WITH_TIMEOUT,
        responses=success_response(ModelConfiguration, description="The configuration"),
    )
    async def config(request: Request, name: SeriesModel) -> Response:
        """Get a model's configuration in Triton's format."""
        live = await model_in_path(registry, request, name, set_deadline(request, limits.settings.request_seconds))
        return json_response(_config(live, tensor_model(live, limits)))

    @add_routes(
        routes,
        "GET",
        "/ready",
        operation_id="get_model_ready",
        summary="Check that a model is ready",
        openapi_extra=WITH_TIMEOUT,
        responses=success_response(ModelReady, description="The model is ready"),
    )
    async def model_ready(request: Request, name: SeriesModel) -> Response:
        """Check that a model answers requests. The status is 404 or 503 with the reason if it does not."""
        await registry.recheck(name.partition("@")[0])  # another process may just have been told to load or unload it
        live = await model_in_path(registry, request, name, set_deadline(request, limits.settings.request_seconds))
        if problems := registry.problems():
            raise NotReady("; ".join(problems))
        return json_response({"name": live.card.name, "ready": True})


def _metadata(specs: list[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatypes[0], "shape": spec.shape} for spec in specs]


def _config(live: LoadedModel, model: TensorModel) -> dict[str, Any]:
    def tensors(specs: list[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": TYPES.get(spec.datatypes[0], f"TYPE_{spec.datatypes[0]}"),
                "dims": spec.shape[1:] or [1],
            }
            for spec in specs
        ]

    return {
        "name": live.card.name,
        "platform": PLATFORM,
        "backend": "quartet",
        "max_batch_size": model.rows,
        "input": tensors(model.inputs),
        "output": tensors(model.outputs),
        "dynamic_batching": {},
    }


class TensorInference(Inference[Any]):
    """Computes the outputs of a tensor model. ``limit`` bounds the body in bytes, also after decompression."""

    def __init__(
        self, model: LoadedModel, tensors: TensorModel, content: bytes, coding: str, json_length: str, limit: int
    ) -> None:
        super().__init__(model)
        self.parse_size = limit if coding in DECOMPRESSORS else len(content) // BYTES_PER_VALUE
        self.tensors = tensors
        self.content = content
        self.coding = coding
        self.json_length = json_length
        self.limit = limit

    def parse(self) -> Sequence[Any]:
        tensors = self.tensors
        only = tensors.inputs[0] if len(tensors.inputs) == 1 else None
        content = decompress(self.content, self.coding, self.limit)
        self.decoded = decode_request(content, self.json_length, tensors.values, tensors.commas, only)
        check_inputs(tensors, self.decoded)
        requested_outputs(self.decoded.body, {spec.name: spec for spec in tensors.outputs})
        self.items: Sequence[Any] = tensors.items(self.decoded)
        return self.items

    def deadline(self, deadline: float) -> float:
        return earlier_deadline(self.decoded.body.parameters, deadline)

    def response_size(self, outputs: Sequence[Any]) -> int:
        tensors: Any = self.tensors
        return max(self.parse_size, tensors.length(self.items))

    def respond(self, outputs: Sequence[Any]) -> Response:
        tensors: Any = self.tensors
        head = {"model_name": self.model.card.name, "model_version": str(self.model.card.version)}
        if self.decoded.body.id:
            head["id"] = self.decoded.body.id
        arrays = tensors.answers(self.decoded, self.items, outputs)
        return encode_response(head, self.decoded.body, arrays, {spec.name: spec for spec in tensors.outputs})


def _infer(routes: APIRouter, registry: Registry, limits: RequestModels) -> None:
    settings = limits.settings
    binary = {"application/octet-stream": {"schema": BINARY}}

    @add_routes(
        routes,
        "POST",
        "/infer",
        operation_id="infer",
        summary="Run a model on tensors",
        openapi_extra=request_body(InferenceRequest, openapi.INFER_EXAMPLE, others=binary),
        responses=success_response(InferenceResponse, binary, "The output tensors"),
    )
    async def infer(request: Request, name: SeriesModel) -> Response:
        """Run a model on input tensors and return its output tensors.

        Values are in JSON, or binary behind the JSON part (Triton's binary tensor extension). The body may be
        compressed with gzip or deflate.
        """
        deadline = set_deadline(request, settings.request_seconds)
        model = await model_in_path(registry, request, name, deadline)
        model.engine.admit(1)  # reject before the body is read
        tensors = tensor_model(model, limits)
        limit = max_json_bytes(settings.max_body_bytes, VALUE_BYTES * tensors.values + tensors.bytes)
        content = await read_body(request, limit, settings.body_seconds, tuple(DECOMPRESSORS))
        coding, json_length = header(request, b"content-encoding").lower(), header(request, JSON_LENGTH_HEADER)
        inference = TensorInference(model, tensors, content, coding, json_length, limit)
        return await run_inference(request, registry, inference, deadline)
