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

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.linear import merge_norm
from app.networks.series_reader import CHANNELS, ForecasterSizes, NetworkInputs, Reader

QUANTILES = (0.025, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.975)
MEDIAN = QUANTILES.index(0.5)
SHORT_SERIES = 4  # the intervals of a series with this number of values are twice as wide
FEW_SERIES = 2  # largest batch for which ``CombinedMembers`` is clearly faster than one member after the other


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

    def forward(self, inputs: NetworkInputs) -> Tensor:
        """Return the scaled quantiles [N, horizon, QUANTILES] relative to the naive forecast."""
        return self.quantiles(self.hidden(inputs.patches, inputs.ahead), inputs.candidates)

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


class CombinedMembers:
    """Computes the mean output of the M members of a ``Forecaster``, without gradients, with copies of their weights.

    One call computes a layer of all members. With few series, the number of calls determines the time: for one series,
    three members take 0.64 of the time that they take one after the other. Larger batches take longer than that.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        members = list(members)
        first = members[0]
        self.hidden = first.lstm.hidden_size
        self.embed = _stacked(_weights(member.embed) for member in members)
        self.layers = []
        for layer in range(first.lstm.num_layers):
            weights = [member.lstm.all_weights[layer] for member in members]
            read = _stacked((_cell_input_last(own), _cell_input_last(a + b)) for own, _, a, b in weights)
            recurrent = torch.stack([_cell_input_last(own).t() for _, own, _, _ in weights])
            self.layers.append((read, recurrent.detach()))  # recurrent: [M, hidden, 4 hidden]
        self.summary = _stacked(merge_norm(member.norm, *_weights(member.summary)) for member in members)
        self.local = _stacked(_weights(member.local) for member in members)
        self.middle = _stacked(_weights(member.middle) for member in members)
        self.head = _stacked(_head_weights(member) for member in members)

    def __call__(self, inputs: NetworkInputs) -> Tensor:
        """Return the mean of ``Member.forward`` over all members: [N, horizon, QUANTILES]."""
        rows, patches, _ = inputs.patches.shape
        horizon = inputs.ahead.shape[1]
        embedded = F.silu(_product(inputs.patches.transpose(0, 1).flatten(0, 1), self.embed))  # [M, patches N, hidden]
        read = embedded
        for layer in self.layers:
            read = self._read(read, patches, *layer)
        last = read[:, -rows:] + embedded[:, -rows:]  # [M, N, hidden]
        summary = _product(F.layer_norm(last, (self.hidden,)), self.summary)
        local = _product(inputs.ahead.flatten(0, 1), self.local)  # [M, N horizon, hidden]
        x = F.silu(local.unflatten(1, (rows, horizon)) + summary.unsqueeze(2)).flatten(1, 2)
        x = x + F.silu(_product(x, self.middle))
        raw = _product(x, self.head)
        outputs = in_order(raw[..., : len(QUANTILES)])
        if inputs.candidates.shape[2]:
            weights = raw[..., len(QUANTILES) :].softmax(2)[..., :-1]
            outputs = outputs + (weights * inputs.candidates.flatten(0, 1)).sum(2, keepdim=True)
        return outputs.mean(0).unflatten(0, (rows, horizon))

    def _read(self, inputs: Tensor, patches: int, weights: tuple[Tensor, Tensor], recurrent: Tensor) -> Tensor:
        """Compute an LSTM layer. Inputs and outputs are [M, patches N, hidden], ordered by patch."""
        gates = _product(inputs, weights).unflatten(1, (patches, -1))  # [M, patches, N, 4 hidden]
        outputs = inputs.new_empty(inputs.shape)
        gates_at, outputs_at = gates.unbind(1), outputs.unflatten(1, (patches, -1)).unbind(1)
        current = gates_at[0].clone()
        sigmoids, cell_input = current.split((3 * self.hidden, self.hidden), 2)
        input_gate, forget_gate, output_gate = sigmoids.chunk(3, 2)
        cell = torch.zeros_like(input_gate)
        for patch in range(patches):
            if patch:
                torch.baddbmm(gates_at[patch], outputs_at[patch - 1], recurrent, out=current)
            sigmoids.sigmoid_()
            cell.mul_(forget_gate).addcmul_(input_gate, cell_input.tanh_())
            torch.mul(output_gate, cell.tanh(), out=outputs_at[patch])
        return outputs


def _product(inputs: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Compute a linear layer of all members. Inputs [N, in] are the same for all members; [M, N, in] are not."""
    weight, bias = weights  # [M, in, out], [M, 1, out]
    return torch.baddbmm(bias, inputs.expand(len(weight), -1, -1), weight)


def _stacked(layers: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack the weights [out, in] and biases [out] of M layers to tensors [M, in, out] and [M, 1, out]."""
    weight, bias = (torch.stack(parts).detach() for parts in zip(*layers, strict=True))
    return weight.transpose(1, 2).contiguous(), bias.unsqueeze(1)


def _weights(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def _head_weights(member: Member) -> tuple[Tensor, Tensor]:
    """Return the weights of both last layers, which are computed as one layer."""
    heads = [layer for layer in (member.head, member.mix) if layer is not None]
    return torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])


def _cell_input_last(gates: Tensor) -> Tensor:
    """Reorder PyTorch's input, forget, cell and output gates [4 hidden, ...], so that the sigmoids are adjacent."""
    input_gate, forget_gate, cell_input, output_gate = gates.chunk(4)
    return torch.cat([input_gate, forget_gate, output_gate, cell_input])


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
        self.combined: Callable[[NetworkInputs], Tensor] | None = None

    def combine(self) -> None:
        """On the CPU, compute up to FEW_SERIES series faster from now on, with copies of the present weights."""
        if self.widening.device.type == "cpu":
            self.combined = CombinedMembers(self.members)  # type: ignore[arg-type]

    def forward(self, values: Tensor, seasons: Tensor) -> Tensor:
        """Return quantiles float64 [N, horizon, QUANTILES], given values float64 [N, context] and seasons int64 [N].

        Positions before the first value of a series are NaN. Each series must be longer than its season. The quantiles
        are in the units of the series.
        """
        inputs = self.read(values, seasons)
        if self.combined is not None and len(values) <= FEW_SERIES:
            errors = self.combined(inputs).double()
        else:
            errors = torch.stack([member(inputs) for member in self.members]).mean(0).double()
        middle = errors[..., MEDIAN : MEDIAN + 1]
        errors = middle + (errors - middle) * self.widening[(seasons > 1).long()].unsqueeze(2)
        if self.sizes.smoothings:
            known = (~values.isnan()).sum(1).view(-1, 1, 1)
            errors = middle + (errors - middle) * (1 + SHORT_SERIES / known)
        return inputs.naive.unsqueeze(2) + errors * inputs.scale.unsqueeze(2)

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
    distances = period * 2 ** torch.arange(widths.shape[1].bit_length(), device=widths.device)
    earlier = torch.maximum(step - distances, step % period)  # [N, horizon, distances], not before the first season
    for positions in earlier.split(1, 2):
        widths = torch.maximum(widths, widths.gather(1, positions.expand_as(widths)))
    return widths
