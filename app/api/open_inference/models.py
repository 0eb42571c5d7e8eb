"""Every network as a model of tensors: what it reads and gives, and the items that the engines take.

Nothing is computed here: an item is what the native endpoint of the task makes of the same input.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.api.open_inference.decode import DecodedRequest, TensorSpec
from app.api.request import BYTES_PER_VALUE, EXTRA_COMMAS, validate
from app.api.responses import MIN_LOG_PROBABILITY
from app.api.routes import forecast, generate_text
from app.errors import BadValue, quote_value
from app.serving.loader import LoadedModel
from app.settings import Settings
from app.store import TaskName
from app.tasks.classification import ImageClassifier
from app.tasks.forecasting import AnyForecaster
from app.tasks.image_generation import ImageSampler, LatentBatch
from app.tasks.text_generation import Continuation, TextGenerator
from app.tasks.token_sampling import LogProbs, SamplingOptions

TEXT_PARAMETERS = ("max_characters", "temperature", "top_k", "top_p", "stop", "seed")
FLOATS = ("FP64", "FP32")
Outputs = dict[str, np.ndarray]
MAX_LATENT = 1000.0  # standard deviations: no latent lies there, and beyond it a network's sums overflow
PROTOCOL_PARAMETERS = ("binary_data_output", "timeout", "priority", "headers")  # of the protocol, for every model


@dataclass(frozen=True)
class RequestModels:
    """The settings, and the bodies of the native endpoints with them, whose sentences are also those of parameters."""

    settings: Settings
    text_request: type[generate_text.GenerateTextRequest]
    forecast_request: type[forecast.ForecastRequest]

    @classmethod
    def build(cls, settings: Settings) -> RequestModels:
        return cls(settings, generate_text.request_model(settings), forecast.request_model(settings))


class ClassifierTensors:
    """A classifier: ``image`` in raw pixel units, 0 to 255 -> ``probabilities``."""

    def __init__(self, live: LoadedModel[ImageClassifier], limits: RequestModels) -> None:
        predictor = live.predictor
        shape = (-1, predictor.channels, predictor.side, predictor.side)
        self.inputs = [TensorSpec("image", ("UINT8", "FP32"), shape)]
        labels = predictor.labels
        self.outputs = [TensorSpec("probabilities", ("FP64",), (-1, len(labels)), labels=labels)]
        self.rows = limits.settings.max_images
        self.values = self.rows * predictor.channels * predictor.side**2
        self.commas, self.bytes = self.values + EXTRA_COMMAS, 0
        self.parameters: tuple[str, ...] = ()

    def items(self, request: DecodedRequest) -> list[Tensor]:
        pixels = request.tensors["image"]
        if pixels.dtype != np.uint8 and not ((pixels >= 0) & (pixels <= 255)).all():
            odd = pixels[~((pixels >= 0) & (pixels <= 255))][0]
            raise BadValue(f"image has {odd}; pixels are from 0 to 255", "image")
        return list(torch.from_numpy(pixels.copy()).unbind(0))

    def answers(self, request: DecodedRequest, items: Sequence[Tensor], found: Sequence[list[float]]) -> Outputs:
        return {"probabilities": np.array(found)}

    def length(self, items: Sequence[Tensor]) -> int:
        """How many values the answer has, about."""
        return len(items) * self.outputs[0].shape[1]


class TextTensors:
    """A text network: ``prompt`` -> ``text``, its continuation, and ``log_probabilities`` of the first character."""

    def __init__(self, live: LoadedModel[TextGenerator], limits: RequestModels) -> None:
        self.predictor = live.predictor
        self.inputs = [TensorSpec("prompt", ("BYTES",), (-1,))]
        known = live.predictor.vocabulary
        self.outputs = [
            TensorSpec("text", ("BYTES",), (-1,)),
            TensorSpec("log_probabilities", ("FP64",), (-1, len(known)), labels=known),
        ]
        self.rows = self.values = limits.settings.max_texts
        self.parameters = TEXT_PARAMETERS
        self.bodies = limits.text_request
        self.most = limits.settings.max_prompt_characters
        self.commas = self.values + self.most + generate_text.LONGEST_STOP + EXTRA_COMMAS  # also those of the texts
        self.bytes = generate_text.BYTES_PER_CHARACTER * self.most

    def items(self, request: DecodedRequest) -> list[Continuation]:
        given = model_parameters(request.body.parameters, self.parameters)
        prompts = [_text(prompt) for prompt in request.tensors["prompt"].reshape(-1)]
        asked = {output.name for output in request.body.outputs or ()}
        if asked == {"log_probabilities"}:
            given = {"max_characters": 1, **given}
        extras = self._extras if not asked or "log_probabilities" in asked else None
        if (length := sum(map(len, prompts))) > self.most:
            raise BadValue(f"prompt has {length:,} characters in all; allowed are {self.most:,}", "prompt")
        bodies = [validate({"prompt": prompt, **given}, self.bodies) for prompt in prompts]
        return [text for body in bodies for text in generate_text.start_texts(self.predictor, body, extras)[0]]

    def _extras(self) -> SamplingOptions:
        size = len(self.predictor.vocabulary)
        return SamplingOptions(np.zeros(size), notes=LogProbs(size, top=1))

    def answers(self, request: DecodedRequest, items: Sequence[Continuation], found: Sequence[Continuation]) -> Outputs:
        outputs = {"text": np.array([text.text.encode() for text in found], dtype=object)}
        notes = [text.extras.notes for text in found if text.extras and text.extras.notes]
        logs = np.full((len(notes), len(self.predictor.vocabulary)), MIN_LOG_PROBABILITY)
        for row, noted in zip(logs, notes, strict=True):
            for index, value in noted.likeliest[0]:
                row[index] = max(value, MIN_LOG_PROBABILITY)
        return {**outputs, "log_probabilities": logs}

    def length(self, items: Sequence[Continuation]) -> int:
        return sum(len(text.uniforms) for text in items) + len(items) * len(self.predictor.vocabulary)


class ForecasterTensors:
    """A series network: ``values``, NaN where one is missing -> ``mean``, and ``lower`` and ``upper`` of each level."""

    def __init__(self, live: LoadedModel[AnyForecaster], limits: RequestModels) -> None:
        self.live = live
        self.settings = limits.settings
        self.inputs = [TensorSpec("values", FLOATS, (-1, -1))]
        self.outputs = [
            TensorSpec("mean", ("FP64",), (-1, -1)),
            TensorSpec("lower", ("FP64",), (-1, -1, -1)),
            TensorSpec("upper", ("FP64",), (-1, -1, -1)),
        ]
        self.rows = limits.settings.max_series
        self.values = limits.settings.max_series_values
        self.commas, self.bytes = self.values + EXTRA_COMMAS, 0
        self.parameters = ("horizon", "levels", "seasonality")
        self.bodies = limits.forecast_request

    def items(self, request: DecodedRequest) -> list[Any]:
        values = request.tensors["values"].astype(np.float64)
        if len(odd := values[~(np.isnan(values) | (np.abs(values) <= 1e300))]):
            raise BadValue(f"values has {odd[0]}; allowed is from -1e300 to 1e300", "values")
        return forecast.parse_series(self.live, self._body(request, values.tolist()), self.settings)

    def _body(self, request: DecodedRequest, values: list[Any]) -> forecast.ForecastRequest:
        given = model_parameters(request.body.parameters, self.parameters)
        if isinstance(levels := given.get("levels"), str):
            try:
                given["levels"] = [float(level) for level in levels.split(",") if level.strip()]
            except ValueError:
                raise BadValue(f"levels is {quote_value(levels)}; it should be like '80,95'", "levels") from None
        elif levels is not None:
            given["levels"] = [levels]
        body = validate({"values": [], **given}, self.bodies)
        return body.model_copy(update={"values": values})

    def answers(self, request: DecodedRequest, items: list[Any], found: list[Any]) -> Outputs:
        told = forecast.forecast_results(self.live, items, found, self._body(request, []).levels)
        mean = np.array([each["mean"] for each in told])
        bounds = {
            side: np.array([[interval[side] for interval in each["intervals"].values()] for each in told])
            for side in ("lower", "upper")
        }
        shape = (len(mean), -1, mean.shape[1])  # also where no level is asked for
        return {"mean": mean, **{side: bound.reshape(shape) for side, bound in bounds.items()}}

    def length(self, items: Sequence[Any]) -> int:
        return sum(item.horizon for item in items) * 5


class GeneratorTensors:
    """A generator: ``latents`` from N(0, 1), and ``classes`` by index or label -> ``images``."""

    def __init__(self, live: LoadedModel[ImageSampler], limits: RequestModels) -> None:
        self.predictor = live.predictor
        sizes = live.predictor.network.sizes
        self.inputs = [TensorSpec("latents", FLOATS, (-1, sizes.latent))]
        if live.predictor.labels:
            self.inputs.append(TensorSpec("classes", ("INT64", "INT32", "BYTES"), (-1,)))
        self.outputs = [TensorSpec("images", ("UINT8",), (-1, sizes.channels, sizes.image, sizes.image))]
        self.rows = limits.settings.max_samples
        self.values = self.rows * (sizes.latent + 1)
        self.commas, self.bytes = self.values + EXTRA_COMMAS, 0
        self.parameters: tuple[str, ...] = ()

    def items(self, request: DecodedRequest) -> list[LatentBatch]:
        latents = request.tensors["latents"].astype(np.float64)
        if not (np.abs(latents) <= MAX_LATENT).all():
            odd = latents[~(np.abs(latents) <= MAX_LATENT)][0]
            raise BadValue(f"latents has {odd}; allowed is from -{MAX_LATENT:g} to {MAX_LATENT:g}", "latents")
        classes = request.tensors.get("classes")
        return [LatentBatch(latents, None if classes is None else self._indices(classes.reshape(-1)))]

    def _indices(self, classes: np.ndarray) -> np.ndarray:
        labels = self.predictor.labels
        known = {label.encode(): index for index, label in enumerate(labels)}
        known |= dict(enumerate(range(len(labels)))) if classes.dtype != object else {}  # type: ignore[arg-type]
        for given in classes.tolist():
            if given not in known:
                raise BadValue(
                    f"classes has {quote_value(given)}; there are: 0 to {len(labels) - 1}, or {', '.join(labels)}",
                    "classes",
                )
        return np.array([known[given] for given in classes.tolist()], dtype=np.int64)

    def answers(self, request: DecodedRequest, items: Sequence[LatentBatch], found: Sequence[np.ndarray]) -> Outputs:
        return {"images": found[0]}

    def length(self, items: Sequence[LatentBatch]) -> int:
        return len(items[0]) * math.prod(self.outputs[0].shape[1:]) // BYTES_PER_VALUE


TensorModel = ClassifierTensors | TextTensors | ForecasterTensors | GeneratorTensors
MODELS: dict[TaskName, Callable[[LoadedModel[Any], RequestModels], TensorModel]] = {
    "classify": ClassifierTensors,
    "continue": TextTensors,
    "forecast": ForecasterTensors,
    "sample": GeneratorTensors,
}


def tensor_model(live: LoadedModel, limits: RequestModels) -> TensorModel:
    """A version as a model of tensors."""
    return MODELS[live.card.task](live, limits)


def check_inputs(model: TensorModel, request: DecodedRequest) -> None:
    """Raises BadValue for a request whose inputs or parameters are not the model's."""
    specs = {spec.name: spec for spec in model.inputs}
    for given in request.body.inputs:
        if given.name not in specs:
            raise BadValue(f"there is no input {quote_value(given.name)}; there are: {', '.join(specs)}", "inputs")
        spec, shape = specs[given.name], request.tensors[given.name].shape
        if given.datatype not in spec.datatypes:
            allowed = ", ".join(spec.datatypes)
            raise BadValue(f"input {given.name!r} is of {given.datatype}; allowed are {allowed}", "inputs")
        if not spec.fits(shape):
            raise BadValue(f"input {given.name!r} has the shape {list(shape)}, expected {list(spec.shape)}", "inputs")
        if not 1 <= shape[0] <= model.rows:
            raise BadValue(f"input {given.name!r} has {shape[0]:,} rows; allowed are 1 to {model.rows:,}", "inputs")
    missing = [name for name in specs if name not in request.tensors]
    if missing:
        raise BadValue(f"input {missing[0]!r} is missing; there are: {', '.join(specs)}", "inputs")
    rows = {name: len(tensor) for name, tensor in request.tensors.items()}
    if len(set(rows.values())) > 1:
        raise BadValue(f"inputs have {quote_value(rows)} rows, expected as many in each", "inputs")
    model_parameters(request.body.parameters, model.parameters)


