"""Draw images."""

from __future__ import annotations

import base64
import secrets

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from app.api import openapi
from app.api.deadline import Deadline, deadline
from app.api.headers import header
from app.api.inference import resolve_model
from app.api.openapi import request_body
from app.api.request import (
    BINARY,
    BYTES_PER_VALUE,
    EXTRA_COMMAS,
    BodyReader,
    ModelName,
    RequestBody,
    Seed,
    json_response,
    max_json_bytes,
    preferred_media_type,
    read_json,
    with_limits,
)
from app.api.responses import ImagesResponse, success_response, with_model
from app.serving.registry import Registry
from app.settings import Settings
from app.tasks import GENERATE_IMAGES
from app.tasks.image_generation import ImageSampler, LatentBatch, animated, png, sheet

SHEETS = ("application/json", "image/png")
WALKS = (*SHEETS, "image/apng", "image/webp")


class GenerateImagesRequest(RequestBody):
    count: int = Field(16, ge=1)
    label: str | None = Field(None, description="what to draw, for models that have labels", max_length=200)
    seed: Seed | None = Field(None, description="image i of a seed never changes")
    walk_to: Seed | None = Field(None, description="lead from the first image of `seed` to the first one of this seed")
    model: ModelName = None


def add(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    """``/v1/images/sample``, with the limits of the settings."""
    parsing = registry.parse_executor
    draws = with_limits(GenerateImagesRequest, count={"le": settings.max_samples})
    reading = BodyReader(max_json_bytes(settings.max_body_bytes, 0), settings.body_seconds, parsing)

    @routes.post(
        "/images/sample",
        openapi_extra=request_body(draws, openapi.GENERATE_IMAGES_EXAMPLE),
        responses=success_response(ImagesResponse, {kind: {"schema": BINARY} for kind in WALKS[1:]}),
    )
    async def sample(request: Request) -> Response:
        """Draw images. With `Accept: image/png` the answer is one sheet of them.

        A walk is then an animated PNG of them, and with `image/webp` an animated WebP.
        """
        until = deadline(request, settings.request_seconds)
        body = await read_json(request, draws, reading, EXTRA_COMMAS + 200)
        live = await resolve_model(request, registry, GENERATE_IMAGES, body.model, until)
        live.engine.admit(body.count)
        seed = secrets.randbelow(2**32) if body.seed is None else body.seed
        headers = {"x-model": live.id, "x-seed": str(seed)}
        async with Deadline(request, until):
            size = body.count * live.predictor.latent
            drawing = await parsing.run_or_inline(size, _drawing, live.predictor, body, seed)
            (pixels,) = await live.engine.submit([drawing])
            kind = preferred_media_type(header(request, b"accept"), SHEETS if body.walk_to is None else WALKS)
            if kind != "application/json":
                return Response(await parsing.run_admitted(_picture, pixels, kind, body.walk_to), 200, headers, kind)
            images = await parsing.run_admitted_or_inline(pixels.size // BYTES_PER_VALUE, encode_images, pixels)
        names = live.predictor.names(drawing)
        results = [{"label": name, "image": image} for name, image in zip(names, images, strict=True)]
        return json_response(with_model(live, seed=seed, results=results))


def _picture(pixels: np.ndarray, kind: str, walk_to: int | None) -> bytes:
    return png(sheet(pixels), level=6) if walk_to is None else animated(pixels, kind)


def _drawing(sampler: ImageSampler, body: GenerateImagesRequest, seed: int) -> LatentBatch:
    """What a request wants drawn. Raises BadValue."""
    if body.walk_to is None:
        return sampler.parse(body.count, body.label, seed)
    return sampler.walk(body.count, body.label, seed, body.walk_to)


def encode_images(pixels: np.ndarray) -> list[str]:
    """Pixels [N, channels, height, width] as PNG files in base64."""
    return [base64.b64encode(png(image)).decode() for image in pixels]
