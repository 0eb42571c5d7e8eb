"""Detect the season of a series, and fill its missing values."""

from __future__ import annotations

import math

import numpy as np

SEASONS = (4, 7, 12, 24, 52, 168)  # quarters, days of a week, months, hours of a day, weeks, hours of a week
MAX_VALUES = 1344  # only this many values at the end of a series are analysed: eight weeks of hours
DIVISOR_RATIO = 0.7  # a divisor of the best season is preferred if its strength is at least this share of the best
CONSTANT, STRAIGHT = 1e-13, 1e-9  # rounding errors: largest relative spread of a constant series and of a line
# Thresholds of the autocorrelation in standard deviations (one-sided tests). They are low, because missing a season
# harms a forecast more than assuming a wrong season.
SIGNIFICANCE, UNUSUAL_SIGNIFICANCE = 1.0, 1.645
YEAR_HARMONICS = 3
MIN_YEARS = 2  # smallest length, in years, of a series whose yearly pattern is estimated
MAX_SEASON = 168  # values, one week of hours; longest season
# A season outside SEASONS needs a higher prominence and autocorrelation, because among so many candidates some are
# strong by chance.
MIN_PROMINENCE, UNUSUAL_MIN_PROMINENCE, UNUSUAL_MIN_CORRELATION = 0.15, 0.25, 0.5
# A season close to one in SEASONS must also have less than this share of its distance from an autocorrelation of 1.
NEAR_RATIO = 0.5


def detect_season(values: np.ndarray) -> int:
    """Return the number of values per season of a series [T] without NaN, or 1 if it has no season.

    The autocorrelation at the season must be significant, as in the M4 competition. At lags that are half a season
    shorter or longer, the autocorrelation must be clearly lower. Otherwise slow waves and random walks would count as
    seasons, because their autocorrelation is high at all short lags. A season outside ``SEASONS`` must also be a peak
    of the autocorrelation, and stronger than the seasons in ``SEASONS``.
    """
    recent = values[-MAX_VALUES:]
    count = len(recent)
    largest = np.abs(recent).max() or 1.0  # scale first, so that no square overflows or underflows
    recent = recent / largest - (recent / largest).mean()
    spread = np.abs(recent).max()
    if spread < CONSTANT:
        return 1
    time = np.arange(count) - (count - 1) / 2
    recent = recent / spread
    recent = recent - time * (time @ recent / (time @ time))  # without the linear trend
    if np.abs(recent).max() < STRAIGHT:
        return 1
    correlation = _autocorrelation(recent)
    unbiased = correlation * count / (count - np.arange(count))
    # The variance at each lag follows from the correlations at shorter lags (Bartlett).
    scores = correlation / np.sqrt(np.roll(2 * np.square(correlation).cumsum() - 1, 1) / count)
    strong = {season: _strength(scores, unbiased, season) for season in SEASONS if 2 * season < count}
    strong |= {season: _strength(scores, unbiased, season, usual=False) for season in _peaks(unbiased)}
    best = max(strong, key=strong.__getitem__, default=1)
    if not strong.get(best):
        return 1
    while divisors := [m for m in strong if m < best and best % m == 0 and strong[m] >= DIVISOR_RATIO * strong[best]]:
        best = max(divisors, key=strong.__getitem__)
    return best if best in SEASONS else _refine(recent, best)


def _autocorrelation(x: np.ndarray) -> np.ndarray:
    """Return the (biased) autocorrelation [T] of x [T] with mean 0, at lags 0 to T - 1."""
    count = len(x)
    spectrum = np.fft.rfft(x, 2 * count)
    covariance = np.fft.irfft(spectrum * spectrum.conj())[:count]
    return covariance / covariance[0]


