"""The inputs of the forecaster's layers, computed from the values of a series. This module has no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 4  # per value: distance from the level on two scales, seasonal difference, whether the value is known
YEAR, YEARS = 52, 5  # series without a season are also compared with the same week of 5 earlier years
FLOOR = 0.01  # smallest scale relative to the spread; needed if each season repeats the previous one
SHORTEST, LONGEST = 0.7, 200.0  # timescales of exponential smoothing, in time steps
SLOPE_RIDGE = 0.1  # added to the variance of the ages, so that the slope of a single value is 0
MAX_CANDIDATE = 1000.0  # largest distance of a classical forecast from the naive forecast, in units of the scale
ERROR_FLOOR = 0.03  # added to the past errors, in units of the scale, because they may be 0
PROFILE_DECAY, PROFILE_RIDGE = 0.9, 0.3  # weight of a season relative to the next one; pull of the profile towards 0
MAX_STEPS, MAX_SMOOTHINGS = 100_000, 100  # largest context and horizon; largest number of timescales
MIN_SCALE = 1e-305  # smaller scales count as 0, because products with them would not be exact


@dataclass(frozen=True)
class ForecasterSizes:
    """Sizes of ``Forecaster``.

    ``context``: number of values that the network reads, in patches of ``patch`` values. ``lags``: number of earlier
    seasons with which each forecast step is compared. ``members``: number of networks in the ensemble. ``smoothings``:
    number of timescales of exponential smoothing, each of which gives three classical forecasts. ``lag_forecasts``:
    whether the classical forecasts include seasonal naive forecasts with 2, 3 ... ``lags`` times the season.
    """

    context: int = 336
    patch: int = 24
    horizon: int = 48
    hidden: int = 128
    layers: int = 1
    lags: int = 14
    members: int = 3
    smoothings: int = 0
    lag_forecasts: bool = False

    @property
    def features(self) -> int:
        """The number of features of each step ahead."""
        smoothed = 3 * self.smoothings + 2 if self.smoothings else 0
        lag_errors = 2 * self.lags if self.lag_forecasts else 0
        return 2 * self.lags + 2 * YEARS + 4 + lag_errors + smoothed

    @property
    def candidates(self) -> int:
        """The number of classical forecasts of each step ahead, without the naive forecast."""
        return (self.lags - 1 if self.lag_forecasts else 0) + 3 * self.smoothings


class NetworkInputs(NamedTuple):
    """The naive forecast, the scale, and the inputs of the layers.

    The naive forecast and the scale convert the outputs of the layers to values of the series.
    """

    patches: Tensor  # [N, context / patch, patch * CHANNELS + 3]
    ahead: Tensor  # [N, horizon, features]
    naive: Tensor  # float64 [N, horizon]
    scale: Tensor  # float64 [N, 1]; 0 for a constant series
    candidates: Tensor  # [N, horizon, candidates]: classical minus naive forecasts, in units of the scale


class Reader(nn.Module):
    """Removes the level and the scale of each series, so that the layers do not depend on its unit of measurement.

    The module has no weights. The module computes in float64, and returns the inputs of the layers in float32.
    """

    moments: Tensor  # [context, 3 smoothings]: the weights of exponential smoothing, multiplied by 1, age and age²
    decayed: Tensor  # [horizon, smoothings]: the sum of the decaying slopes up to each step

    def __init__(self, sizes: ForecasterSizes) -> None:
        super().__init__()
        # Reject sizes that would take too much memory, which a damaged model card may contain.
        for name, largest in (("context", MAX_STEPS), ("horizon", MAX_STEPS), ("smoothings", MAX_SMOOTHINGS)):
            if getattr(sizes, name) > largest:
                raise ValueError(f"{name} is {getattr(sizes, name)}; the maximum is {largest:,}")
        self.sizes = sizes
        # Use NumPy, because a new network is first built on the meta device, where torch would import its compiler.
        timescales = np.geomspace(SHORTEST, LONGEST, sizes.smoothings)
        age = np.arange(sizes.context - 1.0, -1, -1)[:, None]  # steps before the last value
        weights, decay = np.exp(-age / timescales), np.exp(-0.5 / timescales)
        decayed = decay * (1 - decay ** np.arange(1.0, sizes.horizon + 1)[:, None]) / (1 - decay)
        moments = np.concatenate([weights, weights * age, weights * age**2], axis=1)
        # Copy them, because torch cannot export an empty buffer that shares its memory with NumPy.
        self.register_buffer("moments", torch.from_numpy(moments).clone(), persistent=False)
        self.register_buffer("decayed", torch.from_numpy(decayed).clone(), persistent=False)

    def forward(self, values: Tensor, seasons: Tensor) -> NetworkInputs:
        """Return the inputs of the layers for N series.

        Args:
            values: float64 [N, context], with NaN before the first value of a series.
            seasons: int64 [N], the number of values per season. Each series must be longer than its season.
        """
        known = ~values.isnan()
        x = values.nan_to_num(0.0)
        positions = torch.arange(self.sizes.context, device=x.device)
        season = seasons.unsqueeze(1)

        last_season = known & (positions >= self.sizes.context - season)
        level = _mean(x, last_season)  # [N, 1]
        x = torch.where(known, x - level, 0.0)
        before = positions - season  # [N, context]
        comparable = known & (before >= 0) & known.gather(1, before.clamp(min=0))
        differences = torch.where(comparable, x - x.gather(1, before.clamp(min=0)), 0.0)
        spread = _mean(x.abs(), known)
        scale = torch.maximum(_mean(differences.abs(), comparable), FLOOR * spread)
        scale = torch.where(scale > MIN_SCALE, scale, 0.0)
        unit = torch.where(scale > 0, scale, 1.0)
        large_unit = torch.where(spread > MIN_SCALE, spread, 1.0)

        # The quotients are far below the limit of float32, because the scale is at least ``FLOOR`` times the spread.
        scaled = x / unit
        near, far, change = (part.float() for part in (scaled, (x / large_unit).clamp(-10, 10), differences / unit))
        tokens = torch.stack([near.asinh(), far, change.asinh(), known.float()], dim=2)  # [N, context, CHANNELS]
        tokens = tokens.unflatten(1, (-1, self.sizes.patch)).flatten(2)
        summary = [(large_unit / unit).log(), season.log(), known.sum(1, keepdim=True).log()]
        features = torch.cat([feature.float() for feature in summary], dim=1) / 3  # [N, 3]
        tokens = torch.cat([tokens, features.unsqueeze(1).expand(-1, tokens.shape[1], -1)], dim=2)
        naive, ahead = self._ahead(x, known, unit, season)
        scaled_naive = naive / unit
        features_ahead, candidates = [ahead], [ahead[..., :0]]
        if self.sizes.lag_forecasts:
            repeated, errors = self._repeat_seasons(scaled, known, season, scaled_naive)
            candidates.append(_limited(repeated))
            features_ahead.append(errors.unsqueeze(1).expand(-1, ahead.shape[1], -1))
        if self.sizes.smoothings:
            profile, strength = _seasonal_profile(scaled, known, season)
            step = torch.arange(self.sizes.horizon, device=x.device)
            profile_ahead = profile.gather(1, (-1 - step) % season).unsqueeze(2)
            smoothed = self._smooth(scaled, known, season, profile) + profile_ahead
            candidates.append(_limited(smoothed - scaled_naive.unsqueeze(2)))
            extra = [profile_ahead.float().asinh(), strength.float().unsqueeze(2).expand_as(profile_ahead)]
            features_ahead += [candidates[-1].asinh(), *extra]
        ahead = torch.cat(features_ahead, dim=2)
        return NetworkInputs(tokens, ahead, naive + level, scale, torch.cat(candidates, dim=2))

    def _repeat_seasons(self, x: Tensor, known: Tensor, season: Tensor, naive: Tensor) -> tuple[Tensor, Tensor]:
        """Return the candidates [N, horizon, lags - 1] that repeat the last 2, 3 ... seasons, and features [N, 2 lags].

        ``x`` [N, context] and the seasonal naive forecast [N, horizon] are in units of the scale. The features are the
        logarithm of the past error of each candidate and of the naive forecast, and whether this error is known. An
        error is the mean absolute difference from the values 1, 2, 3 ... seasons earlier. A candidate is 0 if the value
        to repeat is unknown.
        """
        count = self.sizes.context
        periods = season.unsqueeze(2) * torch.arange(1, self.sizes.lags + 1, device=x.device)  # [N, 1, lags]
        step = torch.arange(self.sizes.horizon, device=x.device).unsqueeze(1)
        later = periods[..., 1:]
        repeated, known_repeated = _at(x, known, count + step - later * (step // later + 1))
        candidates = torch.where(known_repeated, repeated - naive.unsqueeze(2), 0.0)

        x = x.float()
        before, comparable = _at(x, known, torch.arange(count, device=x.device) - periods.transpose(1, 2))
        comparable = comparable & known.unsqueeze(1)  # [N, lags, context]
        compared = comparable.sum(2)
        differences = torch.where(comparable, (x.unsqueeze(1) - before).abs(), 0.0)
        errors = differences.sum(2) / compared.clamp(min=1)
        known_errors = compared > 0
        logarithms = torch.where(known_errors, (errors + ERROR_FLOOR).log(), 0.0)
        return candidates, torch.cat([logarithms, known_errors.float()], dim=1)

    def _smooth(self, x: Tensor, known: Tensor, season: Tensor, profile: Tensor) -> Tensor:
        """Return the classical forecasts [N, horizon, 3 smoothings] of series x [N, context] without their seasons.

        For each timescale, a line is fitted by least squares with weights that decay exponentially. The three forecasts
        are the weighted mean, the line, and the line with a slope that decays.
        """
        phase = torch.arange(self.sizes.context - 1, -1, -1, device=x.device) % season
        adjusted = torch.where(known, x - profile.gather(1, phase), 0.0)
        total, *ages = (known.to(x.dtype) @ self.moments).unsqueeze(1).chunk(3, dim=2)  # [N, 1, smoothings]
        mean, product, _ = ((adjusted @ self.moments).unsqueeze(1) / total.repeat(1, 1, 3)).chunk(3, dim=2)
        mean_age, mean_square = (moment / total for moment in ages)
        slope = (mean_age * mean - product) / (mean_square - mean_age.square() + SLOPE_RIDGE)
        step = torch.arange(1, self.sizes.horizon + 1, device=x.device, dtype=x.dtype).unsqueeze(1)
        end = mean + slope * mean_age
        return torch.cat([mean.expand(-1, len(step), -1), end + slope * step, end + slope * self.decayed], dim=2)

    def _ahead(self, x: Tensor, known: Tensor, unit: Tensor, season: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors: the seasonal naive forecast [N, horizon] of x [N, context], and features of each step.

        Most features are the values at the same position of earlier seasons. For series without a season, there are
        also the changes over the same weeks of earlier years.
        """
        sizes = self.sizes
        step = torch.arange(sizes.horizon, device=x.device).unsqueeze(1)  # [horizon, 1]
        back = torch.arange(sizes.lags, device=x.device)
        period = season.unsqueeze(2)  # [N, 1, 1]
        lagged, known_lagged = _at(x, known, sizes.context + step - period * (step // period + 1 + back))
        naive = lagged[..., :1]  # of [N, horizon, lags]

        years = YEAR * (step // YEAR + 1 + torch.arange(YEARS, device=x.device)).expand(x.shape[0], -1, -1)
        no_season = period == 1
        after, known_after = _at(x, known, sizes.context + step - years)
        origin, known_origin = _at(x, known, sizes.context - 1 - years)
        both = known_after & known_origin & no_season

        phase = 2 * torch.pi * (step + 1) / period  # [N, horizon, 1]
        distance = ((step + 1) / sizes.horizon).expand_as(phase)
        parts = [
            ((lagged - naive) / unit.unsqueeze(2)).float().asinh() * known_lagged,
            ((after - origin) / unit.unsqueeze(2)).float().asinh() * both,
            *(known_lagged, both, phase.sin(), phase.cos(), distance, (period.log() / 3).expand_as(phase)),
        ]
        return naive.squeeze(2), torch.cat([part.float() for part in parts], dim=2)


def _seasonal_profile(x: Tensor, known: Tensor, season: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors: the seasonal profile [N, context] of x [N, context], and a share of variance [N, 1].

    The profile is the weighted mean of the deviations from the centred moving average over one season. Recent seasons
    have larger weights. The index of the profile is the number of steps before the last value, modulo the season. The
    profile is 0 if no full season is known. The share is the part of the variance that the profile explains, after the
    trend is removed.
    """
    count = x.shape[1]
    position = torch.arange(count, device=x.device).expand_as(x)
    first = position - season // 2
    inside = (first >= 0) & (first + season <= count)
    begin = first.clamp(min=0)
    end = (first + season).clamp(max=count)
    sums, counts = (F.pad(part.cumsum(1), (1, 0)) for part in (torch.where(known, x, 0.0), known.to(x.dtype)))
    full = inside & known & (counts.gather(1, end) - counts.gather(1, begin) == season)
    deviation = torch.where(full, x - (sums.gather(1, end) - sums.gather(1, begin)) / season, 0.0)
    age = count - 1 - position
    weight = torch.where(full, PROFILE_DECAY ** (age // season).to(x.dtype), 0.0)
    phase = age % season
    empty = torch.zeros_like(x)
    total = empty.scatter_add(1, phase, weight)
    profile = empty.scatter_add(1, phase, weight * deviation) / (total + PROFILE_RIDGE)
    in_season = (position < season).to(x.dtype)
    profile = (profile - (profile * in_season).sum(1, keepdim=True) / season) * in_season
    left = torch.where(full, deviation - profile.gather(1, phase), 0.0)
    variance = (weight * deviation.square()).sum(1, keepdim=True)
    strength = 1 - (weight * left.square()).sum(1, keepdim=True) / torch.where(variance > 0, variance, 1.0)
    return profile, torch.where(variance > 0, strength, 0.0)


def _limited(candidates: Tensor) -> Tensor:
    return candidates.clamp(-MAX_CANDIDATE, MAX_CANDIDATE).float()


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean [N, 1] of the values in each row for which ``mask`` is true, or 0 without such values."""
    return torch.where(mask, x, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def _at(x: Tensor, known: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors: the values of x [N, context] at ``positions`` [N, ...], and a mask [N, ...].

    The mask is False where a position is negative, or where ``known`` [N, context] says that the value is missing.
    """
    inside = positions.clamp(min=0).flatten(1)
    values = x.gather(1, inside).view_as(positions)
    return values, (positions >= 0) & known.gather(1, inside).view_as(positions)
