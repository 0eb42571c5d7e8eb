"""The series network: standardised values in, the next values out, and the units to standardise in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SeriesLSTMSizes:
    """``window``: how many values are read before the first forecast."""

    window: int = 50
    hidden: int = 64


class SeriesLSTM(nn.Module):
    """The workshop's LSTM: one layer 1 -> hidden, and a linear layer on its last step.

    ``location``, ``scale`` and ``roughness`` (standard deviation of steps from one value to the next) describe the
    series it was trained on, and travel with its weights.
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

    def describe(self, series: Tensor) -> None:
        """Take over the units of the training series [T]."""
        self.location.copy_(series.mean())
        self.scale.copy_(series.std())
        self.roughness.copy_(series.diff().std())

    def knows(self, values: Tensor) -> bool:
        """Whether a series [T] looks like the one trained on: no value far from it, steps about as rough."""
        far = ((values - self.location) / self.scale).abs().max()
        rough = values.diff().std() / self.roughness
        return bool(far < 5 and 1 / 3 < rough < 3)

    def steps(self, standardised: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """standardised values [N, T] -> the forecast after each of them [N, T], and the state after the last."""
        outputs, state = self.lstm(standardised.unsqueeze(-1), state)  # [N, T, hidden]
        return self.head(outputs).squeeze(-1), state

    def free_running(self, first: Tensor, state: State, horizon: int) -> Tensor:
        """The first forecast [N, 1] and the state it came from -> forecasts [N, horizon], each read as the next value.

        What is read is a linear map of the hidden state, so reading it can be merged into the recurrent weights:
        then there is nothing left to read, and all steps are one call.
        """
        if horizon == 1:
            return first
        read, recurrent, bias, recurrent_bias = self.lstm.all_weights[0]
        merged = recurrent + read @ self.head.weight
        merged_bias = bias + read.squeeze(1) * self.head.bias
        nothing = first.new_zeros(len(first), horizon - 1, 1)
        weights = [read, merged, merged_bias, recurrent_bias]
        outputs, _, _ = torch.lstm(nothing, state, weights, True, 1, 0.0, self.training, False, True)
        return torch.cat([first, self.head(outputs).squeeze(-1)], dim=1)

    def forward(self, windows: Tensor, horizon: int) -> Tensor:
        """standardised windows [N, window] -> standardised forecasts [N, horizon]."""
        outputs, state = self.steps(windows)
        return self.free_running(outputs[:, -1:], state, horizon)
