"""Image generation: ``/v1/images/sample``."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from app.api import openapi
from app.api.inference import Inference, InferenceBody, JsonEndpoint
from app.api.openapi import BINARY, request_body
from app.api.request_body import BYTES_PER_VALUE, ModelName, Seed, with_limits
from app.api.request_head import preferred_media_type
from app.api.responses import ERROR_RESPONSES, ImagesResponse, json_response, success_response, with_model
from app.engine.executor import INLINE_SIZE
from app.serving.model import Model
from app.serving.models import Models
from app.settings import Settings
from app.tasks import GENERATE_IMAGES
from app.tasks.image_codecs import animated, image_grid, png
from app.tasks.image_generation import ImageSampler, LatentBatch

JSON = "application/json"
IMAGE_TYPES = (JSON, "image/png")  # media types of a response, the default first
INTERPOLATION_TYPES = (*IMAGE_TYPES, "image/apng", "image/webp")
MAX_LABEL_LENGTH = 200  # characters


class GenerateImagesRequest(InferenceBody):
    count: int = Field(16, ge=1, description="number of images")
    label: str | None = Field(
        None, description="label of the images, for models with labels", max_length=MAX_LABEL_LENGTH
    )
    seed: Seed | None = Field(None, description="random seed. The same seed gives the same images, for any `count`.")
    end_seed: Seed | None = Field(
        None, description="interpolate from the first image of `seed` to the first image of this seed"
    )
    model: ModelName = None


class ImageInference(Inference[ImageSampler]):
    """Generates the images of a request to ``/v1/images/sample``."""

    def __init__(self, request: Request, model: Model[ImageSampler], body: GenerateImagesRequest) -> None:
        super().__init__(model)
        self.predictor = model.predictor
        self.rows, self.parse_size = body.count, body.count * model.predictor.latent
        self.body = body
        self.seed = secrets.randbelow(2**32) if body.seed is None else body.seed
        media_types = IMAGE_TYPES if body.end_seed is None else INTERPOLATION_TYPES
        self.media_type = preferred_media_type(", ".join(request.headers.getlist("accept")), media_types)

    def parse(self) -> list[LatentBatch]:
        body = self.body
        if body.end_seed is None:
            self.batch = self.predictor.parse(body.count, body.label, self.seed)
        else:
            self.batch = self.predictor.interpolate(body.count, body.label, self.seed, body.end_seed)
        return [self.batch]

    def response_size(self, outputs: Sequence[np.ndarray]) -> int:
        if self.media_type != JSON:
            return INLINE_SIZE + 1  # one large image is compressed on a thread
        return outputs[0].size // BYTES_PER_VALUE

    def respond(self, outputs: Sequence[np.ndarray]) -> Response:
        (pixels,) = outputs
        if self.media_type != JSON:
            content = (
                png(image_grid(pixels), level=6) if self.body.end_seed is None else animated(pixels, self.media_type)
            )
            headers = {"x-model": self.model.id, "x-seed": str(self.seed)}
            return Response(content, 200, headers, self.media_type)
        pairs = zip(self.predictor.names(self.batch), encode_images(pixels), strict=True)
        results = [{"label": label, "image": image} for label, image in pairs]
        return json_response(with_model(self.model, seed=self.seed, results=results))


def encode_images(pixels: np.ndarray) -> list[str]:
    """Encode pixels [N, channels, height, width] as N PNG files in base64."""
    return [base64.b64encode(png(image)).decode() for image in pixels]


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the route ``/v1/images/sample``. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v1", tags=["Tasks"], responses=ERROR_RESPONSES)
    body_model = with_limits(GenerateImagesRequest, count={"le": settings.max_samples})
    endpoint = JsonEndpoint(models, GENERATE_IMAGES, body_model, ImageInference, content_commas=MAX_LABEL_LENGTH)

    @routes.post(
        "/images/sample",
        operation_id="generate_images",
        summary="Generate images",
        openapi_extra=request_body(body_model, openapi.GENERATE_IMAGES_EXAMPLE),
        responses=success_response(
            ImagesResponse,
            "The images as PNG files, or one image",
            {kind: {"schema": BINARY} for kind in INTERPOLATION_TYPES[1:]},
        ),
    )
    async def generate_images(request: Request) -> Response:
        """Generate images from a seed. If the model has labels, `label` selects the label of the images.

        The `Accept` header selects the format. The response is JSON with PNG files in base64, or one PNG image that
        shows all generated images (`image/png`). With `end_seed`, `image/png` and `image/apng` return an animated PNG
        image instead, and `image/webp` returns an animated WebP image.
        """
        return await endpoint.run(request)

    return routes
