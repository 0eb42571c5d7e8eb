"""Say what is in images."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.responses import Response
from torch import Tensor

from app.api import openapi
from app.api.deadline import Deadline, deadline, run_before_deadline
from app.api.headers import header
from app.api.inference import resolve_model
from app.api.openapi import query_parameters, request_body
from app.api.request import (
    BINARY,
    BYTES_PER_VALUE,
    EXTRA_COMMAS,
    BodyReader,
    ModelName,
    RequestBody,
    json_response,
    read_body,
    read_form,
    read_json,
    read_query,
    with_limits,
)
from app.api.responses import ClassifyResponse, success_response, with_model
from app.engine.executor import INLINE_SIZE
from app.errors import BadValue, NotAnImage, TooLarge, quote_value
from app.serving.registry import Registry
from app.settings import Settings
from app.tasks import CLASSIFY
from app.tasks.classification import ImageClassifier, is_simple_image, overlay_heat_map

SMALL_BYTES = 32 * 1024  # of images that are looked at at once


class ClassifyQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: ModelName = None
    top_k: int = Field(5, ge=1, le=1000, description="how many of the likeliest labels to give")
    explain: bool = Field(
        False,
        description="show on the image what speaks for the likeliest label, as a PNG in base64; all images together "
        "may then have as many pixels as one",
    )


class ClassifyRequest(RequestBody):
    """The same images as in a form, for callers that only speak JSON."""

    images: list[str] = Field(description="each a whole image file in base64", min_length=1)


def add(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    """``/v1/images/classify``, with the limits of the settings."""
    images = with_limits(ClassifyRequest, images={"max_length": settings.max_images})
    reading = BodyReader(settings.max_body_bytes, settings.body_seconds, registry.parse_executor)

    @routes.post(
        "/images/classify", openapi_extra=_image_bodies(images, settings), responses=success_response(ClassifyResponse)
    )
    async def classify(request: Request) -> Response:
        """Say what is in an image: a form with `file` (several times for several), the bytes of one image, or JSON.

        Any size, mode and orientation of PNG, JPEG, WebP, GIF (first frame), BMP and TIFF; the whole picture is seen.
        """
        until = deadline(request, settings.request_seconds)
        query = read_query(request, ClassifyQuery)
        live = await resolve_model(request, registry, CLASSIFY, query.model, until)
        live.engine.admit(1)  # a full queue is told before a body is read
        files = await _files(request, images, settings, reading)
        explanations: list[dict[str, Any]] = [{}] * len(files)
        answers: Sequence[list[float]]
        async with Deadline(request, until):
            if query.explain:
                await registry.parse_executor.run(_check_sizes, files, live.predictor, settings.max_pixels)
            items = await _pixels(files, live.predictor, registry)
            if query.explain:
                assert live.explainer
                answers, heats = zip(*await live.explainer.submit(items), strict=True)
                explanations = [  # one by one: none is begun when nobody waits any more
                    await registry.parse_executor.run_admitted(
                        _explanation, file, heat, live.predictor, settings.max_pixels
                    )
                    for file, heat in zip(files, heats, strict=True)
                ]
            else:
                answers = await live.engine.submit(items)
        labels = live.predictor.labels
        results = [
            {"filename": file.name, "predictions": _best(labels, probabilities, query.top_k), **explanation}
            for file, probabilities, explanation in zip(files, answers, explanations, strict=True)
        ]
        return json_response(with_model(live, results=results))


def _image_bodies(images: type[ClassifyRequest], settings: Settings) -> dict[str, Any]:
    """The three ways to send images, for OpenAPI; the first has an example that works as it stands."""
    files = {"type": "array", "items": BINARY, "maxItems": settings.max_images}
    form = {"type": "object", "properties": {"file": files}, "required": ["file"], "additionalProperties": False}
    raw = {f"image/{kind}": {"schema": BINARY} for kind in ("png", "jpeg", "webp")}
    bodies = request_body(images, openapi.CLASSIFY_EXAMPLE, **{"multipart/form-data": {"schema": form}, **raw})
    return {**bodies, **query_parameters(ClassifyQuery)}


@dataclass(frozen=True)
class ImageFile:
    """An image as it was sent, and how sentences name it."""

    name: str | None
    content: bytes
    param: str


async def _files(
    request: Request, images: type[ClassifyRequest], settings: Settings, reading: BodyReader
) -> list[ImageFile]:
    """The images that were sent. Raises BadValue, NotAnImage, and as ``bodies.read`` does."""
    kind = header(request, b"content-type").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await read_json(request, images, reading, settings.max_images + EXTRA_COMMAS, ClassifyQuery.model_fields)
        length = sum(map(len, body.images))
        return await run_before_deadline(request, reading.executor, length // BYTES_PER_VALUE, _of_base64, body.images)
    if kind != "multipart/form-data":
        return [ImageFile(None, await read_body(request, reading.limit, reading.seconds), "body")]
    form = await read_form(request, reading, settings.max_images)
    try:
        files: list[ImageFile] = []
        for field, value in form.multi_items():
            if field != "file":
                raise BadValue(f"there is no form field {quote_value(field)}; the images go into 'file'", field)
            if not isinstance(value, UploadFile):
                raise BadValue(
                    f"file is the text {quote_value(value)}; send the image as a file, with a filename", "file"
                )
            param = f"file.{len(files)}" if len(form.multi_items()) > 1 else "file"
            files.append(ImageFile(value.filename, await value.read(), param))
    finally:
        await form.close()
    if not files:
        raise BadValue(f"file is missing; send from 1 to {settings.max_images} images", "file")
    return files


def _of_base64(images: list[str]) -> list[ImageFile]:
    return [ImageFile(None, _decoded(text, f"images.{i}"), f"images.{i}") for i, text in enumerate(images)]


async def _pixels(files: list[ImageFile], predictor: ImageClassifier, registry: Registry) -> list[Tensor]:
    """The images as items. Small ones are decoded at once: that takes no longer than a change of threads.

    Raises NotAnImage and TooLarge.
    """
    parsing, most = registry.parse_executor, registry.settings.max_pixels
    if sum(len(file.content) for file in files) <= SMALL_BYTES and all(is_simple_image(file.content) for file in files):
        images = [predictor.open(file.content, most, file.param) for file in files]
        if sum(image.width * image.height for image in images) <= BYTES_PER_VALUE * INLINE_SIZE:
            return [predictor.decode(image, file.param) for image, file in zip(images, files, strict=True)]
    return await parsing.run(lambda: [predictor.parse(file.content, most, file.param) for file in files])


def _check_sizes(files: list[ImageFile], predictor: ImageClassifier, most: int) -> None:
    """Raises TooLarge for images that have more pixels in all than one may have, and as ``open`` does.

    Those that are explained are all sent back.
    """
    sizes = [predictor.open(file.content, most, file.param).size for file in files]
    if (total := sum(width * height for width, height in sizes)) > most:
        told = f"the images have {total:,} pixels in all; with explain allowed are {most:,}"
        raise TooLarge(told, "explain")


def _explanation(file: ImageFile, heat: np.ndarray, predictor: ImageClassifier, most: int) -> dict[str, Any]:
    """An image as it was sent with its heat map over it, as a PNG file in base64."""
    content = overlay_heat_map(predictor.open(file.content, most, file.param), heat)
    return {"explanation": base64.b64encode(content).decode()}


def _decoded(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NotAnImage(f"{param} is {quote_value(text)}; it should be an image file in base64", param) from error


def _best(labels: list[str], probabilities: list[float], top_k: int) -> list[dict[str, Any]]:
    order = sorted(range(len(labels)), key=lambda index: -probabilities[index])[:top_k]
    return [{"label": labels[index], "index": index, "probability": round(probabilities[index], 8)} for index in order]
