"""Inference on tensors under ``/v2``.

The Content-Type header of a request is ignored, because tritonclient sends no such header or a wrong one.
"""

from __future__ import annotations

from typing import Any, NotRequired

from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.deadline import run_before_deadline
from app.api.inference import Call, Protocol, run_job
from app.api.middleware.body_memory import hold_memory
from app.api.open_inference.decode import (
    DECOMPRESSORS,
    JSON_LENGTH_HEADER,
    DecodedRequest,
    InferenceRequest,
    TensorModel,
    decode_request,
    decompress,
)
from app.api.open_inference.encode import encode_response, requested_outputs
from app.api.open_inference.paths import FAILURES, TAG, model_in_path, model_path
from app.api.open_inference.tensors import MAX_JSON_VALUES, check_inputs, shorten_deadline, tensor_model
from app.api.openapi import BINARY, SALES
from app.api.operation import Operation, Request
from app.api.request_body import BYTES_PER_VALUE, CHARACTER_BYTES, VALUE_BYTES, max_bytes, max_commas, read_body
from app.tasks.job import Job

BINARY_BODY = {"application/octet-stream": {"schema": BINARY}}


class ResponseOutput(TypedDict):
    name: str
    datatype: str
    shape: list[int]
    data: NotRequired[list[Any]]
    """values in row-major order, with null for NaN; left out if the values are binary"""
    parameters: NotRequired[dict[str, Any]]
    """`binary_data_size`: number of bytes of the values after the JSON part"""


class InferenceResponse(TypedDict):
    model_name: str
    model_version: str
    id: NotRequired[str]
    """only if the request has one"""
    outputs: list[ResponseOutput]


async def infer(request: Request) -> Response:
    """Run a model on input tensors and return its output tensors.

    The values of a tensor are in JSON, or in binary form after the JSON part (Triton's binary tensor extension). The
    body may be compressed with gzip or deflate.
    """
    settings = request.settings
    model = await model_in_path(request)
    model = model.tensors or model
    model.engine.admit(1)  # reject before the body is read
    tensors = tensor_model(model.card, settings)
    characters = settings.limits.max_prompt_characters
    limit = max_bytes(request, CHARACTER_BYTES * characters + VALUE_BYTES * tensors.values)
    commas = max_commas(request) + min(tensors.values, MAX_JSON_VALUES)
    content = await read_body(request, limit, tuple(DECOMPRESSORS))
    coding, json_length = (request.headers.get(name, "") for name in ("content-encoding", JSON_LENGTH_HEADER))
    coding = coding.lower()

    def decode() -> tuple[int, DecodedRequest, Job]:
        body = decompress(content, coding, limit)
        decoded = decode_request(body, json_length, tensors, commas)
        check_inputs(tensors, decoded)
        requested_outputs(decoded.body, {spec.name: spec for spec in tensors.outputs})
        return 0 if body is content else len(body), decoded, tensors.decode(model.card, settings, decoded)

    size = limit if coding in DECOMPRESSORS else len(content) // BYTES_PER_VALUE
    new_bytes, decoded, job = await run_before_deadline(request, request.models.parse_executor, size, decode)
    hold_memory(request, new_bytes)
    job.check(settings.limits)
    shorten_deadline(request, decoded.body.parameters)
    return await run_job(Call(request, (tensors, decoded.body), model), job, Protocol(encode))


def encode(call: Call[tuple[TensorModel, InferenceRequest]], job: Job, answer: Any) -> Response:
    (tensors, body), card = call.body, call.model.card
    head = {"model_name": card.name, "model_version": str(card.version), **({"id": body.id} if body.id else {})}
    specs = {spec.name: spec for spec in tensors.outputs}
    return encode_response(head, body, tensors.encode(card, answer), specs)


OPERATIONS = [
    Operation(
        "POST",
        "/v2/models/{name}/infer",
        infer,
        TAG,
        "Run a model on tensors",
        InferenceResponse,
        "The output tensors",
        BINARY_BODY,
        InferenceRequest,
        {
            "parameters": {"horizon": 4, "levels": "80,95"},
            "inputs": [{"name": "values", "datatype": "FP64", "shape": [1, 12], "data": SALES}],
            "outputs": [{"name": "mean"}],
        },
        BINARY_BODY,
        parameters=model_path("series-lstm"),
        errors=FAILURES,
        versioned=True,
    )
]
