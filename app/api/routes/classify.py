"""Image classification: ``/v1/images/classify``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired

from pydantic import Field
from starlette.responses import Response
from torch import Tensor
from typing_extensions import TypedDict

from app.api.deadline import Deadline, run_before_deadline
from app.api.inference import Call, Protocol, resolve, run_job
from app.api.openapi import BINARY, EXAMPLES
from app.api.operation import Operation, Request
from app.api.request_body import (
    BYTES_PER_VALUE,
    Described,
    ModelName,
    RequestBody,
    limited,
    parse_json,
    read_body,
    read_form,
)
from app.api.request_head import read_query
from app.api.responses import BAD_REQUESTS, ErrorBody, ModelAnswer, error_responses, json_response, model_fields
from app.errors import BadValue, NotAnImage, TooLarge, quote_value
from app.serving.models import Models
from app.tasks import CLASSIFY
from app.tasks.classification import ClassifyAnswer, ClassifyJob
from app.tasks.image_codecs import ImageDecoder, OpenedImage, overlay_heat_map, pixel_count

LARGE_PIXELS = 2**24  # larger images, of more than 64 MiB, are decoded one at a time in each process
SMALL_BYTES, SMALL_PIXELS = 32 * 1024, 50_000  # files up to these sizes in all may be decoded on the event loop
JSON_START = 64  # bytes in which a JSON object begins, perhaps after white space

FILES = {"type": "array", "items": BINARY, "description": "image files", "x-limit": ["maxItems", "max_images"]}
FORM = {
    "title": "ClassifyForm",
    "type": "object",
    "properties": {"file": FILES},
    "required": ["file"],
    "additionalProperties": False,
}


class ClassifyQuery(Described):
    model: ModelName = None
    top_k: int = Field(5, ge=1, le=1000)
    """number of labels for each image, most probable first"""
    explain: bool = False
    """whether to add a heat map of the pixels that support the most probable label, as a PNG file in base64. The limit
    on the pixels of one image then applies to all images together."""


class ClassifyRequest(RequestBody):
    """Images in base64, for clients that cannot send a form."""

    images: list[str] = Field(min_length=1, json_schema_extra=limited("max_images", "maxItems"))
    """image files in base64"""


class Prediction(TypedDict):
    label: str
    index: int
    """index of the label in the model's list of labels, from 0"""
    probability: float
    selected: NotRequired[bool]
    """only for models that can assign several labels to an image: whether the probability of the label reaches the
    label's threshold. For these models, the probability does not depend on the other labels."""


class ImageResult(TypedDict):
    filename: str | None
    """name of the file in the form, or null if the body is not a form"""
    predictions: list[Prediction]
    """the `top_k` most probable labels, most probable first"""
    explanation: NotRequired[str]
    """only with `explain`: the image with a heat map over it, as a PNG file in base64"""


class ClassifyResponse(ModelAnswer):
    results: list[ImageResult]
    """one result for each image, in the order of the request"""


@dataclass(frozen=True)
class ImageFile:
    """An image file in a request. ``param`` is its name in error messages."""

    name: str | None
    content: bytes
    param: str


async def classify_images(request: Request) -> Response:
    """Return the most probable labels of one or several images.

    Send a multipart form with one or several files named `file`, JSON with images in base64, or the bytes of one image
    file. PNG, JPEG, WebP, GIF (first frame), BMP and TIFF files of any shape and orientation are allowed, up to
    `QUARTET_MAX_PIXELS` pixels. The service scales each image to the size that the model reads.
    """
    settings = request.settings
    query = read_query(request, ClassifyQuery)
    model = await resolve(request, CLASSIFY, query.model)
    engine = model.explainer if query.explain else model.engine
    if engine:  # imported networks have no explainer
        engine.admit(1)  # reject before the body is read
    files = await _files(request)
    call, decoder = Call(request, files, model), model.predictor
    items = decode_small(decoder, files, settings.max_pixels)
    if query.explain:
        return await _explain(call, ClassifyJob(items, query.top_k))
    if not items:
        async with Deadline(request):
            items = await decode_images(request.models, decoder, files, settings.max_pixels)
    return await run_job(call, ClassifyJob(items, query.top_k), PROTOCOL)


async def _files(request: Request) -> list[ImageFile]:
    """Return the image files of a request. The body is a form, JSON or the bytes of one image.

    Raises:
        BadValue, NotAnImage: the body has another format.
        QuartetError: any error of ``read_body``.
    """
    limit, max_images = request.settings.max_body_bytes, request.limits.max_images
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        content = await read_body(request, limit)
        # curl sends JSON as a form by default. No image file begins with a brace.
        if media_type != "application/json" and not content[:JSON_START].lstrip().startswith(b"{"):
            return [ImageFile(None, content, "body")]
        body = await parse_json(request, content, ClassifyRequest)
        if (count := len(body.images)) > max_images:
            allowed = f"it should have at most {max_images} items, not {count}"
            raise BadValue(f"images is {quote_value(body.images)}; {allowed}", "images")
        size, executor = sum(map(len, body.images)) // BYTES_PER_VALUE, request.models.parse_executor
        return await run_before_deadline(request, executor, size, _decode_base64, body.images)
    form = await read_form(request, limit, max_images)
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
        raise BadValue(f"file is missing; send from 1 to {max_images} images", "file")
    return files


def _decode_base64(images: list[str]) -> list[ImageFile]:
    """Return the image files. Raises NotAnImage."""
    files = []
    for i, text in enumerate(images):
        param = f"images.{i}"
        try:
            files.append(ImageFile(None, base64.b64decode(text, validate=True), param))
        except ValueError as error:
            raise NotAnImage(f"{param} is {quote_value(text)}; it should be an image file in base64", param) from error
    return files


