"""Define the signatures of exported files: the inputs and outputs of the networks of each task.

The first axis of every tensor is the batch. A recurrent network reads one step per call. Its state is an input, and the
new state is an output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.networks.forecaster import MEDIAN, QUANTILES
from app.store import TaskName
from app.store.version import Version
from app.tasks.forecasting import MEAN_WEIGHTS, is_windowed
from app.tasks.seasonality import MAX_SEASON

Outputs = dict[str, Tensor]
EXAMPLE_ROWS = 2  # torch.export would treat an axis of length 1 as fixed


@dataclass(frozen=True)
class Signature:
    """The function that an exported file contains.

    Attributes:
        module: computes the function. Its ``forward`` takes the inputs as parameters and returns the outputs by name.
        examples: a tensor of random values for each input, to trace the module and to check exported files.
        preprocessing: metadata that say how to prepare the inputs.
        postprocessing: metadata that say how to interpret the outputs.
    """

    module: nn.Module
    examples: tuple[Tensor, ...]
    preprocessing: dict[str, Any]
    postprocessing: dict[str, Any]

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs."""
        return list(self.module(*self.examples))


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random numbers from the standard normal distribution. Each call with the same shape returns the same."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


class _Wrapper(nn.Module):
    """Base class of the modules whose ``forward`` has the inputs and outputs of an exported file."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network


class _Classifier(_Wrapper):
    def forward(self, image: Tensor) -> Outputs:
        """Return probabilities [N, classes], given images uint8 [N, channels, side, side]."""
        return {"probabilities": self.network.probabilities(self.network(image)).float()}


def classifier(version: Version) -> Signature:
    """Return the signature of a network that classifies images."""
    network = version.network()
    sizes = network.sizes
    pixels = _normal(EXAMPLE_ROWS, sizes.channels, sizes.image, sizes.image).mul(50).add(128).clamp(0, 255).byte()
    colours = "RGB" if sizes.channels == 3 else "L"
    preprocessing = {"colours": colours, "size": [sizes.image, sizes.image], "resample": "bicubic", "range": [0, 255]}
    return Signature(_Classifier(network), (pixels,), preprocessing, {})


class _TextStep(_Wrapper):
    def forward(self, characters: Tensor, state: Tensor) -> Outputs:
        """Return logits [N, 1, vocabulary] and the next state, given characters [N, 1] and state [N, layers, hidden].

        The logits are for the character that follows.
        """
        logits, next_state = self.network(characters, state)
        return {"logits": logits, "next_state": next_state}


def text_step(version: Version) -> Signature:
    """Return the signature of a network that reads one character per text and returns logits of the next character."""
    network = version.network()
    unknown = len(version.card.vocabulary or ()) - 1
    state = _normal(*network.zero_state(EXAMPLE_ROWS).shape).tanh()
    examples = (torch.arange(EXAMPLE_ROWS).view(-1, 1), state)
    preprocessing = {"unknown": unknown, "initial_state": 0.0}
    return Signature(_TextStep(network), examples, preprocessing, {"never_generated": [unknown]})


class _SeriesStep(_Wrapper):
    def forward(self, values: Tensor, hidden: Tensor, cell: Tensor) -> Outputs:
        """Return three outputs: the mean [N, 1] of the next value of each series, and the next two states.

        ``values`` [N, 1] are the current values. ``hidden`` and ``cell`` are the current states.
        """
        state = (hidden.transpose(0, 1).contiguous(), cell.transpose(0, 1).contiguous())
        mean, (next_hidden, next_cell) = self.network.steps(values, state)
        return {"mean": mean, "next_hidden": next_hidden.transpose(0, 1), "next_cell": next_cell.transpose(0, 1)}


class _Forecaster(_Wrapper):
    weights: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("weights", torch.from_numpy(MEAN_WEIGHTS))

    def forward(self, values: Tensor, seasons: Tensor) -> Outputs:
        """Return the mean [N, horizon] and quantiles [N, horizon, levels], given values [N, context] and seasons."""
        quantiles = self.network.forecast(values, seasons.clamp(min=1), self.network.sizes.horizon)
        median = quantiles[..., MEDIAN]
        return {"mean": median + (quantiles - median.unsqueeze(2)) @ self.weights, "quantiles": quantiles}


def forecaster(version: Version) -> Signature:
    """Return the signature of a network that forecasts series.

    A network for one kind of series forecasts the next value. A network for any series forecasts the mean and the
    quantiles of all values up to its horizon.
    """
    network = version.network()
    sizes = network.sizes
    if is_windowed(version.card):
        state = _normal(EXAMPLE_ROWS, 1, sizes.hidden).tanh()
        units = {"location": float(network.location), "scale": float(network.scale)}
        preprocessing = {**units, "min_values": sizes.window, "initial_state": 0.0}
        postprocessing = {**units, "residuals": version.card.residuals}
        return Signature(
            _SeriesStep(network), (_normal(EXAMPLE_ROWS, 1), state, state.clone()), preprocessing, postprocessing
        )
    values = _normal(EXAMPLE_ROWS, sizes.context, dtype=torch.float64).cumsum(dim=1)
    seasons = torch.tensor([1, 7])
    preprocessing = {"context": sizes.context, "padding": "nan", "max_season": MAX_SEASON}
    if version.card.series:
        preprocessing["series"] = version.card.series.model_dump()
    return Signature(_Forecaster(network), (values, seasons), preprocessing, {"quantile_levels": list(QUANTILES)})


class _Generator(_Wrapper):
    def forward(self, latents: Tensor) -> Outputs:
        """Return images [N, channels, side, side] in [-1, 1], given latents [N, latent]."""
        return {"images": self.network(latents)}


class _ConditionalGenerator(_Wrapper):
    def forward(self, latents: Tensor, classes: Tensor) -> Outputs:
        """Return images [N, channels, side, side] in [-1, 1], given latents [N, latent] and classes [N]."""
        return {"images": self.network(latents, classes)}


def generator(version: Version) -> Signature:
    """Return the signature of a network that generates images."""
    network = version.network()
    latents = _normal(EXAMPLE_ROWS, network.sizes.latent)
    preprocessing, postprocessing = {"latents": "standard normal"}, {"range": [-1, 1]}
    if not version.card.labels:
        return Signature(_Generator(network), (latents,), preprocessing, postprocessing)
    classes = torch.arange(EXAMPLE_ROWS) % len(version.card.labels)
    return Signature(_ConditionalGenerator(network), (latents, classes), preprocessing, postprocessing)


SIGNATURES: dict[TaskName, Callable[[Version], Signature]] = {
    "classify": classifier,
    "continue": text_step,
    "forecast": forecaster,
    "sample": generator,
}
