"""OpenAI's image generations: the prompt names what is to be drawn, "three sevens and a 2"."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from app.api import openapi
from app.api.deadline import Deadline, deadline
from app.api.inference import resolve_model
from app.api.openai.prompt_labels import prompt_labels
from app.api.openapi import request_body
from app.api.request import (
    BYTES_PER_VALUE,
    EXTRA_COMMAS,
    BodyReader,
    ModelName,
    RequestBody,
    Seed,
    json_response,
    max_json_bytes,
    read_json,
    with_limits,
)
from app.api.routes.generate_images import encode_images
from app.errors import BadValue, quote_value
from app.serving.registry import Registry
from app.settings import Settings
from app.tasks import GENERATE_IMAGES
from app.tasks.image_generation import ImageSampler, LatentBatch


class ImageGenerationRequest(RequestBody):
    prompt: str = Field(
        description='what to draw: "three sevens and a 2", a label, or "digits" for any', max_length=1000
    )
    model: ModelName = None
    n: int | None = Field(None, ge=1, description="how many times to draw what the prompt names")
    response_format: str | None = Field(None, description="`b64_json`: there is no place for files that have a URL")
    size: str | None = Field(None, description="`auto`, or the size that the model draws", max_length=100)
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    seed: Seed | None = Field(None, description="not OpenAI's: image i of a seed never changes")
    user: str | None = None


def add(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    """``/v1/images/generations``, with the limits of the settings."""
    parsing = registry.parse_executor
    bodies = with_limits(ImageGenerationRequest, n={"le": settings.max_samples})
    reading = BodyReader(max_json_bytes(settings.max_body_bytes, 0), settings.body_seconds, parsing)

    @routes.post("/images/generations", openapi_extra=request_body(bodies, openapi.IMAGE_GENERATION_EXAMPLE))
    async def generate(request: Request) -> Response:
        """Draw what a prompt names, for models that draw by label; without a name, whatever comes."""
        until = deadline(request, settings.request_seconds)
        body = await read_json(request, bodies, reading, EXTRA_COMMAS + 1000)
        live = await resolve_model(request, registry, GENERATE_IMAGES, body.model, until)
        predictor = live.predictor
        _check(body, predictor)
        named, n = prompt_labels(body.prompt, predictor.labels, live.card.name), body.n or 1
        count = sum(times for _, times in named) * n if named else n
        if not count:
            raise BadValue(f"prompt is {quote_value(body.prompt)}; it asks for no image", "prompt")
        if count > settings.max_samples:  # before there is a list of so many
            raise BadValue(f"the prompt asks for {count:,} images; allowed are {settings.max_samples:,}", "prompt")
        labels = [label for label, times in named for _ in range(times)] * n
        live.engine.admit(count)
        seed = secrets.randbelow(2**32) if body.seed is None else body.seed

        def draw() -> LatentBatch:
            return predictor.for_labels(labels, seed) if labels else predictor.parse(count, None, seed)

        async with Deadline(request, until):
            drawing = await parsing.run_or_inline(count * predictor.latent, draw)
            (pixels,) = await live.engine.submit([drawing])
            images = await parsing.run_admitted_or_inline(pixels.size // BYTES_PER_VALUE, encode_images, pixels)
        data: list[dict[str, Any]] = [
            {"b64_json": image} | ({} if name is None else {"revised_prompt": name})
            for image, name in zip(images, predictor.names(drawing), strict=True)
        ]
        told = {"size": _size(predictor), "output_format": "png", "background": "opaque"}
        ours = {"model": live.card.name, "version": live.card.version, "seed": seed}
        return json_response({"created": int(time.time()), "data": data, **told, **ours})


def _check(body: ImageGenerationRequest, predictor: ImageSampler) -> None:
    """Raises BadValue for a form in which there are no images here."""
    if body.response_format not in (None, "b64_json"):
        allowed = "allowed is 'b64_json': this service keeps no files, so there is nothing that a URL could name"
        raise BadValue(f"response_format is {quote_value(body.response_format)}; {allowed}", "response_format")
    if body.size not in (None, "auto", _size(predictor)):
        raise BadValue(
            f"size is {quote_value(body.size)}; {predictor.card.name} draws {_size(predictor)}, or 'auto'", "size"
        )


def _size(predictor: ImageSampler) -> str:
    return f"{predictor.network.sizes.image}x{predictor.network.sizes.image}"