def encode(call: Call[list[ImageFile]], job: ClassifyJob, answer: ClassifyAnswer) -> ClassifyResponse:
    labels, thresholds = call.model.predictor.labels, call.model.card.thresholds
    results: list[ImageResult] = [
        {"filename": file.name, "predictions": _top_labels(labels, thresholds, job.top_k, probabilities)}
        for file, probabilities in zip(call.body, answer.probabilities, strict=True)
    ]
    return {**model_fields(call.model), "results": results}


def _top_labels(
    labels: list[str], thresholds: list[float] | None, top_k: int, probabilities: Sequence[float]
) -> list[Prediction]:
    order = sorted(range(len(labels)), key=probabilities.__getitem__, reverse=True)[:top_k]
    predictions: list[Prediction] = [
        {"label": labels[index], "index": index, "probability": round(probabilities[index], 8)} for index in order
    ]
    if thresholds:
        for prediction in predictions:
            index = prediction["index"]
            prediction["selected"] = probabilities[index] >= thresholds[index]
    return predictions


PROTOCOL = Protocol(encode)


def decode_small(decoder: ImageDecoder, files: Sequence[ImageFile], max_pixels: int) -> list[Tensor]:
    """Return the pixels of image files if decoding all of them takes no longer than a thread switch.

    Otherwise return an empty list. Raises NotAnImage and TooLarge.
    """
    if sum(len(file.content) for file in files) > SMALL_BYTES:
        return []
    items, pixels = [], 0
    for file in files:
        image = decoder.open_simple(file.content, max_pixels, file.param)
        if image is None or (pixels := pixels + pixel_count(image)) > SMALL_PIXELS:
            return []
        items.append(decoder.decode(image, file.param))
    return items


async def decode_images(
    models: Models, decoder: ImageDecoder, files: Sequence[ImageFile], max_pixels: int
) -> list[Tensor]:
    """Return the pixels of image files. Call this within ``Deadline``.

    Each file is a job of its own. So the work ends at the deadline or when the client disconnects, images of other
    requests are decoded in between, and each image counts as progress for ``/health/ready``.

    Raises:
        NotAnImage, TooLarge, OutOfMemory: as in ``ImageDecoder.open`` and ``ImageDecoder.decode``.
        Overloaded: too many requests wait for a thread.
    """

    def open_or_decode(content: bytes, param: str) -> OpenedImage | Tensor:
        image = decoder.open(content, max_pixels, param)
        return image if pixel_count(image) > LARGE_PIXELS else decoder.decode(image, param)

    models.parse_executor.admit()
    items: list[Tensor] = []
    for file in files:
        image = await models.parse_executor.run(open_or_decode, file.content, file.param)
        if not isinstance(image, Tensor):
            image = await models.large_image_executor.run(decoder.decode, image, file.param)
        items.append(image)
    return items


async def _explain(call: Call[list[ImageFile]], job: ClassifyJob) -> Response:
    """Classify the images, and add a heat map of each image.

    Raises:
        BadValue: the model is imported.
        TooLarge: all images together have too many pixels.
        QuartetError: any other error of ``run_job``.
    """
    model, models, decoder = call.model, call.request.models, call.model.predictor
    executor, max_pixels = models.parse_executor, models.settings.max_pixels
    if model.explainer is None:
        name = model.card.name
        raise BadValue(f"explain is true; heat maps are not supported for imported networks, such as {name}", "explain")

    def respond(outputs: Sequence[Any]) -> Response:
        probabilities, heat_maps = zip(*outputs, strict=True)
        content = encode(call, job, ClassifyAnswer(probabilities))
        for file, result, heat_map in zip(call.body, content["results"], heat_maps, strict=True):
            image = decoder.open(file.content, max_pixels, file.param)
            result["explanation"] = base64.b64encode(overlay_heat_map(image, heat_map)).decode()
        return json_response(content)

    executor.admit()
    async with Deadline(call.request):
        if await executor.run(_total_pixels, decoder, call.body, max_pixels) > LARGE_PIXELS:
            executor = models.large_image_executor
        items = job.pixels or await decode_images(models, decoder, call.body, max_pixels)
        return await executor.run(respond, await model.explainer.submit(items))


def _total_pixels(decoder: ImageDecoder, files: Sequence[ImageFile], max_pixels: int) -> int:
    """Return the number of pixels of all images together.

    Raise TooLarge if they exceed the limit of one image, because one response contains all of them.
    """
    total = sum(pixel_count(decoder.open(file.content, max_pixels, file.param)) for file in files)
    if total > max_pixels:
        raise TooLarge(
            f"the images have {total:,} pixels in all; with explain, the maximum is {max_pixels:,}", "explain"
        )
    return total


OPERATIONS = [
    Operation(
        "POST",
        "/v1/images/classify",
        classify_images,
        "Tasks",
        "Classify images",
        ClassifyResponse,
        "The most probable labels of each image",
        body=ClassifyRequest,
        # A test image of CIFAR-10: a horse, 32 x 32 pixels.
        example={"images": [base64.b64encode((EXAMPLES / "horse.jpg").read_bytes()).decode()]},
        other_bodies={
            "multipart/form-data": {"schema": FORM},
            **{f"image/{kind}": {"schema": BINARY} for kind in ("png", "jpeg", "webp")},
        },
        query=ClassifyQuery,
        errors=error_responses(ErrorBody, f"{BAD_REQUESTS} 413: too large. 415: not an image."),
    )
]
