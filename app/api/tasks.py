"""The four native endpoints: classify and sample images, continue a text, forecast series."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from starlette.datastructures import UploadFile
from starlette.responses import Response
from torch import Tensor

from app.api import examples
from app.api.answers import FAILURES, Classification, Continuations, Forecasts, Samples
from app.api.bodies import (
    PACKED,
    Body,
    Reading,
    described,
    described_query,
    head,
    json_response,
    limited,
    read,
    read_form,
    read_json,
    read_query,
    wants_png,
)
from app.api.events import EventStream, event
from app.api.patience import Patience, deadline
from app.engine.lane import SMALL
from app.engine.registry import Live, Registry
from app.errors import BadValue, NotAnImage, shown
from app.predictors.cnn import ImageClassifier, overlaid, plain
from app.predictors.gan import ImageSampler, png, sheet
from app.predictors.lstm import Series, SeriesForecaster
from app.predictors.rnn import Continuation, TextContinuer
from app.settings import Settings

BINARY = {"type": "string", "format": "binary"}
JSON_BYTES = 64 * 1024  # of a body, besides its prompt or values
SMALL_BYTES = 32 * 1024  # of images that are looked at at once
NAMES = 64  # commas that a body may have besides those of its values or its prompt
STREAM = {"text/event-stream": {"schema": {"description": "server-sent events"}}}
SEEDS = 2**53  # so that a seed survives every JSON reader

Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Model = Annotated[str | None, Field(description="`name` or `name@version`; by default the task's own", max_length=200)]
Value = Annotated[float, Field(ge=-1e300, le=1e300)] | None
Level = Annotated[float, Field(gt=0, lt=100)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]


def _one_or_many(value: Any) -> str:
    """Whether it is a series or a list of series."""
    return "many" if isinstance(value, list) and value and isinstance(value[0], list) else "one"


def _text_or_list(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


class ClassifyQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Model = None
    top_k: int = Field(5, ge=1, le=1000, description="how many of the likeliest labels to give")
    explain: bool = Field(
        False, description="show on the image what speaks for the likeliest label, as a PNG in base64"
    )


class Images(Body):
    """The same images as in a form, for callers that only speak JSON."""

    images: list[str] = Field(description="each a whole image file in base64", min_length=1)


class Prompt(Body):
    prompt: str = Field("", description="what the text begins with; empty: from nothing")
    max_characters: int = Field(200, ge=1)
    temperature: float = Field(0.8, ge=0, le=10, description="0 takes the likeliest character each time")
    top_k: int | None = Field(None, ge=1, description="draw from so many of the likeliest characters only")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest that have this probability")
    stop: (
        Annotated[
            Annotated[Stop, Tag("one")] | Annotated[list[Stop], Field(max_length=16), Tag("many")],
            Discriminator(_text_or_list),
        ]
        | None
    ) = Field(None, description="where a text ends: a string or a list of them; left out of the text")
    seed: Seed | None = Field(None, description="the same seed gives the same text")
    n: int = Field(1, ge=1, description="how many continuations; number i has the seed + i")
    stream: bool = Field(False, description="send the text while it is written, as server-sent events")
    model: Model = None


class History(Body):
    values: Annotated[
        Annotated[list[Value], Field(fail_fast=True), Tag("one")]
        | Annotated[list[Annotated[list[Value], Field(fail_fast=True)]], Field(fail_fast=True), Tag("many")],
        Discriminator(_one_or_many),
    ] = Field(description="a series or a list of series; null marks a missing value")
    horizon: int = Field(24, ge=1)
    levels: list[Level] = Field([80.0, 95.0], max_length=10, description="per cent that an interval is to hold")
    seasonality: int | None = Field(None, ge=1, description="values in a season, for models that take it")
    model: Model = None


class Draw(Body):
    count: int = Field(16, ge=1)
    label: str | None = Field(None, description="what to draw, for models that have labels", max_length=200)
    seed: Seed | None = Field(None, description="image i of a seed never changes")
    model: Model = None


def router(registry: Registry, settings: Settings) -> APIRouter:
    """The routes, with the limits of the settings."""
    routes = APIRouter(prefix="/v1", tags=["tasks"], responses=FAILURES)
    for add in (_classify, _continue, _forecast, _sample):
        add(routes, registry, settings)
    return routes


def _most(settings: Settings, content: int) -> int:
    """How many bytes a JSON body may have whose prompt or values take up to so many."""
    return min(settings.max_body_bytes, JSON_BYTES + content)


def _classify(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    images = limited(Images, images={"max_length": settings.max_images})
    reading = Reading(settings.max_body_bytes, settings.body_seconds, registry.parsing)

    @routes.post("/images/classify", openapi_extra=_image_bodies(images, settings), responses=_gives(Classification))
    async def classify(request: Request) -> Response:
        """Say what is in an image: a form with `file` (several times for several), the bytes of one image, or JSON.

        Any size, mode and orientation of PNG, JPEG, WebP, GIF (first frame), BMP and TIFF; the whole picture is seen.
        """
        until = deadline(request, settings.request_seconds)
        query = read_query(request, ClassifyQuery)
        live = registry.pick("classify", query.model)
        live.engine.admit(1)  # a full queue is told before a body is read
        files = await _files(request, images, settings, reading)
        assert isinstance(live.predictor, ImageClassifier)
        explanations: list[dict[str, Any]] = [{}] * len(files)
        answers: Sequence[list[float]]
        async with Patience(request, until):
            items = await _pixels(files, live.predictor, registry)
            if query.explain:
                assert live.explainer
                answers, heats = zip(*await live.explainer.submit(items), strict=True)
                explanations = await registry.parsing.run(_explanations, files, heats, live.predictor, settings)
            else:
                answers = await live.engine.submit(items)
        labels = live.predictor.labels
        results = [
            {"filename": file.name, "predictions": _best(labels, probabilities, query.top_k), **explanation}
            for file, probabilities, explanation in zip(files, answers, explanations, strict=True)
        ]
        return json_response(_answer(live, results=results))


def _continue(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    parsing = registry.parsing
    prompts = limited(
        Prompt,
        prompt={"max_length": settings.max_prompt_characters},
        max_characters={"le": settings.max_characters},
        n={"le": settings.max_texts},
    )
    limit = _most(settings, 12 * settings.max_prompt_characters)  # bytes that a character can take, escaped
    reading = Reading(limit, settings.body_seconds, parsing)
    most = settings.max_prompt_characters + 16 * 100 + NAMES  # commas, also those of the stop strings

    @routes.post(
        "/text/continue", openapi_extra=described(prompts, examples.PROMPT), responses=_gives(Continuations, STREAM)
    )
    async def continue_text(request: Request) -> Response:
        """Go on with a text, character by character. With `stream` the characters come as they are drawn."""
        until = deadline(request, settings.request_seconds)
        body = await read_json(request, prompts, reading, most)
        live = registry.pick("continue", body.model)
        assert isinstance(live.predictor, TextContinuer)
        live.engine.admit(body.n)
        begin, stop = live.predictor.begin, [body.stop] if isinstance(body.stop, str) else body.stop or []
        prompt, unknown = await parsing.run_if_long(len(body.prompt), live.predictor.parse, body.prompt)
        first = secrets.randbelow(2**32) if body.seed is None else body.seed
        texts = [
            begin(prompt, body.max_characters, body.temperature, body.top_k, body.top_p, stop, (first + i) % SEEDS)
            for i in range(body.n)
        ]
        if body.stream:
            return EventStream(request, _growth(live, texts, unknown), until, x_model=live.id)
        async with Patience(request, until):
            done = await live.engine.submit(texts)
        results = [{"text": text.text, "finish_reason": text.finish_reason, "seed": text.seed} for text in done]
        return json_response(_answer(live, results=results, unknown_characters=unknown))


async def _growth(live: Live, texts: list[Continuation], unknown: list[str]) -> AsyncGenerator[bytes, None]:
    """An event for each text that has grown, and for each that is finished one that says why."""
    shown, open_texts = [0] * len(texts), set(range(len(texts)))
    async with aclosing(live.follow(texts)) as growth:
        async for _ in growth:
            events = []
            for index in sorted(open_texts):
                text, finished = texts[index], texts[index].finished
                piece = text.settled[shown[index] :]
                if finished:
                    open_texts.remove(index)
                    ended = {"finish_reason": text.finish_reason, "seed": text.seed, "unknown_characters": unknown}
                    events.append(event({"index": index, "text": piece, **ended}))
                elif piece:
                    events.append(event({"index": index, "text": piece}))
                shown[index] += len(piece)
            if events:
                yield b"".join(events)


def _forecast(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    parsing = registry.parsing
    histories = limited(History, horizon={"le": settings.max_horizon})
    limit = _most(settings, 26 * settings.max_series_values)  # bytes that a value can take
    reading = Reading(limit, settings.body_seconds, parsing)
    most = settings.max_series_values + settings.max_series + NAMES

    @routes.post("/series/forecast", openapi_extra=described(histories, examples.HISTORY), responses=_gives(Forecasts))
    async def forecast(request: Request) -> Response:
        """Go on with series of numbers, with intervals."""
        until = deadline(request, settings.request_seconds)
        body = await read_json(request, histories, reading, most)
        live = registry.pick("forecast", body.model)
        assert isinstance(live.predictor, SeriesForecaster)
        live.engine.admit(1)
        async with Patience(request, until):
            items = await parsing.run_if_long(_size(body), _series, live, body, settings)
            answers = await live.engine.submit(items)
            size = len(items) * body.horizon * (1 + len(body.levels))
            return await parsing.run_if_long(size, _forecasts, live, items, answers, body.levels)


def _sample(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    parsing = registry.parsing
    draws = limited(Draw, count={"le": settings.max_samples})
    reading = Reading(_most(settings, 0), settings.body_seconds, parsing)

    @routes.post(
        "/images/sample",
        openapi_extra=described(draws, examples.DRAW),
        responses=_gives(Samples, {"image/png": {"schema": BINARY}}),
    )
    async def sample(request: Request) -> Response:
        """Draw images. With `Accept: image/png` the answer is one sheet of them."""
        until = deadline(request, settings.request_seconds)
        body = await read_json(request, draws, reading, NAMES + 200)
        live = registry.pick("sample", body.model)
        assert isinstance(live.predictor, ImageSampler)
        live.engine.admit(body.count)
        seed = secrets.randbelow(2**32) if body.seed is None else body.seed
        draw = live.predictor.parse
        headers = {"x-model": live.id, "x-seed": str(seed)}
        async with Patience(request, until):
            drawing = await parsing.run_if_long(body.count * live.predictor.latent, draw, body.count, body.label, seed)
            (pixels,) = await live.engine.submit([drawing])
            if wants_png(head(request, b"accept")):
                return Response(await parsing.run(lambda: png(sheet(pixels), level=6)), 200, headers, "image/png")
            encoded = await parsing.run_if_long(pixels.size // PACKED, _encoded, pixels)
        names = live.predictor.names(drawing)
        results = [{"label": name, "image": image} for name, image in zip(names, encoded, strict=True)]
        return json_response(_answer(live, seed=seed, results=results))


def _encoded(pixels: np.ndarray) -> list[str]:
    """Pixels [N, channels, height, width] as PNG files in base64."""
    return [base64.b64encode(png(image)).decode() for image in pixels]


def _answer(live: Live, **rest: Any) -> dict[str, Any]:
    return {"model": live.card.name, "version": live.card.version, **rest}


def _gives(model: type[BaseModel], content: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """What a good answer looks like, for OpenAPI."""
    return {200: {"model": model, "content": content or {}}}


def _image_bodies(images: type[Images], settings: Settings) -> dict[str, Any]:
    """The three ways to send images, for OpenAPI; the first has an example that works as it stands."""
    files = {"type": "array", "items": BINARY, "maxItems": settings.max_images}
    form = {"type": "object", "properties": {"file": files}, "required": ["file"], "additionalProperties": False}
    raw = {f"image/{kind}": {"schema": BINARY} for kind in ("png", "jpeg", "webp")}
    bodies = described(images, examples.IMAGES, **{"multipart/form-data": {"schema": form}, **raw})
    return {**bodies, **described_query(ClassifyQuery)}


@dataclass(frozen=True)
class File:
    """An image as it was sent, and how sentences name it."""

    name: str | None
    content: bytes
    param: str


async def _files(request: Request, images: type[Images], settings: Settings, reading: Reading) -> list[File]:
    """The images that were sent. Raises BadValue, NotAnImage, and as ``bodies.read`` does."""
    kind = head(request, b"content-type").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await read_json(request, images, reading, settings.max_images + NAMES, ClassifyQuery.model_fields)
        length = sum(map(len, body.images))
        return await reading.lane.run_if_long(length // PACKED, _of_base64, body.images)
    if kind != "multipart/form-data":
        return [File(None, await read(request, reading.limit, reading.seconds), "body")]
    form = await read_form(request, reading, settings.max_images)
    try:
        files: list[File] = []
        for field, value in form.multi_items():
            if field != "file":
                raise BadValue(f"there is no form field {shown(field)}; the images go into 'file'", field)
            if not isinstance(value, UploadFile):
                raise BadValue(f"file is the text {shown(value)}; send the image as a file, with a filename", "file")
            param = f"file.{len(files)}" if len(form.multi_items()) > 1 else "file"
            files.append(File(value.filename, await value.read(), param))
    finally:
        await form.close()
    if not files:
        raise BadValue(f"file is missing; send from 1 to {settings.max_images} images", "file")
    return files


def _of_base64(images: list[str]) -> list[File]:
    return [File(None, _decoded(text, f"images.{i}"), f"images.{i}") for i, text in enumerate(images)]


async def _pixels(files: list[File], predictor: ImageClassifier, registry: Registry) -> list[Tensor]:
    """The images as items. Small ones are decoded at once: that takes no longer than a change of threads.

    Raises NotAnImage and TooLarge.
    """
    parsing, most = registry.parsing, registry.settings.max_pixels
    if sum(len(file.content) for file in files) <= SMALL_BYTES and all(plain(file.content) for file in files):
        images = [predictor.open(file.content, most, file.param) for file in files]
        if sum(image.width * image.height for image in images) <= PACKED * SMALL:
            return [predictor.decode(image, file.param) for image, file in zip(images, files, strict=True)]
    return await parsing.run(lambda: [predictor.parse(file.content, most, file.param) for file in files])


def _explanations(
    files: list[File], heats: Sequence[np.ndarray], predictor: ImageClassifier, settings: Settings
) -> list[dict[str, Any]]:
    """Each image as it was sent with its heat map over it, as a PNG file in base64."""
    drawn = (
        overlaid(predictor.open(file.content, settings.max_pixels, file.param), heat)
        for file, heat in zip(files, heats, strict=True)
    )
    return [{"explanation": base64.b64encode(content).decode()} for content in drawn]


def _decoded(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NotAnImage(f"{param} is {shown(text)}; it should be an image file in base64", param) from error


def _best(labels: list[str], probabilities: list[float], top_k: int) -> list[dict[str, Any]]:
    order = sorted(range(len(labels)), key=lambda index: -probabilities[index])[:top_k]
    return [{"label": labels[index], "index": index, "probability": round(probabilities[index], 8)} for index in order]


def _size(body: History) -> int:
    """How many values a request has."""
    return sum(len(series) if isinstance(series, list) else 1 for series in body.values)


def _series(live: Live, body: History, settings: Settings) -> list[Series]:
    """The series of a request as items. Raises BadValue."""
    assert isinstance(live.predictor, SeriesForecaster)
    many = bool(body.values) and isinstance(body.values[0], list)
    series: list[Any] = list(body.values) if many else [body.values]
    if body.seasonality is not None:
        raise BadValue(f"seasonality is {body.seasonality}; {live.card.name} has none, so leave it out", "seasonality")
    if len(series) > settings.max_series:
        raise BadValue(f"values has {len(series)} series; allowed are {settings.max_series}", "values")
    if (count := sum(map(len, series))) > settings.max_series_values:
        raise BadValue(f"values has {count:,} values; allowed are {settings.max_series_values:,}", "values")
    if len(set(body.levels)) < len(body.levels):
        raise BadValue(f"levels is {shown(body.levels)}; each may come once", "levels")
    parse = live.predictor.parse
    return [parse(values, body.horizon, f"values.{i}" if many else "values") for i, values in enumerate(series)]


def _forecasts(live: Live, items: list[Series], means: list[np.ndarray], levels: list[float]) -> Response:
    assert isinstance(live.predictor, SeriesForecaster)
    results = []
    for item, mean in zip(items, means, strict=True):
        widths = {repr(level).removesuffix(".0"): live.predictor.half_widths(item, level) for level in levels}
        intervals = {level: {"lower": mean - width, "upper": mean + width} for level, width in widths.items()}
        results.append({"mean": mean, "median": mean, "intervals": intervals, "seasonality": None})
    return json_response(_answer(live, results=results))
