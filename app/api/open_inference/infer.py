"""Inference on tensors under ``/v2``.

The Content-Type header of a request is ignored, because tritonclient sends no such header or a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import openapi
from app.api.deadline import set_deadline
from app.api.inference import Inference, record_version, run_inference
from app.api.open_inference.decode import (
    DECOMPRESSORS,
    JSON_LENGTH_HEADER,
    InferenceRequest,
    decode_request,
    decompress,
)
from app.api.open_inference.encode import encode_response, requested_outputs
from app.api.open_inference.paths import ModelPath, add_routes, model_in_path
from app.api.open_inference.responses import FAILURES, InferenceResponse
from app.api.open_inference.tensors import (
    RequestSchemas,
    TensorModel,
    check_inputs,
    earlier_deadline,
    tensor_model,
)
from app.api.openapi import BINARY, request_body
from app.api.request_body import BYTES_PER_VALUE, max_json_bytes, read_body
from app.api.request_head import header
from app.api.responses import success_response
from app.serving.model import Engine, Model
from app.serving.models import Models
from app.settings import Settings
from app.tasks.text_generation import Continuation, memory_bytes

VALUE_BYTES = 26  # largest size of a value in JSON; a binary value has at most 8 bytes


class TensorInference(Inference[Any]):
    """Computes the output tensors of a model. ``limit`` is the largest size, in bytes, of the decompressed body."""

    def __init__(
        self, model: Model, tensors: TensorModel, content: bytes, coding: str, json_length: str, limit: int
    ) -> None:
        super().__init__(model)
        self.engine = tensors_engine(model)
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
        self.memory_bytes = 0 if content is self.content else len(content)
        has_rows = bool(tensors.rows)
        self.decoded = decode_request(content, self.json_length, tensors.values, tensors.commas, only, has_rows)
        check_inputs(tensors, self.decoded)
        requested_outputs(self.decoded.body, {spec.name: spec for spec in tensors.outputs})
        self.items: Sequence[Any] = tensors.items(self.decoded)
        self.memory_bytes += memory_bytes([item for item in self.items if isinstance(item, Continuation)])
        return self.items

    def engine_deadline(self, deadline: float) -> float:
        return earlier_deadline(self.decoded.body.parameters, deadline)

    def response_size(self, outputs: Sequence[Any]) -> int:
        tensors: Any = self.tensors
        return max(self.parse_size, tensors.response_size(self.items, outputs))

    def respond(self, outputs: Sequence[Any]) -> Response:
        tensors: Any = self.tensors
        head = {"model_name": self.model.card.name, "model_version": str(self.model.card.version)}
        if self.decoded.body.id:
            head["id"] = self.decoded.body.id
        arrays = tensors.outputs_of(self.decoded, self.items, outputs)
        return encode_response(head, self.decoded.body, arrays, {spec.name: spec for spec in tensors.outputs})


def tensors_engine(model: Model) -> Engine:
    """Return the engine that runs a model on tensors. An imported classifier has one for images too."""
    return model.tensors or model.engine


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the route ``infer`` of every model. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=FAILURES)
    schemas = RequestSchemas.build(settings)
    binary = {"application/octet-stream": {"schema": BINARY}}

    @add_routes(
        routes,
        "POST",
        "/infer",
        operation_id="infer",
        summary="Run a model on tensors",
        openapi_extra=request_body(InferenceRequest, openapi.INFER_EXAMPLE, others=binary),
        responses=success_response(InferenceResponse, "The output tensors", binary),
    )
    async def infer(request: Request, name: ModelPath) -> Response:
        """Run a model on input tensors and return its output tensors.

        The values of a tensor are in JSON, or in binary form after the JSON part (Triton's binary tensor extension).
        The body may be compressed with gzip or deflate.
        """
        deadline = set_deadline(request, settings.request_seconds)
        model = await model_in_path(models, request, name, deadline)
        record_version(model)
        tensors_engine(model).admit(1)  # reject before the body is read
        tensors = tensor_model(model, schemas)
        limit = max_json_bytes(settings.max_body_bytes, VALUE_BYTES * tensors.values + tensors.bytes)
        content = await read_body(request, limit, settings.body_seconds, tuple(DECOMPRESSORS))
        coding, json_length = header(request, b"content-encoding").lower(), header(request, JSON_LENGTH_HEADER)
        inference = TensorInference(model, tensors, content, coding, json_length, limit)
        return await run_inference(request, models, inference, deadline)

    return routes
