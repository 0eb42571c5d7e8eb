"""Describe each task as a model with input and output tensors, and convert tensors to and from items of the engine.

The task's endpoint under ``/v1`` creates the same items. Therefore both endpoints return the same results.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app import store
from app.api.open_inference.decode import DecodedRequest, TensorSpec
from app.api.request_body import BYTES_PER_VALUE, EXTRA_COMMAS, validate
from app.api.responses import MIN_LOG_PROBABILITY
from app.api.routes import forecast, generate_text
from app.errors import BadValue, quote_value
from app.networks import is_imported
from app.serving.model import Model
from app.settings import Settings
from app.store import TaskName
from app.tasks.classification import ImageClassifier
from app.tasks.forecasting import AnyForecaster
from app.tasks.image_generation import ImageSampler, LatentBatch
from app.tasks.imported import ImportedClassifier, TensorPredictor, TensorRows
from app.tasks.text_generation import Continuation, TextGenerator
from app.tasks.token_sampling import LogProbs, SamplingOptions

TEXT_PARAMETERS = ("max_characters", "temperature", "top_k", "top_p", "stop", "seed")
FLOATS = ("FP64", "FP32")
DATATYPES = {  # by the data type on the model card
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "string": "BYTES",
}  # fmt: skip
Outputs = dict[str, np.ndarray]
MAX_JSON_VALUES = 2**20  # largest number of JSON values for an imported network; binary tensors may have more
TENSOR_COMMAS, TENSOR_BYTES = 16, 512  # largest number of commas and bytes of a tensor in JSON, without its values
MAX_LATENT = 1000.0  # standard deviations; larger latents overflow in the network
PROTOCOL_PARAMETERS = ("binary_data_output", "timeout", "priority", "headers")  # allowed for every model


@dataclass(frozen=True)
class RequestSchemas:
    """The settings, and the Pydantic classes of two request bodies under ``/v1``, which validate parameters."""

    settings: Settings
    text_request: type[generate_text.GenerateTextRequest]
    forecast_request: type[forecast.ForecastRequest]

    @classmethod
    def build(cls, settings: Settings) -> RequestSchemas:
        return cls(settings, generate_text.request_model(settings), forecast.request_model(settings))


class ClassifierTensors:
    """Tensors of a classifier.

    The input is ``image`` [N, channels, height, width], with pixels from 0 to 255. The output is ``probabilities``
    [N, classes].
    """

    def __init__(self, model: Model[ImageClassifier], schemas: RequestSchemas) -> None:
        predictor = model.predictor
        shape = (-1, predictor.channels, predictor.side, predictor.side)
        self.inputs = [TensorSpec("image", ("UINT8", "FP32"), shape)]
        labels = predictor.labels
        self.outputs = [TensorSpec("probabilities", ("FP64",), (-1, len(labels)), labels=labels)]
        self.rows = schemas.settings.max_images
        self.values = self.rows * predictor.channels * predictor.side**2
        self.commas, self.bytes = self.values + EXTRA_COMMAS, 0
        self.parameters: tuple[str, ...] = ()

    def items(self, request: DecodedRequest) -> list[Tensor]:
        pixels = request.tensors["image"]
        if pixels.dtype != np.uint8 and not ((pixels >= 0) & (pixels <= 255)).all():
            wrong = pixels[~((pixels >= 0) & (pixels <= 255))][0]
            raise BadValue(f"image has {wrong}; pixels are from 0 to 255", "image")
        return list(torch.from_numpy(pixels.copy()).unbind(0))

    def outputs_of(self, request: DecodedRequest, items: Sequence[Tensor], results: Sequence[list[float]]) -> Outputs:
        """Return the outputs by name. ``results`` has one result of the engine for each item."""
        return {"probabilities": np.array(results)}

    def response_size(self, items: Sequence[Tensor], results: Sequence[Any]) -> int:
        """Return the approximate number of values in the response. ``results`` is as in ``outputs_of``."""
        return len(items) * self.outputs[0].shape[1]


class TextTensors:
    """Tensors of a text model.

    The input is ``prompt`` [N]. The outputs are the continuation ``text`` [N], and ``log_probabilities`` [N,
    vocabulary] of the first character of ``text``.
    """

    def __init__(self, model: Model[TextGenerator], schemas: RequestSchemas) -> None:
        self.predictor = model.predictor
        self.inputs = [TensorSpec("prompt", ("BYTES",), (-1,))]
        vocabulary = model.predictor.vocabulary
        self.outputs = [
            TensorSpec("text", ("BYTES",), (-1,)),
            TensorSpec("log_probabilities", ("FP64",), (-1, len(vocabulary)), labels=vocabulary),
        ]
        self.rows = self.values = schemas.settings.max_texts
        self.parameters = TEXT_PARAMETERS
        self.text_request = schemas.text_request
        self.max_characters = schemas.settings.max_prompt_characters
        self.commas = self.values + self.max_characters + generate_text.MAX_STOP_LENGTH + EXTRA_COMMAS
        self.bytes = generate_text.BYTES_PER_CHARACTER * self.max_characters

    def items(self, request: DecodedRequest) -> list[Continuation]:
        parameters = model_parameters(request.body.parameters, self.parameters)
        prompts = [_decode_text(prompt, "prompt") for prompt in request.tensors["prompt"].reshape(-1)]
        requested = {output.name for output in request.body.outputs or ()}
        if requested == {"log_probabilities"}:
            parameters = {"max_characters": 1, **parameters}
        make_options = self._log_prob_options if not requested or "log_probabilities" in requested else None
        if (length := sum(map(len, prompts))) > self.max_characters:
            raise BadValue(f"prompt has {length:,} characters in all; the maximum is {self.max_characters:,}", "prompt")
        bodies = [validate({"prompt": prompt, **parameters}, self.text_request) for prompt in prompts]
        texts = [text for body in bodies for text in generate_text.start_texts(self.predictor, body, make_options)[0]]
        self.predictor.check_prompt(sum(len(text.prompt.characters) for text in texts), max(len(texts), 1))
        return texts

    def _log_prob_options(self) -> SamplingOptions:
        """Return options that record all log-probabilities of the first character."""
        size = len(self.predictor.vocabulary)
        return SamplingOptions(np.zeros(size), log_probs=LogProbs(size, max_tokens=1))

    def outputs_of(
        self, request: DecodedRequest, items: Sequence[Continuation], results: Sequence[Continuation]
    ) -> Outputs:
        texts = np.array([text.text.encode() for text in results], dtype=object)
        recorded = [text.options.log_probs for text in results if text.options and text.options.log_probs]
        log_probs = np.full((len(recorded), len(self.predictor.vocabulary)), MIN_LOG_PROBABILITY)
        for row, text_log_probs in zip(log_probs, recorded, strict=True):
            for index, value in next(text_log_probs.likeliest()):
                row[index] = max(value, MIN_LOG_PROBABILITY)
        return {"text": texts, "log_probabilities": log_probs}

    def response_size(self, items: Sequence[Continuation], results: Sequence[Any]) -> int:
        return sum(len(text.uniforms) for text in items) + len(items) * len(self.predictor.vocabulary)


class ForecasterTensors:
    """Tensors of a forecaster.

    The input is ``values`` [N, T], in which NaN marks a missing value. The outputs are ``mean`` [N, horizon], and the
    bounds ``lower`` and ``upper`` [N, levels, horizon] of the prediction intervals. Versions trained with covariates
    also read ``covariates`` [N, T + horizon, columns]. Versions trained with holidays also read ``start``
    [N], the time of the first value.
    """

    def __init__(self, model: Model[AnyForecaster], schemas: RequestSchemas) -> None:
        self.model = model
        self.settings = schemas.settings
        self.inputs = [TensorSpec("values", FLOATS, (-1, -1))]
        known = model.card.series.known if model.card.series else None
        self.columns = known.named if known else []
        if self.columns:
            self.inputs.append(TensorSpec("covariates", FLOATS, (-1, -1, len(self.columns)), labels=self.columns))
        if known and known.calendar:
            self.inputs.append(TensorSpec("start", ("BYTES",), (-1,)))
        self.outputs = [
            TensorSpec("mean", ("FP64",), (-1, -1)),
            TensorSpec("lower", ("FP64",), (-1, -1, -1)),
            TensorSpec("upper", ("FP64",), (-1, -1, -1)),
        ]
        self.rows = schemas.settings.max_series
        self.values = schemas.settings.max_series_values + self.rows * ("start" in {spec.name for spec in self.inputs})
        self.commas, self.bytes = self.values + EXTRA_COMMAS, 0
        self.parameters = ("horizon", "levels", "seasonality", "integer")
        self.forecast_request = schemas.forecast_request

    def items(self, request: DecodedRequest) -> list[Any]:
        values = request.tensors["values"].astype(np.float64)
        if len(wrong := values[~(np.isnan(values) | (np.abs(values) <= 1e300))]):
            raise BadValue(f"values has {wrong[0]}; allowed values: -1e300 to 1e300", "values")
        body = self._body(request, values.tolist())
        return forecast.parse_series(self.model, body.model_copy(update=self._known(request)), self.settings)

    def _known(self, request: DecodedRequest) -> dict[str, Any]:
        """Return the covariates and the start times of a request. Raises BadValue."""
        fields: dict[str, Any] = {}
        if self.columns:
            covariates = request.tensors["covariates"].astype(np.float64)
            if len(wrong := covariates[~(np.abs(covariates) <= 1e300)]):
                raise BadValue(f"covariates has {wrong[0]}; allowed values: -1e300 to 1e300", "covariates")
            fields["covariates"] = {name: covariates[..., i].tolist() for i, name in enumerate(self.columns)}
        if "start" in request.tensors:
            fields["start"] = [_decode_text(text, "start")[:100] for text in request.tensors["start"].reshape(-1)]
        return fields

    def _body(self, request: DecodedRequest, values: list[Any]) -> forecast.ForecastRequest:
        parameters = model_parameters(request.body.parameters, self.parameters)
        if isinstance(levels := parameters.get("levels"), str):
            try:
                parameters["levels"] = [float(level) for level in levels.split(",") if level.strip()]
            except ValueError:
                raise BadValue(f"levels is {quote_value(levels)}; it should be like '80,95'", "levels") from None
        elif levels is not None:
            parameters["levels"] = [levels]
        body = validate({"values": [], **parameters}, self.forecast_request)
        return body.model_copy(update={"values": values})

    def outputs_of(self, request: DecodedRequest, items: list[Any], results: list[Any]) -> Outputs:
        forecasts = forecast.forecast_results(self.model, items, results, self._body(request, []))
        mean = np.array([each["mean"] for each in forecasts])
        bounds = {
            side: np.array([[interval[side] for interval in each["intervals"].values()] for each in forecasts])
            for side in ("lower", "upper")
        }
        shape = (len(mean), -1, mean.shape[1])  # three dimensions, also if there are no levels
        return {"mean": mean, **{side: bound.reshape(shape) for side, bound in bounds.items()}}

    def response_size(self, items: Sequence[Any], results: Sequence[Any]) -> int:
        return sum(item.horizon for item in items) * 5


class GeneratorTensors:
    """Tensors of an image generator.

    The inputs are ``latents`` [N, latent], which should be samples of N(0, 1), and ``classes`` [N], which are indices
    or labels. Only models with labels have the input ``classes``. The output is ``images`` [N, channels, side, side].
    """

    def __init__(self, model: Model[ImageSampler], schemas: RequestSchemas) -> None:
        self.predictor = model.predictor
        sizes = model.predictor.network.sizes
        self.inputs = [TensorSpec("latents", FLOATS, (-1, sizes.latent))]
        if model.predictor.labels:
            self.inputs.append(TensorSpec("classes", ("INT64", "INT32", "BYTES"), (-1,)))
        self.outputs = [TensorSpec("images", ("UINT8",), (-1, sizes.channels, sizes.image, sizes.image))]
        self.rows = schemas.settings.max_samples
        self.values = self.rows * (sizes.latent + 1)
        self.commas, self.bytes = self.values + EXTRA_COMMAS, 0
        self.parameters: tuple[str, ...] = ()

    def items(self, request: DecodedRequest) -> list[LatentBatch]:
        latents = request.tensors["latents"].astype(np.float64)
        if not (np.abs(latents) <= MAX_LATENT).all():
            wrong = latents[~(np.abs(latents) <= MAX_LATENT)][0]
            raise BadValue(f"latents has {wrong}; allowed values: -{MAX_LATENT:g} to {MAX_LATENT:g}", "latents")
        classes = request.tensors.get("classes")
        return [LatentBatch(latents, None if classes is None else self._indices(classes.reshape(-1)))]

    def _indices(self, classes: np.ndarray) -> np.ndarray:
        labels = self.predictor.labels
        indices = {label.encode(): index for index, label in enumerate(labels)}
        indices |= dict(enumerate(range(len(labels)))) if classes.dtype != object else {}  # type: ignore[arg-type]
        for value in classes.tolist():
            if value not in indices:
                raise BadValue(
                    f"classes has {quote_value(value)}; allowed values: 0 to {len(labels) - 1}, or {', '.join(labels)}",
                    "classes",
                )
        return np.array([indices[value] for value in classes.tolist()], dtype=np.int64)

    def outputs_of(
        self, request: DecodedRequest, items: Sequence[LatentBatch], results: Sequence[np.ndarray]
    ) -> Outputs:
        return {"images": results[0]}

    def response_size(self, items: Sequence[LatentBatch], results: Sequence[Any]) -> int:
        return len(items[0]) * math.prod(self.outputs[0].shape[1:]) // BYTES_PER_VALUE


class ImportedTensors:
    """Tensors of an imported network, which are the inputs and outputs of the network itself."""

    def __init__(self, model: Model[TensorPredictor], schemas: RequestSchemas) -> None:
        self.predictor: TensorPredictor = getattr(model.predictor, "tensors", model.predictor)
        self.inputs = [_imported_spec(spec) for spec in model.card.inputs]
        self.outputs = [self._output(spec, model.predictor) for spec in model.card.outputs]
        self.rows = schemas.settings.max_rows if self.predictor.sizes.batched else 0
        shapes = self.predictor.sizes.dummy_shapes(max(self.rows, 1), schemas.settings.max_body_bytes)
        self.values = min(sum(map(math.prod, shapes.values())), schemas.settings.max_body_bytes)
        tensors = len(self.inputs) + len(self.outputs)
        has_texts = any(spec.dtype == "string" for spec in model.card.inputs)  # only the body limits a text
        json_values = MAX_JSON_VALUES if has_texts else min(self.values, MAX_JSON_VALUES)
        self.commas = json_values + TENSOR_COMMAS * tensors + EXTRA_COMMAS
        self.bytes = schemas.settings.max_body_bytes if has_texts else TENSOR_BYTES * tensors
        self.parameters: tuple[str, ...] = ()

    def _output(self, spec: store.TensorSpec, predictor: Any) -> TensorSpec:
        """Describe an output. A float output [N, classes] has classes, and those of a classifier have labels."""
        is_float, classes = spec.dtype.startswith("float"), spec.shape[1:]
        classified = isinstance(predictor, ImportedClassifier) and classes == [len(predictor.labels)]
        labels = predictor.labels if classified and spec.name == predictor.output.name else ()
        return replace(_imported_spec(spec), labels=labels, has_classes=is_float and len(classes) == 1)

    def items(self, request: DecodedRequest) -> list[TensorRows]:
        return [
            self.predictor.parse_tensors({name: self._array(name, array) for name, array in request.tensors.items()})
        ]

    def _array(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return an input in the type of the network. Raises BadValue for a text that is not UTF-8."""
        if len(self.predictor.inputs[name].shape) == 1:
            array = array.reshape(-1)  # [N, 1] is also allowed
        if array.dtype != object:
            return np.array(array, dtype=self.predictor.inputs[name].dtype)
        return np.array([_decode_text(text, name) for text in array.reshape(-1)], object).reshape(array.shape)

    def outputs_of(
        self, request: DecodedRequest, items: Sequence[TensorRows], results: Sequence[dict[str, np.ndarray]]
    ) -> Outputs:
        return {
            name: np.array([str(text).encode() for text in array.reshape(-1)], object).reshape(array.shape)
            if array.dtype.kind in "OU"
            else array
            for name, array in results[0].items()
        }

    def response_size(self, items: Sequence[TensorRows], results: Sequence[dict[str, np.ndarray]]) -> int:
        return sum(array.size for array in results[0].values())