def _peaks(unbiased: np.ndarray) -> list[int]:
    """Return the lags of local maxima of the unbiased autocorrelation [T] that are not in ``SEASONS``.

    Lags above ``MAX_SEASON`` or above a third of the length of the series are left out. So are lags close to a season
    in ``SEASONS``, unless the autocorrelation is much higher at the lag.
    """
    max_lag = min(MAX_SEASON, (len(unbiased) - 1) // 3)
    before, at, after = unbiased[1:max_lag], unbiased[2 : max_lag + 1], unbiased[3 : max_lag + 2]
    peaks = (np.flatnonzero((before < at) & (at >= after)) + 2).tolist()
    near = {m: [season for season in SEASONS if abs(m - season) <= season // 24] for m in peaks}
    return [m for m in peaks if m not in SEASONS and all(_is_better(unbiased, m, season) for season in near[m])]


def _is_better(unbiased: np.ndarray, lag: int, season: int) -> bool:
    return season >= len(unbiased) or 1 - unbiased[lag] < NEAR_RATIO * (1 - unbiased[season])


def _refine(x: np.ndarray, season: int) -> int:
    """Return the lag with the smallest mean squared difference among ``season`` and the lags next to it.

    The trend and the short overlap at long lags can move the maximum of the autocorrelation of a smooth series.
    """
    lags = range(max(season - 1, 2), season + 2)
    return min(lags, key=lambda lag: float(np.square(x[lag:] - x[:-lag]).mean()))


def _strength(scores: np.ndarray, unbiased: np.ndarray, season: int, usual: bool = True) -> float:
    """Return the unbiased autocorrelation at a season, or 0 if it is not significant, prominent or strong enough.

    ``scores`` [T] are the biased autocorrelations in standard deviations. ``usual`` says whether the season is in
    ``SEASONS``. Other seasons have stricter thresholds.
    """
    count = len(scores)
    if scores[season] < (SIGNIFICANCE if usual else UNUSUAL_SIGNIFICANCE):
        return 0.0
    early, late = interpolate(unbiased, season / 2), interpolate(unbiased, min(1.5 * season, count - 1))
    prominence, deviation = unbiased[season] - (early + late) / 2, 1 / np.sqrt(count - season)
    required = max(MIN_PROMINENCE, deviation) if usual else max(UNUSUAL_MIN_PROMINENCE, 2 * deviation)
    if prominence <= required or (not usual and unbiased[season] < UNUSUAL_MIN_CORRELATION):
        return 0.0
    return float(unbiased[season])


def interpolate(values: np.ndarray, position: float) -> float:
    """Return the value of a series [T] at a position from 0 to T - 1, interpolated linearly."""
    before, after = values[math.floor(position)], values[math.ceil(position)]
    return float(before + (after - before) * (position % 1))


def fill_missing(values: np.ndarray, season: int) -> np.ndarray:
    """Replace NaN in values [T].

    If ``season`` is 1, missing values are interpolated linearly. Otherwise, the usual deviation from the
    moving average at each position of the season is subtracted before the interpolation, and added afterwards.
    """
    known = np.flatnonzero(~np.isnan(values))
    if len(known) == len(values):
        return values.copy()
    positions = np.arange(len(values))
    line = np.interp(positions, known, values[known])
    if season == 1:
        return line
    smooth = _smooth(line, season)
    deviation = np.where(np.isnan(values), np.nan, values - smooth)
    usual = seasonal_medians(deviation, season)[positions % season]
    return np.where(np.isnan(values), np.interp(positions, known, values[known] - usual[known]) + usual, values)


def yearly_pattern(values: np.ndarray, year: float, ahead: int) -> np.ndarray:
    """Return the yearly pattern [T + ahead] of a series: for its ``values`` [T], and for the ``ahead`` next steps.

    A year has ``year`` values. The pattern is a Fourier series with YEAR_HARMONICS harmonics, fitted along with a
    linear trend (Harvey and Shephard 1993).
    """
    steps = np.arange(len(values) + ahead)
    angles = 2 * np.pi * np.outer(steps, np.arange(1, YEAR_HARMONICS + 1)) / year
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    trend = np.stack([np.ones(len(steps)), steps / len(values)], axis=1)
    inputs = np.concatenate([trend, waves], axis=1)
    weights = np.linalg.lstsq(inputs[: len(values)], values, rcond=None)[0]
    return waves @ weights[2:]


def _smooth(x: np.ndarray, season: int) -> np.ndarray:
    """Return the moving average [T] over one season. At both ends, the average is over fewer values."""
    sums = np.concatenate([[0.0], x.cumsum()])
    positions = np.arange(len(x))
    begin, end = (positions - season // 2).clip(0), (positions - season // 2 + season).clip(max=len(x))
    return (sums[end] - sums[begin]) / (end - begin)


def seasonal_medians(x: np.ndarray, season: int) -> np.ndarray:
    """Return the median [season] of x [T] at each position of the season, or 0 where all values are NaN.

    Other NaN values are ignored.
    """
    seasons = np.pad(x, (0, -len(x) % season), constant_values=np.nan).reshape(-1, season)
    known = (~np.isnan(seasons)).sum(axis=0)
    seasons = np.sort(seasons, axis=0)  # NaN are last
    below, above = (np.take_along_axis(seasons, (known[None] + side) // 2, axis=0)[0] for side in (-1, 0))
    return np.where(known > 0, (below + above) / 2, 0.0)
