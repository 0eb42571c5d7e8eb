"""The workshop's series network: standardised values to forecasts. It also stores the units of its training series."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SeriesLSTMSizes:
    """``window``: number of values that the network reads before the first forecast."""

    window: int = 50
    hidden: int = 64


class SeriesLSTM(nn.Module):
    """The workshop's LSTM: one layer 1 -> hidden, and a linear layer on its last step.

    ``location``, ``scale`` and ``roughness`` (standard deviation of the differences of adjacent values) describe the
    training series. They are stored with the weights.
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
        """Store the units of the training series [T]."""
        self.location.copy_(series.mean())
        self.scale.copy_(series.std())
        self.roughness.copy_(series.diff().std())

    def knows(self, values: Tensor) -> bool:
        """Return whether a series [T] is similar to the training series in its range and roughness."""
        max_score = ((values - self.location) / self.scale).abs().max()
        roughness_ratio = values.diff().std() / self.roughness
        return bool(max_score < 5 and 1 / 3 < roughness_ratio < 3)

    def steps(self, standardised: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """standardised values [N, T] -> the one-step forecast after each value [N, T], and the final state."""
        outputs, state = self.lstm(standardised.unsqueeze(-1), state)  # [N, T, hidden]
        return self.head(outputs).squeeze(-1), state

    def free_running(self, first: Tensor, state: State, horizon: int) -> Tensor:
        """Continue from the first forecast [N, 1] and its state to forecasts [N, horizon], each the input of the next.

        Each input is a linear map of the hidden state. Merged into the recurrent weights, it leaves no input, and all
        steps are one call.
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
        """standardised windows [N, window] -> standardised forecasts [N, horizon]."""
        outputs, state = self.steps(windows)
        return self.free_running(outputs[:, -1:], state, horizon)
