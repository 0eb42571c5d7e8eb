"""OpenAI's image generation: ``/v1/images/generations``. A prompt can name labels, such as "three sevens and a 2"."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from app.api import openapi
from app.api.inference import Inference, InferenceBody, JsonEndpoint
from app.api.openai.prompt_labels import prompt_labels
from app.api.openai.responses import ImageGenerationResponse
from app.api.openapi import request_body
from app.api.request_body import BYTES_PER_VALUE, ModelName, Seed, with_limits
from app.api.responses import ERROR_RESPONSES, json_response, success_response
from app.api.routes.generate_images import encode_images
from app.errors import BadValue, quote_value
from app.serving.model import Model
from app.serving.models import Models
from app.settings import Settings
from app.tasks import GENERATE_IMAGES
from app.tasks.image_generation import ImageSampler, LatentBatch

MAX_PROMPT_LENGTH = 1000  # characters


class ImageGenerationRequest(InferenceBody):
    prompt: str = Field(
        description='labels of the images, such as "three sevens and a 2". The prompt "digits" gives random labels.',
        max_length=MAX_PROMPT_LENGTH,
    )
    model: ModelName = None
    n: int | None = Field(None, ge=1, description="how many times to generate the images that the prompt names")
    response_format: str | None = Field(None, description="must be `b64_json`, because the service stores no files")
    size: str | None = Field(
        None, description="`auto`, or the size of the model's images, such as `28x28`", max_length=100
    )
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    seed: Seed | None = Field(None, description="random seed. The same seed gives the same images.")
    user: str | None = Field(None, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")


class ImageGenerationInference(Inference[ImageSampler]):
    """Generates the images that a prompt asks for. Raises BadValue for a prompt with an unknown label."""

    def __init__(self, model: Model[ImageSampler], body: ImageGenerationRequest, max_samples: int) -> None:
        super().__init__(model)
        self.predictor = model.predictor
        self._check(body)
        label_counts, n = prompt_labels(body.prompt, self.predictor.labels, model.card.name), body.n or 1
        count = sum(label_count for _, label_count in label_counts) * n if label_counts else n
        if not count:
            raise BadValue(f"prompt is {quote_value(body.prompt)}; it asks for no image", "prompt")
        if count > max_samples:  # before the list of labels is built
            raise BadValue(f"the prompt asks for {count:,} images; the maximum is {max_samples:,}", "prompt")
        self.labels = [label for label, label_count in label_counts for _ in range(label_count)] * n
        self.rows, self.parse_size = count, count * self.predictor.latent
        self.seed = secrets.randbelow(2**32) if body.seed is None else body.seed

    def _check(self, body: ImageGenerationRequest) -> None:
        """Raise BadValue for a response format or an image size that is not available."""
        if body.response_format not in (None, "b64_json"):
            allowed = "it should be 'b64_json': this service stores no images, so it has no URLs for them"
            raise BadValue(f"response_format is {quote_value(body.response_format)}; {allowed}", "response_format")
        name, size = self.predictor.card.name, self.predictor.size
        if body.size not in (None, "auto", size):
            allowed = (
                f"{name} generates images of {size}; auto is also allowed"
                if size
                else f"for {name}, only auto is allowed"
            )
            raise BadValue(f"size is {quote_value(body.size)}; {allowed}", "size")

    def parse(self) -> list[LatentBatch]:
        if self.labels:
            self.batch = self.predictor.for_labels(self.labels, self.seed)
        else:
            self.batch = self.predictor.parse(self.rows, None, self.seed)
        return [self.batch]

    def response_size(self, outputs: Sequence[np.ndarray]) -> int:
        return outputs[0].size // BYTES_PER_VALUE

    def respond(self, outputs: Sequence[np.ndarray]) -> Response:
        height, width = outputs[0].shape[2:]
        pairs = zip(encode_images(outputs[0]), self.predictor.names(self.batch), strict=True)
        data = [{"b64_json": image} | ({} if label is None else {"revised_prompt": label}) for image, label in pairs]
        return json_response(
            {
                "created": int(time.time()),
                "data": data,
                "size": f"{width}x{height}",
                "output_format": "png",
                "background": "opaque",
                "model": self.model.card.name,
                "version": self.model.card.version,
                "seed": self.seed,
            }
        )


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the route ``/v1/images/generations``. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERROR_RESPONSES)
    body_model = with_limits(ImageGenerationRequest, n={"le": settings.max_samples})
    endpoint = JsonEndpoint(
        models,
        GENERATE_IMAGES,
        body_model,
        lambda _, model, body: ImageGenerationInference(model, body, settings.max_samples),
        content_commas=MAX_PROMPT_LENGTH,
    )

    @routes.post(
        "/images/generations",
        operation_id="create_image",
        summary="Create images",
        openapi_extra=request_body(body_model, openapi.IMAGE_GENERATION_EXAMPLE),
        responses=success_response(ImageGenerationResponse, description="The images as PNG files"),
    )
    async def generate(request: Request) -> Response:
        """Generate images for the labels in a prompt, like OpenAI's image endpoint.

        A prompt without a label, such as "digits", gives images of random labels.
        """
        return await endpoint.run(request)

    return routes
