"""Image generation: ``/v1/images/sample``."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.inference import Call, Protocol, json_endpoint
from app.api.openapi import BINARY
from app.api.operation import Operation
from app.api.request_body import ModelName, RequestBody, Seed, limited
from app.api.request_head import preferred_media_type
from app.api.responses import ERROR_RESPONSES, ModelAnswer, json_response, model_fields
from app.limits import Limits
from app.tasks import SAMPLE
from app.tasks.image_codecs import image_grid, png
from app.tasks.image_generation import SampleAnswer, SampleJob

JSON, PNG = "application/json", "image/png"  # media types of a response, the default first
MAX_LABEL_LENGTH = 200  # characters
DEFAULT_COUNT = 16


class SampleRequest(RequestBody):
    count: int = Field(DEFAULT_COUNT, ge=1, json_schema_extra=limited("max_samples"))
    """number of images"""
    label: str | None = Field(None, max_length=MAX_LABEL_LENGTH)
    """label of the images, for models with labels"""
    seed: Seed | None = None
    """random seed. The same seed gives the same images, for any `count`."""
    end_seed: Seed | None = None
    """interpolate from the first image of `seed` to the first image of this seed"""
    model: ModelName = None


class GeneratedImage(TypedDict):
    label: str | None
    """null for models without labels"""
    image: str
    """PNG file in base64"""


class SampleResponse(ModelAnswer):
    seed: int
    results: list[GeneratedImage]


def encode(call: Call[Any], job: SampleJob, answer: SampleAnswer) -> Response:
    if preferred_media_type(", ".join(call.request.headers.getlist("accept")), (JSON, PNG)) == PNG:
        headers = {"x-model": call.model.id, "x-seed": str(job.seed)}
        return Response(png(image_grid(answer.pixels), level=6), 200, headers, PNG)
    images = zip(answer.labels, encode_images(answer.pixels), strict=True)
    results: list[GeneratedImage] = [{"label": label, "image": image} for label, image in images]
    content: SampleResponse = {**model_fields(call.model), "seed": job.seed, "results": results}
    return json_response(content)


def encode_images(pixels: np.ndarray) -> list[str]:
    """Encode pixels [N, channels, height, width] as N PNG files in base64."""
    return [base64.b64encode(png(image)).decode() for image in pixels]


@json_endpoint(SAMPLE, SampleRequest, Protocol(encode))
def sample_images(body: SampleRequest, limits: Limits) -> SampleJob:
    """Generate images from a seed. If the model has labels, `label` selects the label of the images.

    The `Accept` header selects the format. The response is JSON with PNG files in base64, or one PNG image that shows
    all generated images (`image/png`).
    """
    count = body.count if "count" in body.model_fields_set else min(DEFAULT_COUNT, limits.max_samples)
    return SampleJob(count, body.label, -1 if body.seed is None else body.seed, body.end_seed)


OPERATIONS = [
    Operation(
        "POST",
        "/v1/images/sample",
        sample_images,
        "Tasks",
        "Generate images",
        SampleResponse,
        "The images as PNG files, or one image",
        {PNG: {"schema": BINARY}},
        SampleRequest,
        {"count": 4, "seed": 1},
        errors=ERROR_RESPONSES,
    )
]
