"""A network for one kind of series. It reads standardised values and forecasts the next values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SeriesLSTMSizes:
    """Sizes of ``SeriesLSTM``. ``window``: number of values that the network reads before the first forecast."""

    window: int = 50
    hidden: int = 64


class SeriesDescription(NamedTuple):
    """The location, scale and roughness of a series; see ``SeriesLSTM``. They are numbers, not tensors on a device."""

    location: float
    scale: float
    roughness: float

    def resembles(self, series: np.ndarray) -> bool:
        """Return whether the range and the roughness of another series [T] are similar. T is at least 2."""
        if np.abs(series - self.location).max() >= 5 * self.scale:
            return False
        differences = np.diff(series)
        roughness = math.sqrt(((differences - differences.mean()) ** 2).sum() / max(len(differences) - 1, 1))
        return self.roughness / 3 < roughness < 3 * self.roughness


class SeriesLSTM(nn.Module):
    """The LSTM of the workshop (see ``app.networks``): an LSTM layer that reads values, and a linear layer.

    The LSTM layer reads one value per step, and the linear layer forecasts the next value.

    ``location`` (mean), ``scale`` (standard deviation) and ``roughness`` (standard deviation of the differences of
    adjacent values) describe the training series. These three numbers are stored with the weights.
    """

    location: Tensor
    scale: Tensor
    roughness: Tensor

    def __init__(self, sizes: SeriesLSTMSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.lstm = nn.LSTM(1, sizes.hidden, batch_first=True)
        self.head = nn.Linear(sizes.hidden, 1)
        self.register_buffer("location", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("roughness", torch.ones(()))

    def store_statistics(self, series: Tensor) -> None:
        """Store the location, scale and roughness of the training series [T]."""
        self.location.copy_(series.mean())
        self.scale.copy_(series.std())
        self.roughness.copy_(series.diff().std())

    def training_series(self) -> SeriesDescription:
        """Return the stored description of the training series."""
        return SeriesDescription(float(self.location), float(self.scale), float(self.roughness))

    def steps(self, standardised: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the one-step forecast [N, T] after each standardised value [N, T], and the final state."""
        outputs, state = self.lstm(standardised.unsqueeze(-1), state)  # [N, T, hidden]
        return self.head(outputs).squeeze(-1), state

    def free_running(self, first: Tensor, state: State, horizon: int) -> Tensor:
        """Return forecasts [N, horizon], each of which is the input of the next step.

        ``first`` [N, 1] is the first forecast, and ``state`` is the state from which it was computed. Each further
        input is a linear function of the hidden state. This function is merged into the recurrent weights, so that the
        LSTM needs no input, and one call computes all steps.
        """
        if horizon == 1:
            return first
        input_weight, recurrent, bias, recurrent_bias = self.lstm.all_weights[0]
        merged = recurrent + input_weight @ self.head.weight
        merged_bias = bias + input_weight.squeeze(1) * self.head.bias
        zeros = first.new_zeros(len(first), horizon - 1, 1)
        weights = [input_weight, merged, merged_bias, recurrent_bias]
        outputs, _, _ = torch.lstm(zeros, state, weights, True, 1, 0.0, self.training, False, True)
        return torch.cat([first, self.head(outputs).squeeze(-1)], dim=1)

    def forward(self, windows: Tensor, horizon: int) -> Tensor:
        """Return standardised forecasts [N, horizon], given standardised windows [N, window]."""
        outputs, state = self.steps(windows)
        return self.free_running(outputs[:, -1:], state, horizon)
