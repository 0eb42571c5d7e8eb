"""Describe each task as a model with input and output tensors, and convert tensors to jobs and answers to tensors.

A description needs only the model card, so that it does not load a network.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from fastapi import Request

from app.api.deadline import DEADLINE, UNIT
from app.api.open_inference.decode import DATATYPES, DecodedRequest, ModelTensor, TensorModel
from app.api.request_body import RequestBody, validate
from app.api.responses import MIN_LOG_PROBABILITY
from app.api.routes.continue_text import SamplingFields
from app.api.routes.forecast import ForecastRequest
from app.api.routes.forecast_table import DEFAULT_HORIZON
from app.errors import BadValue, quote_value
from app.networks import KINDS, is_imported
from app.networks.imported import ImportedSizes
from app.settings import Settings
from app.store import Card, TaskName, TensorSpec
from app.tasks import TASKS
from app.tasks.classification import ClassifyAnswer, ClassifyJob
from app.tasks.forecasting import ForecastAnswer, ForecastJob
from app.tasks.image_generation import SampleAnswer, SampleJob
from app.tasks.imported.tensors import TensorJob
from app.tasks.text_generation import ContinueAnswer, ContinueJob

FLOATS = ("FP64", "FP32")
Outputs = dict[str, np.ndarray]
MAX_JSON_VALUES = 2**20  # largest number of JSON values for an imported network; binary tensors may have more
MAX_LATENT = 1000.0  # standard deviations; larger latents overflow in the network
MAX_VALUE = 1e300
PROTOCOL_PARAMETERS = ("binary_data_output", "timeout", "priority", "headers")  # allowed for every model


def tensor_model(card: Card, settings: Settings) -> TensorModel:
    """Return the description of a version. An imported network always uses its own tensors."""
    return (imported_model if is_imported(card.kind) else MODELS[card.task])(card, settings)


def _sizes(card: Card) -> Any:
    return KINDS[card.kind].sizes(**card.sizes)


def classifier_model(card: Card, settings: Settings) -> TensorModel:
    """Describe a classifier: ``image`` [N, channels, height, width] from 0 to 255 to ``probabilities`` [N, classes]."""
    sizes, labels, rows = _sizes(card), card.labels or [], settings.limits.max_images
    image = ModelTensor("image", ("UINT8", "FP32"), (-1, sizes.channels, sizes.image, sizes.image))
    probabilities = ModelTensor("probabilities", ("FP64",), (-1, len(labels)), labels=labels)
    return TensorModel([image], [probabilities], rows, rows * math.prod(image.shape[1:]), _classify_job, _probabilities)


def _classify_job(card: Card, settings: Settings, request: DecodedRequest) -> ClassifyJob:
    pixels = request.tensors["image"]
    if pixels.dtype != np.uint8:
        _check_range("image", pixels, (pixels >= 0) & (pixels <= 255), "pixels are from 0 to 255")
    return ClassifyJob(pixels=list(torch.from_numpy(pixels.copy()).unbind(0)))


def _check_range(name: str, values: np.ndarray, in_range: np.ndarray, allowed: str) -> None:
    """Raise BadValue if not all ``values`` are in the allowed range."""
    if not in_range.all():
        raise BadValue(f"{name} has {values[~in_range][0]}; {allowed}", name)


def _probabilities(card: Card, answer: ClassifyAnswer) -> Outputs:
    return {"probabilities": np.array(answer.probabilities)}


def text_model(card: Card, settings: Settings) -> TensorModel:
    """Describe a text model.

    The input is ``prompt`` [N]. The outputs are the continuation ``text`` [N], and ``log_probabilities`` [N,
    vocabulary] of the first character of ``text``.
    """
    rows, vocabulary = settings.limits.max_texts, card.vocabulary or []
    return TensorModel(
        [ModelTensor("prompt", ("BYTES",), (-1,))],
        [
            ModelTensor("text", ("BYTES",), (-1,)),
            ModelTensor("log_probabilities", ("FP64",), (-1, len(vocabulary)), labels=vocabulary),
        ],
        rows,
        rows,
        _text_job,
        _texts,
        parameters=tuple(SamplingFields.model_fields),
    )


class TextParameters(SamplingFields, RequestBody):
    pass


def _text_job(card: Card, settings: Settings, request: DecodedRequest) -> ContinueJob:
    parameters = model_parameters(request.body.parameters, tuple(SamplingFields.model_fields))
    requested = {output.name for output in request.body.outputs or ()}
    if requested == {"log_probabilities"}:
        parameters = {"max_characters": 1, **parameters}
    prompts = [decode_text(prompt, "prompt") for prompt in request.tensors["prompt"].reshape(-1)]
    log_probs = -1 if not requested or "log_probabilities" in requested else None
    sampling = validate(parameters, TextParameters).sampling(settings.limits)
    return ContinueJob(prompts, log_probs=log_probs, has_many=True, **sampling)


def _texts(card: Card, answer: ContinueAnswer) -> Outputs:
    recorded = [text.options.log_probs for text in answer.texts if text.options and text.options.log_probs]
    log_probs = np.full((len(recorded), len(card.vocabulary or [])), MIN_LOG_PROBABILITY)
    for row, text_log_probs in zip(log_probs, recorded, strict=True):
        for index, value in next(text_log_probs.likeliest()):
            row[index] = max(value, MIN_LOG_PROBABILITY)
    texts = np.array([text.text.encode() for text in answer.texts], dtype=object)
    return {"text": texts, "log_probabilities": log_probs}


def forecaster_model(card: Card, settings: Settings) -> TensorModel:
    """Describe a forecaster.

    The input is ``values`` [N, T], in which NaN marks a missing value. The outputs are ``mean`` [N, horizon], and the
    bounds ``lower`` and ``upper`` [N, levels, horizon] of the prediction intervals. Versions trained with covariates
    also read ``covariates`` [N, T + horizon, columns]. Versions trained with holidays also read ``start`` [N], the time
    of the first value.
    """
    known, rows = card.series.known if card.series else None, settings.limits.max_series
    inputs, values = [ModelTensor("values", FLOATS, (-1, -1))], settings.limits.max_series_values
    if known and known.named:
        inputs.append(ModelTensor("covariates", FLOATS, (-1, -1, len(known.named)), labels=known.named))
    if known and known.calendar:
        inputs.append(ModelTensor("start", ("BYTES",), (-1,)))
        values += rows
    outputs = [ModelTensor("mean", ("FP64",), (-1, -1))]
    outputs += [ModelTensor(side, ("FP64",), (-1, -1, -1)) for side in ("lower", "upper")]
    return TensorModel(inputs, outputs, rows, values, _forecast_job, _forecasts, parameters=FORECAST_PARAMETERS)


FORECAST_PARAMETERS = ("horizon", "levels", "seasonality", "integer")


def _forecast_job(card: Card, settings: Settings, request: DecodedRequest) -> ForecastJob:
    parameters = model_parameters(request.body.parameters, FORECAST_PARAMETERS)
    if isinstance(levels := parameters.get("levels"), str):
        try:
            parameters["levels"] = [float(level) for level in levels.split(",") if level.strip()]
        except ValueError:
            raise BadValue(f"levels is {quote_value(levels)}; it should be like '80,95'", "levels") from None
    elif levels is not None:
        parameters["levels"] = [levels]
    values = request.tensors["values"].astype(np.float64)
    allowed = f"allowed values: -{MAX_VALUE:g} to {MAX_VALUE:g}".replace("+", "")
    _check_range("values", values, np.isnan(values) | (np.abs(values) <= MAX_VALUE), allowed)
    fields = validate({"values": [], **parameters}, ForecastRequest)
    horizon = fields.horizon if "horizon" in parameters else min(DEFAULT_HORIZON, settings.limits.max_horizon)
    job = ForecastJob(values.tolist(), horizon, fields.levels, fields.seasonality, fields.integer)
    if "covariates" in request.tensors:
        assert card.series
        assert card.series.known
        covariates = request.tensors["covariates"].astype(np.float64)
        _check_range("covariates", covariates, np.abs(covariates) <= MAX_VALUE, allowed)
        names = card.series.known.named
        job.covariates = {name: covariates[..., i].tolist() for i, name in enumerate(names)}
    if "start" in request.tensors:
        job.start = [decode_text(text, "start")[:100] for text in request.tensors["start"].reshape(-1)]
    return job


def _forecasts(card: Card, answer: ForecastAnswer) -> Outputs:
    mean = np.array([forecast.mean for forecast in answer.forecasts])
    shape = (len(mean), -1, mean.shape[1])  # three dimensions, also if there are no levels
    bounds = [list(forecast.bounds.values()) for forecast in answer.forecasts]
    sides = {
        name: np.array([[pair[side] for pair in own] for own in bounds]).reshape(shape)
        for side, name in enumerate(("lower", "upper"))
    }
    return {"mean": mean, **sides}


def generator_model(card: Card, settings: Settings) -> TensorModel:
    """Describe an image generator.

    The inputs are ``latents`` [N, latent], which should be samples of N(0, 1), and ``classes`` [N], which are indices
    or labels. Only models with labels have the input ``classes``. The output is ``images`` [N, channels, side, side].
    """
    sizes, rows = _sizes(card), settings.limits.max_samples
    inputs = [ModelTensor("latents", FLOATS, (-1, sizes.latent))]
    if card.labels:
        inputs.append(ModelTensor("classes", ("INT64", "INT32", "BYTES"), (-1,)))
    images = ModelTensor("images", ("UINT8",), (-1, sizes.channels, sizes.image, sizes.image))
    return TensorModel(inputs, [images], rows, rows * (sizes.latent + 1), _sample_job, _images)


def _sample_job(card: Card, settings: Settings, request: DecodedRequest) -> SampleJob:
    latents, classes = request.tensors["latents"].astype(np.float64), request.tensors.get("classes")
    allowed = f"allowed values: -{MAX_LATENT:g} to {MAX_LATENT:g}"
    _check_range("latents", latents, np.abs(latents) <= MAX_LATENT, allowed)
    indices = None if classes is None else _class_indices(card.labels or [], classes.reshape(-1))
    return SampleJob(len(latents), latents=latents, classes=indices)


def _class_indices(labels: Sequence[str], classes: np.ndarray) -> np.ndarray:
    """Return the indices of classes, which are indices or labels. Raises BadValue for unknown ones."""
    known: list[Any] = [label.encode() for label in labels] if classes.dtype == object else list(range(len(labels)))
    for value in classes.tolist():
        if value not in known:
            allowed = f"allowed values: 0 to {len(labels) - 1}, or {', '.join(labels)}"
            raise BadValue(f"classes has {quote_value(value)}; {allowed}", "classes")
    return np.array([known.index(value) for value in classes.tolist()])


def _images(card: Card, answer: SampleAnswer) -> Outputs:
    return {"images": answer.pixels}


def imported_model(card: Card, settings: Settings) -> TensorModel:
    """Describe an imported network by its own inputs and outputs."""
    sizes = ImportedSizes(**card.sizes)
    inputs, outputs = [_spec(spec) for spec in card.inputs], [_output(card, sizes, spec) for spec in card.outputs]
    rows, max_values = settings.limits.max_rows if sizes.batched else 0, settings.max_body_bytes
    values = sum(map(math.prod, sizes.dummy_shapes(max(rows, 1), max_values).values()))
    if any(spec.dtype == "string" for spec in card.inputs):  # only the body limits a text
        values = max_values
    return TensorModel(inputs, outputs, rows, min(values, max_values), _tensor_job, _tensors)


def _spec(spec: TensorSpec) -> ModelTensor:
    return ModelTensor(spec.name, (DATATYPES[spec.dtype],), tuple(spec.shape))


def _output(card: Card, sizes: ImportedSizes, spec: TensorSpec) -> ModelTensor:
    """Describe an output. A float output [N, classes] has classes, and those of a classifier have labels."""
    labels, classes = card.labels or [], spec.shape[1:]
    is_classified = card.task == "classify" and sizes.options.get("output", spec.name) == spec.name
    own_labels = labels if is_classified and classes == [len(labels)] else ()
    return replace(_spec(spec), labels=own_labels, has_classes=spec.dtype.startswith("float") and len(classes) == 1)


def _tensor_job(card: Card, settings: Settings, request: DecodedRequest) -> TensorJob:
    specs = {spec.name: spec for spec in card.inputs}
    arrays = {}
    for name, array in request.tensors.items():
        if len(specs[name].shape) == 1:
            array = array.reshape(-1)  # [N, 1] is also allowed
        if array.dtype == object:
            texts = [decode_text(text, name) for text in array.reshape(-1)]
            arrays[name] = np.array(texts, object).reshape(array.shape)
        else:
            arrays[name] = np.array(array, dtype=specs[name].dtype)
    return TensorJob(arrays)


def _tensors(card: Card, answer: Outputs) -> Outputs:
    return {
        name: np.array([str(text).encode() for text in array.reshape(-1)], object).reshape(array.shape)
        if array.dtype.kind in "OU"
        else array
        for name, array in answer.items()
    }


MODELS: dict[TaskName, Callable[[Card, Settings], TensorModel]] = {
    "classify": classifier_model,
    "continue": text_model,
    "forecast": forecaster_model,
    "sample": generator_model,
    "infer": imported_model,
}
if missing := TASKS.keys() ^ MODELS.keys():
    raise TypeError(f"the tables of tasks differ in {', '.join(missing)}")


def check_inputs(model: TensorModel, request: DecodedRequest) -> None:
    """Raise BadValue if the inputs or parameters of a request do not fit the model."""
    specs = {spec.name: spec for spec in model.inputs}
    for item in request.body.inputs:
        if item.name not in specs:
            raise BadValue(f"unknown input {quote_value(item.name)}; known inputs: {', '.join(specs)}", "inputs")
        spec, shape = specs[item.name], request.tensors[item.name].shape
        if item.datatype not in spec.datatypes:
            allowed = ", ".join(spec.datatypes)
            raise BadValue(f"input {item.name!r} is of {item.datatype}; allowed types: {allowed}", "inputs")
        if not spec.fits(shape):
            raise BadValue(f"input {item.name!r} has the shape {list(shape)}, expected {list(spec.shape)}", "inputs")
        if model.rows and not 1 <= shape[0] <= model.rows:
            raise BadValue(f"input {item.name!r} has {shape[0]:,} rows; it should have 1 to {model.rows:,}", "inputs")
    missing = [name for name in specs if name not in request.tensors]
    if missing:
        raise BadValue(f"input {missing[0]!r} is missing; required inputs: {', '.join(specs)}", "inputs")
    rows = {name: len(tensor) for name, tensor in request.tensors.items() if model.rows}
    if len(set(rows.values())) > 1:
        raise BadValue(f"inputs have {quote_value(rows)} rows, expected the same number in each", "inputs")
    model_parameters(request.body.parameters, model.parameters)


def shorten_deadline(request: Request, parameters: Mapping[str, Any]) -> None:
    """Set the deadline of the parameter ``timeout`` (microseconds), if it is earlier. Raises BadValue."""
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or timeout < 0:
        raise BadValue(f"timeout is {quote_value(timeout)}; it should be a whole number of microseconds", "timeout")
    now = asyncio.get_running_loop().time()
    # The comparison comes first: a huge integer cannot be converted to a float.
    if 0 < timeout < (request.scope[DEADLINE] - now) * 1e6:
        request.scope.update({DEADLINE: now + timeout / 1e6, UNIT: "timeout is in microseconds"})


def model_parameters(parameters: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Return the parameters with names in ``known``. Raises BadValue for an unknown parameter.

    Also raises BadValue for a priority other than 0, Triton's default, because all requests have the same priority.
    """
    priority = parameters.get("priority", 0)
    if type(priority) is not int or priority:
        allowed = "this service has one priority level, so send 0 or leave it out"
        raise BadValue(f"priority is {quote_value(priority)}; {allowed}", "priority")
    for name in parameters:
        if name not in (*known, *PROTOCOL_PARAMETERS) and not name.startswith("triton_"):
            allowed = ", ".join((*known, *PROTOCOL_PARAMETERS))
            raise BadValue(f"unknown parameter {quote_value(name)}; known parameters: {allowed}", "parameters")
    return {name: value for name, value in parameters.items() if name in known}


def decode_text(text: bytes, name: str) -> str:
    """Decode UTF-8. Raises BadValue."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise BadValue(f"{name} has {quote_value(text)}, which is not UTF-8: {error.reason}", name) from None