def earlier_deadline(parameters: Mapping[str, Any], until: float) -> float:
    """The deadline, or what is left when the request states its own ``timeout`` in microseconds. Raises BadValue."""
    stated = parameters.get("timeout", 0)
    if type(stated) is not int or stated < 0:
        raise BadValue(f"timeout is {quote_value(stated)}; it should be a whole number of microseconds", "timeout")
    now = asyncio.get_running_loop().time()
    return now + stated / 1e6 if 0 < stated < (until - now) * 1e6 else until  # compared first: no float may hold it


def model_parameters(parameters: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The parameters that are the model's own. Raises BadValue for one that is nobody's."""
    for name in parameters:
        if name not in (*known, *PROTOCOL_PARAMETERS) and not name.startswith("triton_"):
            allowed = ", ".join((*known, *PROTOCOL_PARAMETERS))
            told = f"there is no parameter {quote_value(name)} here; there are: {allowed}"
            raise BadValue(told, "parameters")
    return {name: value for name, value in parameters.items() if name in known}


def _text(prompt: bytes) -> str:
    """A string of a request. Raises BadValue."""
    try:
        return prompt.decode()
    except UnicodeDecodeError as error:
        raise BadValue(f"prompt has {quote_value(prompt)}, which is not UTF-8: {error.reason}", "prompt") from None