def _imported_spec(spec: store.TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, (DATATYPES[spec.dtype],), tuple(spec.shape))


TensorModel = ImportedTensors | ClassifierTensors | TextTensors | ForecasterTensors | GeneratorTensors
MODELS: dict[TaskName, Callable[[Model[Any], RequestSchemas], TensorModel]] = {
    "classify": ClassifierTensors,
    "continue": TextTensors,
    "forecast": ForecasterTensors,
    "sample": GeneratorTensors,
    "infer": ImportedTensors,
}


def tensor_model(model: Model, schemas: RequestSchemas) -> TensorModel:
    """Return an object that describes the tensors of a version. An imported network always uses its own tensors."""
    make = ImportedTensors if is_imported(model.card.kind) else MODELS[model.card.task]
    return make(model, schemas)


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


def earlier_deadline(parameters: Mapping[str, Any], deadline: float) -> float:
    """Return ``deadline``, or an earlier deadline from the parameter ``timeout`` (microseconds). Raises BadValue."""
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or timeout < 0:
        raise BadValue(f"timeout is {quote_value(timeout)}; it should be a whole number of microseconds", "timeout")
    now = asyncio.get_running_loop().time()
    # The comparison comes first: a huge integer cannot be converted to a float.
    return now + timeout / 1e6 if 0 < timeout < (deadline - now) * 1e6 else deadline


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


def _decode_text(text: bytes, name: str) -> str:
    """Decode UTF-8. Raises BadValue."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise BadValue(f"{name} has {quote_value(text)}, which is not UTF-8: {error.reason}", name) from None
