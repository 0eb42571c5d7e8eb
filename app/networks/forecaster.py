"""The forecaster: the last values of any series in, quantiles of what follows out, both in the series' own units.

Nothing of a series' units reaches the layers: they read it from its own level, in units of its own usual step from
one season to the next (the denominator of MASE), and answer by how much the seasonal naive forecast will be off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QUANTILES = (0.025, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.975)
MEDIAN = QUANTILES.index(0.5)
CHANNELS = 4  # of a value: from the level in small and in large units, the step from a season before, whether known
YEAR, YEARS = 52, 5  # steps of one value are also compared with those of so many years of weeks before
FLOOR = 0.01  # of the spread: so small at least are the units, also where every season repeats the last
LEAST = 1e-305  # units smaller than that are none: products with them would not be exact


@dataclass(frozen=True)
class ForecasterSizes:
    """``context``: values read, in pieces of ``patch``; ``lags``: seasons that a step ahead is compared with."""

    context: int = 336
    patch: int = 12
    horizon: int = 48
    hidden: int = 128
    layers: int = 1
    lags: int = 14
    members: int = 3


class Reading(NamedTuple):
    """Series without their units: what the layers read, and the path and the units to come back to."""

    patches: Tensor  # [N, context / patch, patch * CHANNELS + 3]
    ahead: Tensor  # [N, horizon, features]
    naive: Tensor  # float64 [N, horizon]
    scale: Tensor  # float64 [N, 1]; 0 for a constant series


class Reader(nn.Module):
    """Takes the units off. It has no weights, and computes in float64 until they are gone."""

    def __init__(self, sizes: ForecasterSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.features = 2 * sizes.lags + 2 * YEARS + 4

    def forward(self, values: Tensor, seasons: Tensor) -> Reading:
        """values float64 [N, context], NaN before a series begins; seasons int64 [N], each with one whole season."""
        known = ~values.isnan()
        x = values.nan_to_num(0.0)
        places = torch.arange(self.sizes.context, device=x.device)
        season = seasons.unsqueeze(1)

        last = known & (places >= self.sizes.context - season)
        level = _mean(x, last)  # [N, 1]: of the last season
        x = torch.where(known, x - level, 0.0)
        before = places - season  # [N, context]
        stepped = known & (before >= 0) & known.gather(1, before.clamp(min=0))
        steps = torch.where(stepped, x - x.gather(1, before.clamp(min=0)), 0.0)
        spread = _mean(x.abs(), known)
        scale = torch.maximum(_mean(steps.abs(), stepped), FLOOR * spread)
        scale = torch.where(scale > LEAST, scale, 0.0)
        unit = torch.where(scale > 0, scale, 1.0)
        wide = torch.where(spread > LEAST, spread, 1.0)

        channels = [(x / unit).asinh(), (x / wide).clamp(-10, 10), (steps / unit).asinh(), known]
        tokens = torch.stack([channel.float() for channel in channels], dim=2)  # [N, context, CHANNELS]
        tokens = tokens.unflatten(1, (-1, self.sizes.patch)).flatten(2)
        about = [(wide / unit).log(), season.log(), known.sum(1, keepdim=True).log()]
        told = torch.cat([one.float() for one in about], dim=1) / 3  # [N, 3]
        tokens = torch.cat([tokens, told.unsqueeze(1).expand(-1, tokens.shape[1], -1)], dim=2)
        naive, ahead = self._ahead(x, known, unit, season)
        return Reading(tokens, ahead, naive + level, scale)

    def _ahead(self, x: Tensor, known: Tensor, unit: Tensor, season: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, context] from its level -> the seasonal naive path [N, horizon], and what each step is compared with.

        That are the values at its place in earlier seasons and, where the season is one value, what came after the
        same week of earlier years.
        """
        sizes = self.sizes
        step = torch.arange(sizes.horizon, device=x.device).unsqueeze(1)  # [horizon, 1]
        back = torch.arange(sizes.lags, device=x.device)
        turns = season.unsqueeze(2)  # [N, 1, 1]
        seen, there = _at(x, known, sizes.context + step - turns * (step // turns + 1 + back))  # [N, horizon, lags]
        naive = seen[..., :1]

        years = YEAR * (step // YEAR + 1 + torch.arange(YEARS, device=x.device)).expand(len(x), -1, -1)
        weekly = turns == 1
        after, known_after = _at(x, known, sizes.context + step - years)
        origin, known_origin = _at(x, known, sizes.context - 1 - years)
        both = known_after & known_origin & weekly

        turn = 2 * torch.pi * (step + 1) / turns  # [N, horizon, 1]
        place = ((step + 1) / sizes.horizon).expand_as(turn)
        parts = [
            ((seen - naive) / unit.unsqueeze(2)).asinh() * there,
            ((after - origin) / unit.unsqueeze(2)).asinh() * both,
            *(there, both, turn.sin(), turn.cos(), place, (turns.log() / 3).expand_as(turn)),
        ]
        return naive.squeeze(2), torch.cat([part.float() for part in parts], dim=2)


def _mean(x: Tensor, chosen: Tensor) -> Tensor:
    """The mean [N, 1] of the chosen values of each row; 0 where there are none."""
    return torch.where(chosen, x, 0.0).sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp(min=1)


def _at(x: Tensor, known: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The values of x [N, context] at places [N, ...], and whether there are any."""
    inside = places.clamp(min=0).flatten(1)
    found = x.gather(1, inside).view_as(places)
    return found, (places >= 0) & known.gather(1, inside).view_as(places)


class Member(nn.Module):
    """One LSTM over the patches, and a small network that says for each step ahead how far off the naive path is."""

    def __init__(self, sizes: ForecasterSizes) -> None:
        super().__init__()
        width = sizes.hidden
        self.embed = nn.Linear(sizes.patch * CHANNELS + 3, width)
        self.lstm = nn.LSTM(width, width, sizes.layers, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.summary = nn.Linear(width, width)
        self.local = nn.Linear(Reader(sizes).features, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, len(QUANTILES))

    def forward(self, patches: Tensor, ahead: Tensor) -> Tensor:
        """patches [N, P, ...], ahead [N, horizon, features] -> quantiles in units [N, horizon, QUANTILES]."""
        return in_order(self.head(self.hidden(patches, ahead)))

    def hidden(self, patches: Tensor, ahead: Tensor, kept: Tensor | None = None) -> Tensor:
        """All but the last layer: [N, horizon, hidden]. ``kept`` [N, hidden] is dropout, in training."""
        embedded = F.silu(self.embed(patches))
        read, _ = self.lstm(embedded)
        summary = self.norm(read[:, -1] + embedded[:, -1])  # [N, hidden]
        if kept is not None:
            summary = summary * kept
        x = F.silu(self.summary(summary).unsqueeze(1) + self.local(ahead))
        return x + F.silu(self.middle(x))


def in_order(raw: Tensor) -> Tensor:
    """Any numbers [..., QUANTILES] -> quantiles that never cross: the median, and steps away from it."""
    gaps = F.softplus(raw)
    up = gaps[..., MEDIAN + 1 :].cumsum(-1)
    down = gaps[..., :MEDIAN].flip(-1).cumsum(-1).flip(-1)
    middle = raw[..., MEDIAN : MEDIAN + 1]
    return torch.cat([middle - down, middle, middle + up], dim=-1)


class Forecaster(nn.Module):
    """One network for every series: members that learnt alike from different seeds, averaged for each quantile.

    ``widening`` [2, horizon] is by how much the distance of every quantile from the median is stretched, for series
    without and with a season; measured on what the members had not learnt.
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
        """values float64 [N, context], NaN before a series begins, seasons int64 [N] -> [N, horizon, QUANTILES].

        A series must have one season and a value more. The answer is in its units, float64.
        """
        reading = self.read(values, seasons)
        off = torch.stack([member(reading.patches, reading.ahead) for member in self.members]).mean(0).double()
        middle = off[..., MEDIAN : MEDIAN + 1]
        off = middle + (off - middle) * self.widening[(seasons > 1).long()].unsqueeze(2)
        return reading.naive.unsqueeze(2) + off * reading.scale.unsqueeze(2)

    def forecast(self, values: Tensor, seasons: Tensor, horizon: int) -> Tensor:
        """As ``forward``, for any horizon: [N, horizon, QUANTILES].

        No step is surer than the same one a season before. Past its own horizon the network reads its own median and
        goes on; what it says of its own forecasts would be too sure, so that from there the widest distances grow
        with the root of the steps ahead, as those of a random walk do.
        """
        own = self.sizes.horizon
        quantiles = self(values, seasons)
        medians = [quantiles[..., MEDIAN]]
        away = _no_surer((quantiles - quantiles[..., MEDIAN : MEDIAN + 1]).abs(), seasons)
        while len(medians) * own < horizon:
            values = torch.cat([values, medians[-1]], dim=1)[:, own:]
            medians.append(self(values, seasons)[..., MEDIAN])
        beyond = torch.arange(1, max(horizon - own, 0) + 1, device=away.device, dtype=away.dtype)
        later = away.amax(1, keepdim=True) * (1 + beyond / own).sqrt().unsqueeze(1)
        below = torch.arange(len(QUANTILES), device=away.device) < MEDIAN
        away = torch.cat([away, later], dim=1)[:, :horizon]
        return torch.cat(medians, dim=1)[:, :horizon].unsqueeze(2) + torch.where(below, -away, away)


def _no_surer(away: Tensor, seasons: Tensor) -> Tensor:
    """Distances [N, horizon, QUANTILES], each made at least as large as all those whole seasons before it.

    One, then two, then four seasons back: that reaches all.
    """
    turns = seasons.view(-1, 1, 1)
    step = torch.arange(away.shape[1], device=away.device).view(1, -1, 1)
    for power in range(away.shape[1].bit_length()):
        before = step - (turns << power)
        seen = away.gather(1, before.clamp(min=0).expand_as(away))
        away = torch.where(before >= 0, torch.maximum(away, seen), away)
    return away
