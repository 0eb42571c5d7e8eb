"""Series as they come from callers: which season they have, and what may stand where a value is missing."""

from __future__ import annotations

import numpy as np

SEASONS = (4, 7, 12, 24, 52, 168)  # quarters, days of a week, months, hours of a day, weeks, hours of a week
LOOKED_AT = 1344  # values: eight weeks of hours
NEARLY = 0.7  # of the strongest season: a part of it that is so strong is taken, for multiples are strong as well
SAME, STRAIGHT = 1e-13, 1e-9  # of its largest value, of its spread: so much is rounding alone
LIMIT = 1.645  # standard deviations: one-sided, 95 % sure, as in the M4 competition


def season_of(values: np.ndarray) -> int:
    """The number of values [T] after which a series repeats itself, or 1.

    A season must pass M4's test of its autocorrelation, and the autocorrelation half a season before and after must
    be clearly lower: slow waves and random walks resemble themselves at every short distance.
    """
    recent = values[-LOOKED_AT:]
    count = len(recent)
    largest = np.abs(recent).max() or 1.0  # so that no square overflows or vanishes
    recent = recent / largest - (recent / largest).mean()
    spread = np.abs(recent).max()
    if spread < SAME:
        return 1
    time = np.arange(count) - (count - 1) / 2
    recent = recent / spread
    recent = recent - time * (time @ recent / (time @ time))
    if np.abs(recent).max() < STRAIGHT:
        return 1
    correlation = _autocorrelation(recent)
    strong = {season: _strength(correlation, season) for season in SEASONS if 2 * season < count}
    best = max(strong, key=strong.__getitem__, default=1)
    if not strong.get(best):
        return 1
    while parts := [m for m in strong if m < best and best % m == 0 and strong[m] >= NEARLY * strong[best]]:
        best = max(parts, key=strong.__getitem__)
    return best


def _autocorrelation(x: np.ndarray) -> np.ndarray:
    """Of x [T] with mean 0 at every distance, as if each had as many pairs."""
    count = len(x)
    spectrum = np.fft.rfft(x, 2 * count)
    found = np.fft.irfft(spectrum * spectrum.conj())[:count]
    return found / found[0]


def _strength(correlation: np.ndarray, season: int) -> float:
    """The autocorrelation at a season; 0 where it is not significant, or stands out too little."""
    count = len(correlation)
    before = np.square(correlation[1:season]).sum()
    if correlation[season] < LIMIT * np.sqrt((1 + 2 * before) / count):
        return 0.0
    places = np.arange(count)
    pairs = correlation * count / (count - places)
    early, late = np.interp([season / 2, min(1.5 * season, count - 1)], places, pairs)
    stands_out = pairs[season] - (early + late) / 2
    return float(pairs[season]) if stands_out > max(0.1, 2 / np.sqrt(count - season)) else 0.0


def filled(values: np.ndarray, season: int) -> np.ndarray:
    """values [T] with NaN where one is missing -> the same without gaps.

    They are on the line between their neighbours, and with a season as far above or below it as is usual at their
    place in the season.
    """
    known = np.flatnonzero(~np.isnan(values))
    places = np.arange(len(values))
    line = np.interp(places, known, values[known])
    if season == 1 or len(known) == len(values):
        return line
    smooth = _smoothed(line, season)
    above = np.where(np.isnan(values), np.nan, values - smooth)
    usual = np.array([_median(above[phase::season]) for phase in range(season)])[places % season]
    return np.where(np.isnan(values), np.interp(places, known, values[known] - usual[known]) + usual, values)


def _smoothed(x: np.ndarray, season: int) -> np.ndarray:
    """The mean of one season around each value; at the ends, of what there is of it."""
    sums = np.concatenate([[0.0], x.cumsum()])
    places = np.arange(len(x))
    begin, end = (places - season // 2).clip(0), (places - season // 2 + season).clip(max=len(x))
    return (sums[end] - sums[begin]) / (end - begin)


def _median(x: np.ndarray) -> float:
    known = x[~np.isnan(x)]
    return float(np.median(known)) if len(known) else 0.0
