"""OpenAI's image generation: ``/v1/images/generations``. The prompt is a label, or "digits" for random labels."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from app.api.inference import Call, Protocol, json_endpoint
from app.api.operation import Operation
from app.api.request_body import ModelName, RequestBody, Seed, limited
from app.api.responses import ERROR_RESPONSES
from app.api.routes.sample_images import encode_images
from app.errors import BadValue, quote_value
from app.limits import Limits
from app.tasks import SAMPLE
from app.tasks.image_generation import SampleAnswer, SampleJob

MAX_PROMPT_LENGTH = 1000  # characters
RANDOM_LABELS = "digits"


class ImageGenerationRequest(RequestBody):
    prompt: str = Field(max_length=MAX_PROMPT_LENGTH)
    """a label of the model, such as "7". The prompt "digits" gives images of random labels."""
    model: ModelName = None
    n: int | None = Field(None, ge=1, json_schema_extra=limited("max_samples"))
    """number of images"""
    response_format: str | None = None
    """must be `b64_json`, because the service stores no files"""
    size: str | None = Field(None, max_length=100)
    """`auto`, or the size of the model's images, such as `28x28`"""
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    seed: Seed | None = None
    """random seed. The same seed gives the same images."""
    user: str | None = None
    """ignored"""
    safety_identifier: str | None = None
    """ignored"""


class ImageData(TypedDict):
    b64_json: str
    """PNG file in base64"""
    revised_prompt: NotRequired[str]
    """the label of the image; left out for models without labels"""


class ImageGenerationResponse(TypedDict):
    created: int
    """Unix time in seconds"""
    data: list[ImageData]
    size: str
    """width and height in pixels, such as `28x28`"""
    output_format: Literal["png"]
    background: Literal["opaque"]
    model: str
    version: int
    seed: int


def encode(call: Call[Any], job: SampleJob, answer: SampleAnswer) -> ImageGenerationResponse:
    height, width = answer.pixels.shape[2:]
    data: list[ImageData] = []
    for image, label in zip(encode_images(answer.pixels), answer.labels, strict=True):
        data.append({"b64_json": image} if label is None else {"b64_json": image, "revised_prompt": label})
    return {
        "created": job.created,
        "data": data,
        "size": f"{width}x{height}",
        "output_format": "png",
        "background": "opaque",
        "model": call.model.card.name,
        "version": call.model.card.version,
        "seed": job.seed,
    }


@json_endpoint(SAMPLE, ImageGenerationRequest, Protocol(encode))
def create_image(body: ImageGenerationRequest, limits: Limits) -> SampleJob:
    """Generate images of a label, like OpenAI's image endpoint.

    The prompt is a label of the model. The prompt "digits" gives images of random labels.
    """
    if body.response_format not in (None, "b64_json"):
        allowed = "it should be 'b64_json': this service stores no images, so it has no URLs for them"
        raise BadValue(f"response_format is {quote_value(body.response_format)}; {allowed}", "response_format")
    label = None if body.prompt == RANDOM_LABELS else body.prompt
    seed = -1 if body.seed is None else body.seed
    size = None if body.size == "auto" else body.size
    return SampleJob(body.n or 1, label, seed, size=size, names={"count": "n", "label": "prompt"})


OPERATIONS = [
    Operation(
        "POST",
        "/v1/images/generations",
        create_image,
        "OpenAI",
        "Create images",
        ImageGenerationResponse,
        "The images as PNG files",
        body=ImageGenerationRequest,
        example={"prompt": RANDOM_LABELS, "n": 4, "response_format": "b64_json", "seed": 1},
        errors=ERROR_RESPONSES,
    )
]
