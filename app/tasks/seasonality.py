"""Series as they come from callers: which season they have, and what may stand where a value is missing."""

from __future__ import annotations

import numpy as np

SEASONS = (4, 7, 12, 24, 52, 168)  # quarters, days of a week, months, hours of a day, weeks, hours of a week
MAX_VALUES = 1344  # values: eight weeks of hours
NEARLY = 0.7  # of the strongest season: a part of it that is so strong is taken, for multiples are strong as well
SAME, STRAIGHT = 1e-13, 1e-9  # of its largest value, of its spread: so much is rounding alone
LIMIT = 1.645  # standard deviations: one-sided, 95 % sure, as in the M4 competition
LONGEST = 168  # values of a season that is looked for
OTHER_LEAST, OTHER_OUT = 0.5, 0.25  # autocorrelation of a season that is none of the usual ones, and what it stands out
# by: of so many, one or another is strong by chance


def detect_season(values: np.ndarray) -> int:
    """The number of values [T] after which a series repeats itself, or 1.

    A season must pass M4's test of its autocorrelation, and the autocorrelation half a season before and after must
    be clearly lower: slow waves and random walks resemble themselves at every short distance. The usual seasons are
    looked at first; any other must be a peak of the autocorrelation and stronger: else its neighbour among the usual
    ones would be found in its place.
    """
    recent = values[-MAX_VALUES:]
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
    strong |= {season: _strength(correlation, season, usual=False) for season in _peaks(correlation)}
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


def _peaks(correlation: np.ndarray) -> list[int]:
    """Distances at which the autocorrelation is largest around, at least three of which a series holds, and that none
    of the usual seasons stands for.
    """
    count = len(correlation)
    pairs = correlation * count / (count - np.arange(count))
    most = min(LONGEST, (count - 1) // 3)
    found = [m for m in range(2, most + 1) if pairs[m - 1] < pairs[m] >= pairs[m + 1]]
    return [m for m in found if all(abs(m - season) > season // 24 for season in SEASONS)]


def _strength(correlation: np.ndarray, season: int, usual: bool = True) -> float:
    """The autocorrelation at a season; 0 where it is not significant, or stands out too little."""
    count = len(correlation)
    before = np.square(correlation[1:season]).sum()
    if correlation[season] < LIMIT * np.sqrt((1 + 2 * before) / count):
        return 0.0
    places = np.arange(count)
    pairs = correlation * count / (count - places)
    early, late = np.interp([season / 2, min(1.5 * season, count - 1)], places, pairs)
    stands_out = pairs[season] - (early + late) / 2
    least = max(0.1 if usual else OTHER_OUT, 2 / np.sqrt(count - season))
    if stands_out <= least or (not usual and pairs[season] < OTHER_LEAST):
        return 0.0
    return float(pairs[season])


def fill_missing(values: np.ndarray, season: int) -> np.ndarray:
    """values [T] with NaN where one is missing -> the same without gaps.

    They are on the line between their neighbours, and with a season as far above or below it as is usual at their
    place in the season.
    """
    known = np.flatnonzero(~np.isnan(values))
    places = np.arange(len(values))
    line = np.interp(places, known, values[known])
    if season == 1 or len(known) == len(values):
        return line
    smooth = _smooth(line, season)
    above = np.where(np.isnan(values), np.nan, values - smooth)
    usual = seasonal_medians(above, season)[places % season]
    return np.where(np.isnan(values), np.interp(places, known, values[known] - usual[known]) + usual, values)


def _smooth(x: np.ndarray, season: int) -> np.ndarray:
    """The mean of one season around each value; at the ends, of what there is of it."""
    sums = np.concatenate([[0.0], x.cumsum()])
    places = np.arange(len(x))
    begin, end = (places - season // 2).clip(0), (places - season // 2 + season).clip(max=len(x))
    return (sums[end] - sums[begin]) / (end - begin)


def seasonal_medians(x: np.ndarray, season: int) -> np.ndarray:
    """x [T] with NaN where it is unknown -> the median of what is known at each place of the season, [season]; 0 where
    nothing is.
    """
    turns = np.pad(x, (0, -len(x) % season), constant_values=np.nan).reshape(-1, season)
    known = (~np.isnan(turns)).sum(axis=0)
    turns = np.sort(turns, axis=0)  # NaN last
    below, above = (np.take_along_axis(turns, (known[None] + side) // 2, axis=0)[0] for side in (-1, 0))
    return np.where(known > 0, (below + above) / 2, 0.0)
