"""Find the time step between the rows of a table, and the season length.

A time step may be a calendar step such as a month, a fixed step, a business day, or a fixed step with jitter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.tasks.forecasting import MAX_SEASON
from training.data.tables.timestamps import Reading

Times = np.ndarray  # datetime64[us], sorted, without duplicates
SECOND, DAY = 10**6, 86_400 * 10**6  # microseconds
NAMED_STEPS = {SECOND: "second", 60 * SECOND: "minute", 3600 * SECOND: "hour", DAY: "day", 7 * DAY: "week"}
MONTHS = {1: "month", 2: "2 months", 3: "quarter", 4: "4 months", 6: "half-year", 12: "year"}
SEASONS: dict[str, tuple[int, ...]] = {
    "second": (60,),
    "minute": (60, 1440),
    "hour": (24, 168),
    "day": (7, 365),
    "business day": (5,),
    "week": (52,),
    "2 weeks": (26,),
    "4 weeks": (13,),
    "month": (12,),
    "2 months": (6,),
    "quarter": (4,),
    "4 months": (3,),
    "half-year": (2,),
}
_MINUTE = 60 * SECOND
NICE_STEPS = np.array(  # usual time steps of sensors; their time stamps may have jitter
    [n * SECOND for n in (1, 2, 5, 10, 15, 20, 30)]
    + [n * _MINUTE for n in (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30)]
    + [n * 60 * _MINUTE for n in (1, 2, 3, 4, 6, 8, 12)]
    + [DAY, 7 * DAY]
)
MAX_JITTER = 0.3  # largest deviation of a time difference from a multiple of the step, as a share of the step
MAX_HOLES = 0.4  # largest share of steps without a time stamp; with a larger share, the times are irregular
MAX_HOLES_TO_DECIDE = 0.1  # a stricter limit, for choosing between several readings of the same cells
MIN_AUTOCORRELATION = 0.3  # smallest autocorrelation between values that are one season apart
MIN_AUTOCORRELATION_OF_TWO = 0.5  # the same limit if all series are shorter than three seasons
# Smallest difference between the autocorrelation at one season and its mean at 0.5 and 1.5 seasons. Random walks do
# not reach this difference.
MIN_PROMINENCE = 0.1


@dataclass(frozen=True)
class Grid:
    """The time step that all groups of a table share.

    Attributes:
        name: name of the time step, such as "hour".
        seasons: usual season lengths, in steps; None if the time step has no known length.
        positions: for each group, the step numbers int64 [T] of its sorted, distinct times.
        jitter: whether times were moved to the nearest step.
    """

    name: str
    seasons: tuple[int, ...] | None
    positions: list[np.ndarray]
    jitter: bool = False

    @property
    def holes(self) -> float:
        """The share of steps without a time stamp, between the first and the last time of each group."""
        spans = sum(int(own[-1] - own[0]) + 1 for own in self.positions if len(own))
        return 1 - sum(map(len, self.positions)) / spans if spans else 0.0


def grid(times: Sequence[Times], period: str) -> Grid | None:
    """Return the time step that all groups share; None if the times are irregular.

    ``times``: the sorted, distinct times of each group. ``period``: see ``Reading``.
    """
    steps = [np.diff(own).astype("timedelta64[us]").astype(np.int64) for own in times]
    differences = np.concatenate([np.empty(0, np.int64), *steps])
    if not len(differences):
        return None
    if period == "step":
        return Grid("step", None, [own.astype("datetime64[s]").astype(np.int64) for own in times])
    everything = np.concatenate(times)
    if period == "week":
        weeks = [(own.astype("datetime64[D]").astype(np.int64) + 3) // 7 for own in times]
        return _checked([_whole("week", 7 * DAY, weeks)])
    candidates = [_months(times, period), _fixed(times, differences), _business_days(times, everything)]
    detected = _checked([each for each in candidates if each])
    return detected or (
        _checked([each for each in (_jittered(times, steps, differences),) if each]) if not period else None
    )


def _checked(grids: Sequence[Grid]) -> Grid | None:
    """Return the grid with the smallest share of holes.

    Return None if there are no grids, or if the smallest share is above MAX_HOLES.
    """
    best = min(grids, key=lambda each: each.holes, default=None)
    return best if best is not None and best.holes <= MAX_HOLES else None


def is_regular(reading: Reading) -> bool:
    """Return whether the times of a reading are regular: at least three, without jitter, and with few holes."""
    times = np.unique(reading.times.dropna().to_numpy())
    detected = grid([times], reading.period) if len(times) >= 3 else None
    return detected is not None and not detected.jitter and detected.holes <= MAX_HOLES_TO_DECIDE


def _whole(name: str, step: int, positions: list[np.ndarray]) -> Grid:
    """Return a grid from step numbers.

    If the differences between the step numbers have a common divisor, the step is multiplied by it. For example, the
    step is doubled if there are times at every second step only.
    """
    unit = int(np.gcd.reduce(np.concatenate([np.diff(own) for own in positions]))) or 1
    if unit > 1:
        origin = next(own[0] for own in positions if len(own))
        positions = [(own - origin) // unit for own in positions]
        name = NAMED_STEPS.get(step * unit, f"{unit} {name}s")
    return Grid(name, SEASONS.get(name, ()), positions)


def _months(times: Sequence[Times], period: str) -> Grid | None:
    """Return a grid of months or of multiples such as quarters; None if the times do not fit.

    Times fit if no group has two times in one month. Unless ``period`` is given, all times must also be on the same day
    of the month, within its first seven days, or within its last seven days.
    """
    everything = np.concatenate(times)
    months = [own.astype("datetime64[M]").astype(np.int64) for own in times]
    differences = np.concatenate([np.diff(own) for own in months])
    if (differences == 0).any():
        return None
    days = (everything - everything.astype("datetime64[M]")).astype("timedelta64[D]").astype(int) + 1
    lengths = (
        (everything.astype("datetime64[M]") + 1).astype("datetime64[D]") - everything.astype("datetime64[M]")
    ).astype(int)
    same = len(set(days)) == 1 or (days == lengths).all() or (days <= 7).all() or (lengths - days <= 6).all()
    clipped = days.max() > 28 and (days == np.minimum(days.max(), lengths)).all()  # the 30th, or the end of February
    if not (period or same or clipped):
        return None
    unit = int(np.gcd.reduce(differences))
    unit = unit if unit in MONTHS else 12 if unit % 12 == 0 else 1
    name = MONTHS[unit]
    if unit == 12 and (years := int(np.gcd.reduce(differences)) // 12) > 1:
        unit, name = 12 * years, f"{years} years"
    origin = months[0][0] if len(months[0]) else 0
    return Grid(name, SEASONS.get(name, ()), [(own - origin) // unit for own in months])


def _fixed(times: Sequence[Times], differences: np.ndarray) -> Grid | None:
    """Return a grid with a fixed step, the greatest common divisor of the differences between consecutive times."""
    step = int(np.gcd.reduce(differences))
    origin = min(own[0] for own in times if len(own))
    positions = [(own - origin).astype("timedelta64[us]").astype(np.int64) // step for own in times]
    offsets = {int((own[0] - origin).astype("timedelta64[us]").astype(np.int64)) % step for own in times if len(own)}
    if len(offsets) > 1:  # the groups begin at different times within a step
        positions = [
            (own - own[0]).astype("timedelta64[us]").astype(np.int64) // step if len(own) else own for own in times
        ]
    per_day = DAY // step if step < DAY and DAY % step == 0 else 0
    seasons = SEASONS.get(name := step_name(step), (per_day, 7 * per_day) if per_day else ())
    return Grid(name, seasons, positions)


def step_name(step: int) -> str:
    """Return the name of a step that is given in microseconds."""
    if step in NAMED_STEPS:
        return NAMED_STEPS[step]
    for unit, name in (
        (7 * DAY, "weeks"),
        (DAY, "days"),
        (60 * _MINUTE, "hours"),
        (_MINUTE, "minutes"),
        (SECOND, "seconds"),
    ):
        if step % unit == 0:
            return f"{step // unit} {name}"
    return f"{step / SECOND:g} seconds"


def _business_days(times: Sequence[Times], everything: np.ndarray) -> Grid | None:
    """Return a grid of the days from Monday to Friday; None if the times do not fit.

    Times fit if none is on a weekend, and each group has one time per day, at nearly the same time of day. For example,
    a market may close earlier on some days, and one hour later in UTC during daylight saving time.
    """
    if len(everything) < 5 or not np.is_busday(everything.astype("datetime64[D]")).all():
        return None
    positions = [np.busday_count("1970-01-05", own.astype("datetime64[D]")) for own in times]
    clocks = [(own - own.astype("datetime64[D]")).astype("timedelta64[us]") for own in times if len(own)]
    spread = max(int(np.ptp(own.astype(np.int64))) for own in clocks)
    if spread > MAX_JITTER * DAY or any((np.diff(own) == 0).any() for own in positions):
        return None
    return Grid("business day", SEASONS["business day"], positions, jitter=spread > 0)


def _jittered(times: Sequence[Times], steps: Sequence[np.ndarray], differences: np.ndarray) -> Grid | None:
    """Return a grid with the step in NICE_STEPS that is nearest to the median difference between consecutive times.

    Return None unless all differences are nearly multiples of this step.
    """
    median = float(np.median(differences))
    step = int(NICE_STEPS[np.abs(NICE_STEPS / median - 1).argmin()])
    counts = [np.round(own / step) for own in steps]
    off = np.concatenate([np.abs(own / step - count) for own, count in zip(steps, counts, strict=True)])
    if abs(step / median - 1) > 0.1 or (off > MAX_JITTER).any() or any((count < 1).any() for count in counts):
        return None
    positions = [
        np.concatenate([[0], count.cumsum()]).astype(np.int64) if len(own) else np.empty(0, np.int64)
        for own, count in zip(times, counts, strict=True)
    ]
    per_day = DAY // step if step < DAY else 0
    seasons = SEASONS.get(step_name(step), (per_day, 7 * per_day) if per_day else ())
    return Grid(step_name(step), seasons, positions, jitter=True)


# --- seasons


def autocorrelation(values: np.ndarray, lag: int) -> float:
    """Return the autocorrelation of linearly detrended values [T] at a lag; 0 for constant values."""
    values = values / (np.abs(values).max() or 1.0)  # squares of very large or small values leave the range of float64
    steps = np.arange(len(values))
    residual = values - np.polyval(np.polyfit(steps, values, 1), steps)
    variance = float((residual**2).mean())
    if variance <= 1e-12 * float((values**2).mean()):
        return 0.0
    return float((residual[lag:] * residual[:-lag]).mean()) / variance


def season(series: Sequence[np.ndarray], usual: Sequence[int] | None) -> int:
    """Return the season length of the series in steps; 1 if they have no season.

    Candidates are the ``usual`` seasons of the time step or, if ``usual`` is None, all lags, up to MAX_SEASON. A
    candidate is dropped if its autocorrelation, averaged over the first 50 series, is too low. Of the other candidates,
    only those with more than 90 % of the highest autocorrelation are kept. The result is the shortest candidate that is
    kept.
    """
    candidates = [lag for lag in (range(2, 401) if usual is None else usual) if lag <= MAX_SEASON]
    known_values = [values[~np.isnan(values)] for values in series[:50]]

    def strength(lag: int, candidate: int) -> float:
        correlations = [autocorrelation(values, lag) for values in known_values if len(values) >= 2 * candidate]
        return float(np.mean(correlations)) if correlations else -1.0

    strengths = {lag: strength(lag, lag) for lag in candidates}
    if usual is not None:
        off_season = {lag: [strength(lag + sign * (lag // 2), lag) for sign in (-1, 1)] for lag in candidates}
        strengths = {
            lag: value for lag, value in strengths.items() if value > np.mean(off_season[lag]) + MIN_PROMINENCE
        }
    else:  # only local maxima, because slow changes correlate at every short lag
        strengths = {
            lag: value
            for lag, value in strengths.items()
            if value > strengths.get(lag - 1, 1.0) and value >= strengths.get(lag + 1, -1.0)
        }
    longest = max(map(len, known_values), default=0)
    strengths = {
        lag: value
        for lag, value in strengths.items()
        if value > (MIN_AUTOCORRELATION if longest >= 3 * lag else MIN_AUTOCORRELATION_OF_TWO)
    }
    best = max(strengths.values(), default=0.0)
    if not strengths:
        return 1
    return min(lag for lag, value in strengths.items() if value > 0.9 * best)  # multiples of a season correlate too
