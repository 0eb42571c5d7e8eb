"""Endpoints under ``/v2`` for the names, tensors, configuration and readiness of models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.deadline import set_deadline
from app.api.open_inference.decode import TensorSpec
from app.api.open_inference.paths import ModelPath, add_routes, model_in_path
from app.api.open_inference.responses import FAILURES, ModelConfiguration, ModelMetadata, ModelNames, ModelReady
from app.api.open_inference.tensors import RequestSchemas, TensorModel, tensor_model
from app.api.openapi import WITH_TIMEOUT
from app.api.responses import json_response, success_response
from app.errors import NotReady
from app.serving.model import Model
from app.serving.models import Models
from app.settings import Settings
from app.store import Card

PLATFORMS = {"onnx": "onnxruntime_onnx"}  # all other kinds are pytorch_safetensors
CONFIGURATION_TYPES = {"BYTES": "TYPE_STRING"}  # the name of every other type is TYPE_ plus the data type


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the route ``/v2/models`` and the routes of each model. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=FAILURES)
    _add_names(routes, models)
    _add_descriptions(routes, models, settings)
    _add_readiness(routes, models, settings)
    return routes


def _add_names(routes: APIRouter, models: Models) -> None:
    @routes.get(
        "/models",
        operation_id="list_model_names",
        summary="List the names of all models",
        responses=success_response(ModelNames, description="The names"),
    )
    async def list_models() -> Response:
        """List the names of all models, whether they are loaded or not."""
        return json_response({"models": sorted(models.version_sets)})


def _add_descriptions(routes: APIRouter, models: Models, settings: Settings) -> None:
    schemas = RequestSchemas.build(settings)

    @add_routes(
        routes,
        "GET",
        "",
        operation_id="get_model_metadata",
        summary="Get the tensors of a model",
        openapi_extra=WITH_TIMEOUT,
        responses=success_response(ModelMetadata, description="The model"),
    )
    async def metadata(request: Request, name: ModelPath) -> Response:
        """Get the names, data types and shapes of a model's inputs and outputs. -1 marks a dimension that varies.

        All paths of a model also exist with `/versions/{version}` after the name.
        """
        model = await model_in_path(models, request, name, set_deadline(request, settings.request_seconds))
        card, tensors = model.card, tensor_model(model, schemas)
        version_set = models.version_sets.get(card.name)  # None if the model was removed while the version was loaded
        numbers = version_set.numbers if version_set else [card.version]
        return json_response(
            {
                "name": card.name,
                "versions": [str(number) for number in sorted(numbers)],
                "platform": _platform(card),
                "inputs": _metadata(tensors.inputs),
                "outputs": _metadata(tensors.outputs),
                "properties": {"task": card.task, "title": card.title, "parameters": ",".join(tensors.parameters)},
            }
        )

    @add_routes(
        routes,
        "GET",
        "/config",
        operation_id="get_model_configuration",
        summary="Get the configuration of a model",
        openapi_extra=WITH_TIMEOUT,
        responses=success_response(ModelConfiguration, description="The configuration"),
    )
    async def config(request: Request, name: ModelPath) -> Response:
        """Get a model's configuration in Triton's format."""
        model = await model_in_path(models, request, name, set_deadline(request, settings.request_seconds))
        return json_response(_configuration(model, tensor_model(model, schemas)))


def _add_readiness(routes: APIRouter, models: Models, settings: Settings) -> None:
    @add_routes(
        routes,
        "GET",
        "/ready",
        operation_id="get_model_ready",
        summary="Check that a model is ready",
        openapi_extra=WITH_TIMEOUT,
        responses=success_response(ModelReady, description="The model is ready"),
    )
    async def model_ready(request: Request, name: ModelPath) -> Response:
        """Check that a model answers requests. Otherwise the status is 404 or 503, and the body has the reason."""
        deadline = set_deadline(request, settings.request_seconds)
        await models.recheck(name.partition("@")[0], deadline)  # another process may have loaded or unloaded it
        model = await model_in_path(models, request, name, deadline)
        if problems := models.problems([model]):
            raise NotReady("; ".join(problems))
        return json_response({"name": model.card.name, "ready": True})


def _platform(card: Card) -> str:
    return PLATFORMS.get(card.kind, "pytorch_safetensors")


def _metadata(specs: list[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatypes[0], "shape": spec.shape} for spec in specs]


def _configuration(model: Model, tensors: TensorModel) -> dict[str, Any]:
    """Return a model's configuration in Triton's format."""

    def describe(specs: list[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": CONFIGURATION_TYPES.get(spec.datatypes[0], f"TYPE_{spec.datatypes[0]}"),
                "dims": (spec.shape[1:] or [1]) if tensors.rows else list(spec.shape),
            }
            for spec in specs
        ]

    return {
        "name": model.card.name,
        "platform": _platform(model.card),
        "backend": "quartet",
        "max_batch_size": tensors.rows,
        "input": describe(tensors.inputs),
        "output": describe(tensors.outputs),
        "dynamic_batching": {},
    }
