"""Image classification: ``/v1/images/classify``."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response
from torch import Tensor

from app.api import openapi
from app.api.deadline import Deadline, run_before_deadline, set_deadline
from app.api.image_decoding import LARGE_PIXELS, decode_images
from app.api.inference import Inference, record_version, resolve_model, run_inference
from app.api.openapi import BINARY, request_body
from app.api.request_body import (
    BYTES_PER_VALUE,
    EXTRA_COMMAS,
    BodyReader,
    ModelName,
    RequestBody,
    parse_json,
    read_body,
    read_form,
    with_limits,
)
from app.api.request_head import header, read_query
from app.api.responses import (
    ClassifyResponse,
    ErrorBody,
    error_responses,
    json_response,
    success_response,
    with_model,
)
from app.engine.executor import INLINE_SIZE
from app.errors import BadValue, NotAnImage, TooLarge, quote_value
from app.serving.model import Model
from app.serving.models import Models
from app.settings import Settings
from app.tasks import CLASSIFY
from app.tasks.classification import ImageClassifier
from app.tasks.image_codecs import OpenedImage, is_simple_image, overlay_heat_map, pixel_count

PNG_PART = 3 * 2**18  # bytes that are encoded at a time, a multiple of 3
BASE64_PART = 2**20  # characters that are decoded at a time, a multiple of 4; this takes 1 ms
JSON_START = 64  # bytes in which a JSON object begins, perhaps after white space
SMALL_BYTES = 32 * 1024  # files of up to this size in all may be decoded on the event loop


FAILURES = error_responses(
    ErrorBody,
    "400: invalid value. 401: missing or unknown API key. 404: unknown model. 408: the body arrived too slowly. "
    "413: too large. 415: not an image.",
)


class ClassifyQuery(BaseModel):
    model: ModelName = None
    top_k: int = Field(5, ge=1, le=1000, description="number of labels for each image, most probable first")
    explain: bool = Field(
        False,
        description="whether to add a heat map of the pixels that support the most probable label, as a PNG file in "
        "base64. The limit on the pixels of one image then applies to all images together.",
    )


class ClassifyRequest(RequestBody):
    """Images in base64, for clients that cannot send a form."""

    images: list[str] = Field(description="image files in base64", min_length=1)


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the route ``/v1/images/classify``. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v1", tags=["Tasks"], responses=FAILURES)
    body_model = with_limits(ClassifyRequest, images={"max_length": settings.max_images})
    reader = BodyReader(settings.max_body_bytes, settings.body_seconds, models.parse_executor)

    @routes.post(
        "/images/classify",
        operation_id="classify_images",
        summary="Classify images",
        openapi_extra=_image_bodies(body_model, settings),
        responses=success_response(ClassifyResponse, description="The most probable labels of each image"),
    )
    async def classify(request: Request) -> Response:
        """Return the most probable labels of one or several images.

        Send a multipart form with one or several files named `file`, JSON with images in base64, or the bytes of one
        image file. PNG, JPEG, WebP, GIF (first frame), BMP and TIFF files of any shape and orientation are allowed, up
        to `QUARTET_MAX_PIXELS` pixels. The service scales each image to the size that the model reads.
        """
        deadline = set_deadline(request, settings.request_seconds)
        query = read_query(request, ClassifyQuery)
        model = await resolve_model(request, models, CLASSIFY, query.model, deadline)
        record_version(model)
        engine = model.explainer if query.explain else model.engine
        if engine:  # imported networks have no explainer
            engine.admit(1)  # reject before the body is read
        files = await _files(request, body_model, settings, reader)
        inference = ClassifyInference(model, files, query.top_k, settings.max_pixels)
        if query.explain:
            return await _explain(request, models, inference, deadline)
        if not inference.items:
            with Deadline(request, deadline):
                inference.items = await inference.decode(models)
        return await run_inference(request, models, inference, deadline)

    return routes


def _image_bodies(body_model: type[ClassifyRequest], settings: Settings) -> dict[str, Any]:
    """Return the part of the OpenAPI document that describes the three ways to send images, the form first."""
    files = {"type": "array", "items": BINARY, "maxItems": settings.max_images}
    form = {
        "title": "ClassifyForm",
        "type": "object",
        "properties": {"file": {**files, "description": "image files"}},
        "required": ["file"],
        "additionalProperties": False,
    }
    raw = {f"image/{kind}": {"schema": BINARY} for kind in ("png", "jpeg", "webp")}
    return request_body(body_model, openapi.CLASSIFY_EXAMPLE, query=ClassifyQuery, form=form, others=raw)


@dataclass(frozen=True)
class ImageFile:
    """An image file from a request. ``param`` is its name in error messages."""

    name: str | None
    content: bytes
    param: str


async def _files(
    request: Request, body_model: type[ClassifyRequest], settings: Settings, reader: BodyReader
) -> list[ImageFile]:
    """Return the image files of a request. The body is a form, JSON or the bytes of one image.

    Raises:
        BadValue, NotAnImage: the body has another format.
        QuartetError: any error of ``read_body``.
    """
    media_type = header(request, b"content-type").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        content = await read_body(request, reader.limit, reader.pause_seconds)
        # curl sends JSON as a form by default. No image file begins with a brace.
        if media_type != "application/json" and not content[:JSON_START].lstrip().startswith(b"{"):
            return [ImageFile(None, content, "body")]
        body = await parse_json(request, content, body_model, reader, settings.max_images + EXTRA_COMMAS)
        size = sum(map(len, body.images)) // BYTES_PER_VALUE
        return await run_before_deadline(request, reader.executor, size, _decode_base64_files, body.images)
    form = await read_form(request, reader, settings.max_images)
    files: list[ImageFile] = []
    for field in form:
        if field.name != "file":
            raise BadValue(f"there is no form field {quote_value(field.name)}; the images go into 'file'", field.name)
        if isinstance(field.content, str):
            raise BadValue(
                f"file is the text {quote_value(field.content)}; send the image as a file, with a filename", "file"
            )
        param = f"file.{len(files)}" if len(form) > 1 else "file"
        files.append(ImageFile(field.filename, field.content, param))
    if not files:
        raise BadValue(f"file is missing; send from 1 to {settings.max_images} images", "file")
    return files


def _decode_base64_files(images: list[str]) -> list[ImageFile]:
    return [ImageFile(None, _decode_base64(text, f"images.{i}"), f"images.{i}") for i, text in enumerate(images)]


def _decode_base64(text: str, param: str) -> bytes:
    """Decode a file in parts, because the event loop cannot run while a part is decoded."""
    try:
        parts = []
        for start in range(0, len(text), BASE64_PART):
            part = text[start : start + BASE64_PART]
            if "=" in part and start + BASE64_PART < len(text):
                raise ValueError("padding before the end")
            parts.append(base64.b64decode(part, validate=True))
        return b"".join(parts)
    except (binascii.Error, ValueError) as error:
        raise NotAnImage(f"{param} is {quote_value(text)}; it should be an image file in base64", param) from error


class ClassifyInference(Inference[ImageClassifier]):
    """Classifies the image files of a request. Raises NotAnImage and TooLarge for files that cannot be decoded."""

    def __init__(self, model: Model[ImageClassifier], files: list[ImageFile], top_k: int, max_pixels: int) -> None:
        super().__init__(model)
        self.predictor = model.predictor
        self.files = files
        self.top_k = top_k
        self.max_pixels = max_pixels
        self.items = self._decode_small()

    def open(self, file: ImageFile) -> OpenedImage:
        """Read the header of an image file."""
        return self.predictor.open(file.content, self.max_pixels, file.param)

    def _decode_small(self) -> list[Tensor]:
        """Return the pixels of the images if decoding all of them takes no longer than a thread switch.

        Otherwise return an empty list.
        """
        if sum(len(file.content) for file in self.files) > SMALL_BYTES or not all(
            is_simple_image(file.content) for file in self.files
        ):
            return []
        items, pixels = [], 0
        for file in self.files:
            image = self.open(file)
            pixels += pixel_count(image)
            if pixels > BYTES_PER_VALUE * INLINE_SIZE:
                return []
            items.append(self.predictor.decode(image, file.param))
        return items

    async def decode(self, models: Models) -> list[Tensor]:
        """Return the pixels of the images. Call this within a ``Deadline``."""
        files = ((file.content, file.param) for file in self.files)
        return await decode_images(models, self.predictor, files, self.max_pixels)

    def parse(self) -> list[Tensor]:
        return self.items

    def response_size(self, outputs: Sequence[list[float]]) -> int:
        """Return the number of probabilities that are sorted."""
        return sum(map(len, outputs))

    def respond(self, outputs: Sequence[list[float]], explanations: Sequence[dict[str, Any]] = ()) -> Response:
        top_labels = partial(_top_labels, self.predictor.labels, self.predictor.card.thresholds, self.top_k)
        results = [
            {"filename": file.name, "predictions": top_labels(probabilities), **explanation}
            for file, probabilities, explanation in zip(
                self.files, outputs, explanations or [{}] * len(self.files), strict=True
            )
        ]
        return json_response(with_model(self.model, results=results))


def _top_labels(
    labels: list[str], thresholds: list[float] | None, top_k: int, probabilities: list[float]
) -> list[dict[str, Any]]:
    order = sorted(range(len(labels)), key=probabilities.__getitem__, reverse=True)[:top_k]
    predictions: list[dict[str, Any]] = [
        {"label": labels[index], "index": index, "probability": round(probabilities[index], 8)} for index in order
    ]
    for prediction in predictions if thresholds else ():
        prediction["selected"] = probabilities[prediction["index"]] >= thresholds[prediction["index"]]  # type: ignore[index]
    return predictions


async def _explain(request: Request, models: Models, inference: ClassifyInference, deadline: float) -> Response:
    """Classify the images, and add a heat map of each image.

    Raises:
        BadValue: the model is imported.
        TooLarge: all images together have too many pixels.
        QuartetError: any other error of ``run_inference``.
    """
    executor, explainer = models.parse_executor, inference.model.explainer
    if explainer is None:
        name = inference.model.card.name
        raise BadValue(f"explain is true; heat maps are not supported for imported networks, such as {name}", "explain")
    with Deadline(request, deadline):
        executor.admit()
        if await executor.run(_check_total_pixels, inference) > LARGE_PIXELS:
            executor = models.large_image_executor
        items = inference.items or await inference.decode(models)
        outputs, heat_maps = zip(*await explainer.submit(items), strict=True)
        explanations = [  # one job for each image, so that no more jobs start after a disconnect
            await executor.run(_explanation, inference.open, file, heat_map)
            for file, heat_map in zip(inference.files, heat_maps, strict=True)
        ]
        return await executor.run(inference.respond, outputs, explanations)


def _check_total_pixels(inference: ClassifyInference) -> int:
    """Return the number of pixels of all images together.

    Raise TooLarge if they exceed the limit of one image, because one response contains all of them.
    """
    total = sum(pixel_count(inference.open(file)) for file in inference.files)
    if total > inference.max_pixels:
        raise TooLarge(
            f"the images have {total:,} pixels in all; with explain, the maximum is {inference.max_pixels:,}", "explain"
        )
    return total


def _explanation(
    open_image: Callable[[ImageFile], OpenedImage], file: ImageFile, heat_map: np.ndarray
) -> dict[str, Any]:
    """Return the image with its heat map over it, as a PNG file in base64, already encoded as JSON.

    It is encoded in parts, because the event loop cannot run while a part is encoded.
    """
    content = overlay_heat_map(open_image(file), heat_map)
    parts = [base64.b64encode(content[start : start + PNG_PART]) for start in range(0, len(content), PNG_PART)]
    return {"explanation": orjson.Fragment(b'"%b"' % b"".join(parts))}
