"""A network that forecasts any series. It reads the last values, and returns quantiles of the next values.

The layers do not depend on the unit of measurement. They read (value - level) / scale for each value of the
series. The scale is the mean absolute seasonal difference, which is the denominator of MASE. The layers
predict the errors of the seasonal naive forecast, which repeats the last season.

If ``smoothings`` is above 0, the layers also read classical forecasts. To compute these forecasts, the season is
removed from the series. Exponential smoothing is then applied with no trend, a linear trend or a damped trend. The
layers predict the weights of the classical forecasts and the errors of the weighted mean. Smyl's ES-RNN, the winner of
M4, similarly combines exponential smoothing and LSTM.

If ``lag_forecasts`` is true, the classical forecasts include seasonal naive forecasts with 2, 3 ... times the season.
The layers read the past error of each of them. For example, the network can repeat the last week of an hourly series,
although the season that it receives is a day.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.series_reader import CHANNELS, ForecasterSizes, Reader, Reading

QUANTILES = (0.025, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.975)
MEDIAN = QUANTILES.index(0.5)
SHORT_SERIES = 4  # the intervals of a series with this number of values are twice as wide


class Member(nn.Module):
    """An LSTM over the patches, and a small network that predicts the error of the naive forecast for each step."""

    def __init__(self, sizes: ForecasterSizes) -> None:
        super().__init__()
        width = sizes.hidden
        self.embed = nn.Linear(sizes.patch * CHANNELS + 3, width)
        self.lstm = nn.LSTM(width, width, sizes.layers, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.summary = nn.Linear(width, width)
        self.local = nn.Linear(sizes.features, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, len(QUANTILES))
        self.mix = nn.Linear(width, sizes.candidates + 1) if sizes.candidates else None  # last: the naive forecast
        if self.mix is not None:
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)

    def forward(self, reading: Reading) -> Tensor:
        """Return the scaled quantiles [N, horizon, QUANTILES] relative to the naive forecast."""
        return self.quantiles(self.hidden(reading.patches, reading.ahead), reading.candidates)

    def quantiles(self, hidden: Tensor, candidates: Tensor) -> Tensor:
        """Compute the last layer: return scaled quantiles [N, horizon, QUANTILES], given hidden [N, horizon, width]."""
        errors = in_order(self.head(hidden))
        if self.mix is None:
            return errors
        weights = self.mix(hidden).softmax(2)[..., :-1]
        return errors + (weights * candidates).sum(2, keepdim=True)

    def hidden(self, patches: Tensor, ahead: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        """Return the input [N, horizon, hidden] of the last layer. Only training uses ``dropout_mask`` [N, hidden]."""
        embedded = F.silu(self.embed(patches))
        read, _ = self.lstm(embedded)
        summary = self.norm(read[:, -1] + embedded[:, -1])  # [N, hidden]
        if dropout_mask is not None:
            summary = summary * dropout_mask
        x = F.silu(self.summary(summary).unsqueeze(1) + self.local(ahead))
        return x + F.silu(self.middle(x))


def in_order(raw: Tensor) -> Tensor:
    """Convert any numbers [..., QUANTILES] to quantiles in ascending order: a median, and positive gaps around it."""
    gaps = F.softplus(raw)
    up = gaps[..., MEDIAN + 1 :].cumsum(-1)
    down = gaps[..., :MEDIAN].flip(-1).cumsum(-1).flip(-1)
    middle = raw[..., MEDIAN : MEDIAN + 1]
    return torch.cat([middle - down, middle, middle + up], dim=-1)


class Forecaster(nn.Module):
    """One network for all series. It averages the quantiles of its members, which are trained with different seeds.

    ``widening`` [2, horizon] has factors for the distance of each quantile from the median, for series without and with
    a season. It is 1 in networks with ``smoothings``. Instead, the intervals of these networks are wider for short
    series. The reason is that these networks learned from simulated series, which change less than real series.
    """

    widening: Tensor

    def __init__(self, sizes: ForecasterSizes) -> None:
        super().__init__()
        if sizes.context % sizes.patch:
            raise ValueError(f"context {sizes.context} is not a multiple of patch {sizes.patch}")
        self.sizes = sizes
        self.read = Reader(sizes)
        self.members = nn.ModuleList(Member(sizes) for _ in range(sizes.members))
        self.register_buffer("widening", torch.ones(2, sizes.horizon))

    def forward(self, values: Tensor, seasons: Tensor) -> Tensor:
        """Return quantiles float64 [N, horizon, QUANTILES], given values float64 [N, context] and seasons int64 [N].

        Positions before the first value of a series are NaN. Each series must be longer than its season. The quantiles
        are in the units of the series.
        """
        reading = self.read(values, seasons)
        errors = torch.stack([member(reading) for member in self.members]).mean(0).double()
        middle = errors[..., MEDIAN : MEDIAN + 1]
        errors = middle + (errors - middle) * self.widening[(seasons > 1).long()].unsqueeze(2)
        if self.sizes.smoothings:
            known = (~values.isnan()).sum(1).view(-1, 1, 1)
            errors = middle + (errors - middle) * (1 + SHORT_SERIES / known)
        return reading.naive.unsqueeze(2) + errors * reading.scale.unsqueeze(2)

    def forecast(self, values: Tensor, seasons: Tensor, horizon: int) -> Tensor:
        """Return quantiles [N, horizon, QUANTILES] for any horizon.

        Each interval is at least as wide as the interval at the same position one season earlier. For steps beyond
        ``sizes.horizon``, the network reads its own medians as values. The intervals that the network returns for these
        steps would be too narrow. Instead, the widest earlier interval grows with the square root of the distance, as
        for a random walk.
        """
        own = self.sizes.horizon
        quantiles = self(values, seasons)
        medians = [quantiles[..., MEDIAN]]
        widths = _never_narrower((quantiles - quantiles[..., MEDIAN : MEDIAN + 1]).abs(), seasons)
        while len(medians) * own < horizon:
            values = torch.cat([values, medians[-1]], dim=1)[:, own:]
            medians.append(self(values, seasons)[..., MEDIAN])
        beyond = torch.arange(1, max(horizon - own, 0) + 1, device=widths.device, dtype=widths.dtype)
        later = widths.amax(1, keepdim=True) * (1 + beyond / own).sqrt().unsqueeze(1)
        below = torch.arange(len(QUANTILES), device=widths.device) < MEDIAN
        widths = torch.cat([widths, later], dim=1)[:, :horizon]
        return torch.cat(medians, dim=1)[:, :horizon].unsqueeze(2) + torch.where(below, -widths, widths)


def _never_narrower(widths: Tensor, seasons: Tensor) -> Tensor:
    """Return widths [N, horizon, QUANTILES] that are at least as large as at the same position of earlier seasons.

    Comparing with 1, 2, 4 ... seasons earlier, one after the other, covers all earlier seasons.
    """
    period = seasons.view(-1, 1, 1)
    step = torch.arange(widths.shape[1], device=widths.device).view(1, -1, 1)
    for power in range(widths.shape[1].bit_length()):
        before = step - period * 2**power
        earlier = widths.gather(1, before.clamp(min=0).expand_as(widths))
        widths = torch.where(before >= 0, torch.maximum(widths, earlier), widths)
    return widths
