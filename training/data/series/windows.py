"""Draw random training windows from many series, which are stored in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from app.tasks.forecasting import MIN_VALUES

WEIGHT_BEYOND_HORIZON = 0.25  # loss weight of the steps beyond the horizon of the source


@dataclass(frozen=True)
class Source:
    """A group of training series, float64 [T] each, with the same season length.

    ``horizon``: number of forecast steps that are evaluated. ``share``: share of this source's windows in a batch,
    relative to the shares of the other sources. ``truncated``: share of the windows whose past is cut to a random
    length. The logarithm of this length is uniformly distributed. ``observed``: for each series, booleans [T] that
    are False where the value is interpolated; None if no value is interpolated.
    """

    series: Sequence[Tensor]
    season: int
    horizon: int
    share: float
    truncated: float = 0.15
    observed: Sequence[Tensor] | None = None


class Batch(NamedTuple):
    """N windows of series.

    Attributes:
        values: past values [N, context]; NaN before the first value of a series.
        seasons: season lengths [N]; 1 if a series has no season, or if the network does not receive its season.
        future: future values [N, horizon]; NaN for unknown values.
        weights: the weight [N, horizon] of each step in the loss.
    """

    values: Tensor
    seasons: Tensor
    future: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return a copy of the batch on ``device``."""
        return Batch(*(part.to(device) for part in self))


class WindowSampler:
    """Draws windows of ``context`` past and ``horizon`` future values from all series of all sources.

    ``hidden_season_share``: share of the windows for which the network does not receive the season. The network also
    does not receive a season that is as long as the past or longer. The past of a window ends with an observed value,
    because interpolated values depend on the values after them.
    """

    def __init__(self, sources: Sequence[Source], context: int, horizon: int, hidden_season_share: float = 0.0) -> None:
        self.context, self.horizon, self.hidden_season_share = context, horizon, hidden_season_share
        self.values = torch.cat([series for source in sources for series in source.series])
        self.lengths = torch.tensor([len(series) for source in sources for series in source.series])
        self.starts = self.lengths.cumsum(0) - self.lengths  # first position of each series in ``values``
        self.missing_before: Tensor | None = None  # number of missing values directly before each position
        if any(source.observed for source in sources):
            observed = [own for source in sources for own in source.observed or map(torch.isfinite, source.series)]
            self.missing_before = torch.cat([_missing_before(each) for each in observed])
        self.counts = torch.tensor([len(source.series) for source in sources])
        self.first_series = self.counts.cumsum(0) - self.counts  # index of the first series of each source
        self.shares = torch.tensor([source.share for source in sources])
        self.seasons = torch.tensor([source.season for source in sources])
        self.horizons = torch.tensor([source.horizon for source in sources])
        self.truncated = torch.tensor([source.truncated for source in sources], dtype=torch.float64)

    def sample(self, count: int, mixup: float, held_out: bool, generator: Generator) -> Batch:
        """Return ``count`` random windows.

        ``mixup``: share of the windows that are replaced by a weighted mean of the window and another window of the
        same source. ``held_out``: whether the windows leave out the last horizon of each series.
        """
        sources = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        batch = self._random(sources, held_out, generator)
        partners = self._random(sources[: int(count * mixup)], held_out, generator)
        return self._mix(batch, partners, generator)

    def last_horizons(self, source: int) -> Batch:
        """Return the last horizon of every series of a source as the future, and the values before it as the past."""
        series = torch.arange(int(self.counts[source])) + self.first_series[source]
        origins = self.lengths[series] - self.horizons[source]
        sources = torch.full_like(series, source)
        return self._gather(sources, self.seasons[sources], series, origins, origins, self.lengths[series])

    def _random(self, sources: Tensor, held_out: bool, generator: Generator) -> Batch:
        """Draw one window for each source index [N]. Its origin is the position of its first future value.

        Half of the origins are uniformly distributed over the series. The other half tends to be near the end of the
        series.
        """
        random = torch.rand(6, len(sources), generator=generator, dtype=torch.float64)
        series = self.first_series[sources] + (random[0] * self.counts[sources]).long()
        end = self.lengths[series] - self.horizons[sources] * held_out
        latest = (end - self.horizons[sources] - MIN_VALUES).clamp(min=0)  # latest origin minus MIN_VALUES
        age = torch.where(random[1] < 0.5, random[2], random[2] ** 3)
        origins = (MIN_VALUES + latest - (age * (latest + 1)).long()).minimum(end - 1)
        if self.missing_before is not None:
            origins = origins - self.missing_before[self.starts[series] + origins]
        past = origins.clamp(max=self.context)
        truncated = (MIN_VALUES * (past / MIN_VALUES) ** random[3]).round().long()
        past = torch.where(random[4] < self.truncated[sources], truncated.minimum(past), past)
        seasons = self.seasons[sources]
        seasons = torch.where((seasons < past) & (random[5] >= self.hidden_season_share), seasons, 1)
        return self._gather(sources, seasons, series, origins, past, end)

    def _gather(
        self, sources: Tensor, seasons: Tensor, series: Tensor, origins: Tensor, past: Tensor, end: Tensor
    ) -> Batch:
        """Return a batch of windows: the ``past`` values before each origin, and the values from the origin to ``end``.

        All arguments are tensors [N].
        """
        positions = origins.unsqueeze(1) + torch.arange(-self.context, self.horizon)
        inside = positions.clamp(min=0).minimum(self.lengths[series].unsqueeze(1) - 1)
        known = (positions >= (origins - past).unsqueeze(1)) & (positions < end.unsqueeze(1))
        windows = self.values[self.starts[series].unsqueeze(1) + inside].masked_fill(~known, torch.nan)
        evaluated = torch.arange(self.horizon) < self.horizons[sources].unsqueeze(1)
        weights = torch.where(evaluated, 1.0, WEIGHT_BEYOND_HORIZON)
        return Batch(windows[:, : self.context], seasons, windows[:, self.context :], weights)

    def _mix(self, batch: Batch, partners: Batch, generator: Generator) -> Batch:
        """Return the batch with its first windows replaced: each is the weighted mean of two normalised windows.

        These two windows are the window of the batch and its partner. This method is TSMixup of Chronos (Ansari et al.
        2024).
        """
        count = len(partners.values)
        weight = 0.5 + 0.5 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        pairs = [torch.cat([values[:count], future[:count]], dim=1) for values, _, future, _ in (batch, partners)]
        first, second = (self._normalise(windows) for windows in pairs)
        mixed = weight * first + (1 - weight) * second
        values = torch.cat([mixed[:, : self.context], batch.values[count:]])
        future = torch.cat([mixed[:, self.context :], batch.future[count:]])
        known = (~values.isnan()).sum(1)  # a mixed window has the length of the shorter of its two windows
        return Batch(values, torch.where(batch.seasons < known, batch.seasons, 1), future, batch.weights)

    def _normalise(self, windows: Tensor) -> Tensor:
        """Shift windows [N, context + horizon] so that the past ends at 0.

        Then divide them by the mean absolute value of the shifted past.
        """
        shifted = windows - windows[:, self.context - 1 : self.context]
        scale = shifted[:, : self.context].abs().nanmean(dim=1, keepdim=True)
        return shifted / torch.where(scale > 0, scale, 1.0)


def _missing_before(observed: Tensor) -> Tensor:
    """Return the number of missing values directly before each position of a series, given booleans [T]."""
    positions = torch.arange(len(observed))
    last_observed = torch.where(observed, positions, -1).cummax(0).values
    return F.pad(positions[:-1] - last_observed[:-1], (1, 0))
