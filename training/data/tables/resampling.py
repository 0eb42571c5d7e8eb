"""Put rows into longer time steps, and combine the rows of a time step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from training.data.tables import frequency
from training.data.tables.frequency import DAY
from training.data.tables.header import Body

CALENDAR = {"W": "week", "M": "month", "ME": "month", "MS": "month", "Q": "quarter", "QE": "quarter", "QS": "quarter"}
CALENDAR |= {"Y": "year", "YE": "year", "YS": "year", "A": "year"}
CODES = {"week": "W-SUN", "month": "M", "quarter": "Q", "year": "Y"}  # the periods of pandas
# A time step is incomplete if its part before the first or after the last row is longer than in the median of the other
# time steps, by more than this share of the longest time between two rows. In a regular table that lacks one row, the
# difference is about one such time, but some months and quarters are shorter than others.
MAX_EMPTY_PART = 0.75
MAX_HOLES = 2  # number of the longest times between rows, at most 5 %, that do not count, because they may be holes


def resample(body: Body, step: str, times: pd.Series) -> tuple[pd.Series, str]:
    """Return the start of the time step that contains each time, and the period of the steps as in ``Reading``.

    ``step``: D, h, 15min, W (from Monday), M, Q, Y, or another pandas offset of fixed length.

    Raises:
        DataError: pandas does not know the step, or the step is not positive.
    """
    if period := CALENDAR.get(step.upper()):
        return times.dt.to_period(CODES[period]).dt.start_time.astype("datetime64[us]"), period
    try:
        if pd.Timestamp(0) + to_offset(_offset(step)) <= pd.Timestamp(0):
            raise ValueError("a time step must be longer than 0")
        return times.dt.floor(_offset(step)), ""
    except ValueError as error:
        raise body.error(f"--resample {step}: {error}; allowed are h, D, W, M, Q, Y and 15min") from error


def _offset(step: str) -> str:
    return step if step.endswith("D") else step.lower()


def _ends(starts: pd.DatetimeIndex, step: str) -> pd.DatetimeIndex:
    if period := CALENDAR.get(step.upper()):
        return (starts.to_period(CODES[period]) + 1).start_time
    return starts + to_offset(_offset(step))


def _without_weekends(times: pd.Series | pd.DatetimeIndex) -> np.ndarray:
    """Return the microseconds int64 [T] of the days from Monday to Friday before each time, since 1600."""
    stamps = times.to_numpy().astype("datetime64[us]")
    days = stamps.astype("datetime64[D]")
    return np.busday_count("1600-01-01", days) * DAY + np.where(np.is_busday(days), (stamps - days).astype(np.int64), 0)


def _microseconds(times: pd.Series | pd.DatetimeIndex) -> np.ndarray:
    return times.to_numpy().astype("datetime64[us]").astype(np.int64)


def _is_longer(part: int, others: np.ndarray, gap: int) -> bool:
    """Return whether the empty part of a time step is longer than those of ``others`` by too large a share of ``gap``.

    If there are no other time steps, they are assumed to be just long enough that one missing row is noticed.
    """
    usual = float(np.median(others)) if len(others) else MAX_EMPTY_PART * gap
    return part > usual + MAX_EMPTY_PART * gap


def without_incomplete(
    body: Body, step: str, times: pd.Series, starts: pd.Series, values: dict[str, pd.Series]
) -> dict[str, pd.Series]:
    """Return the values; NaN in the first and the last time step if the rows cover only a part of it. Add remarks.

    Otherwise the sum of such a step would be too small. ``times``: the time of each row. ``starts``: the start of its
    time step.

    Raises:
        DataError: no time step is complete.
    """
    there = pd.DataFrame(values).notna().any(axis=1)
    rows = pd.DataFrame({"start": starts[there], "time": times[there]})
    weekend = (rows["time"].dt.day_of_week >= 5).any()
    position = _microseconds if weekend else _without_weekends  # a month may begin or end with a weekend without rows
    gaps = np.sort(np.diff(np.unique(position(rows["time"]))))
    if not len(gaps):
        return values
    gap = gaps[-1 - min(MAX_HOLES, len(gaps) // 20)]
    grouped = rows.groupby("start")["time"]
    begins, ends = grouped.min(), grouped.max()
    steps = pd.DatetimeIndex(begins.index)
    before = position(begins) - position(steps)
    after = position(_ends(steps, step)) - position(ends)
    first, last, begin, end = steps[0], steps[-1], begins.iloc[0], ends.iloc[-1]
    incomplete = {}
    if _is_longer(before[0], before[1:], gap):
        incomplete[first] = f"the first time step, {first}, is left out: its rows begin at {begin}"
    if _is_longer(after[-1], after[:-1], gap):
        incomplete[last] = f"the last time step, {last}, is left out: its rows end at {end}"
    if not set(starts[there]) - set(incomplete):
        raise body.error(f"--resample {step}: the rows from {begin} to {end} cover no whole time step")
    body.remarks += [f"{remark}, so their sum would be too small" for remark in incomplete.values()]
    return {name: own.mask(starts.isin(list(incomplete))) for name, own in values.items()}


def combine(
    body: Body, frame: pd.DataFrame, aggregate: str | None, covariates: Sequence[str], resampled: bool
) -> tuple[pd.DataFrame, bool]:
    """Combine rows of a series that have the same time, by the method of ``--aggregate``. Covariates are averaged.

    Return the rows, and whether any rows were combined.

    Raises:
        DataError: a series has two rows with the same time, but ``--aggregate`` is not given.
    """
    keys = ["(series)", "(time)"]
    double = frame.duplicated(keys)
    if double.any() and aggregate is None:
        stamp, label = frame["(time)"][double].iloc[0], frame["(series)"][double].iloc[0]
        same = frame.index[(frame["(time)"] == stamp) & (frame["(series)"] == label)]
        relation = "are in the same time step" if resampled else f"have the same time stamp {stamp}"
        raise body.error(
            f"rows {same[0]} and {same[1]} {relation}; use --aggregate sum, mean or last to combine such rows"
        )
    if double.any():
        grouped = frame.groupby(keys, sort=True)
        rows = {
            "sum": lambda: grouped.sum(min_count=1),
            "mean": lambda: grouped.mean(),
            "last": lambda: grouped.last(),
        }[aggregate or "last"]()
        body.remarks.append(f"{int(double.sum())} rows are combined with others (--aggregate {aggregate})")
        if covariates:
            rows[list(covariates)] = grouped[list(covariates)].mean()
        frame = rows.reset_index()
    return frame, bool(double.any())


def irregular(times: pd.Series, step: str | None, few: bool) -> str:
    """Return the message for ``times`` that are on no grid of time steps, or too ``few``. ``step``: --resample."""
    if step and few:
        return f"with --resample {step}, no series has two time steps; use a shorter step"
    if step:
        holes = f"more than {100 * frequency.MAX_HOLES:.0f} % of the time steps have no row"
        return f"with --resample {step}, {holes}; use a longer step, for example the next one of h, D, W, M, Q and Y"
    problem = "no series has two time stamps" if few else "the time stamps are irregular"
    return (
        f"{problem}, for example {', '.join(map(str, times[:4]))}; use --resample D (or h, 15min, W, M) and "
        "--aggregate sum, mean or last"
    )


def spread(values: np.ndarray, at: np.ndarray, fill: float) -> np.ndarray:
    """Put the values of rows at their positions ``at`` in a grid of time steps.

    Steps without a row are ``fill`` between the first and the last value, which is not NaN. Other steps are NaN.
    """
    grid = np.full(int(at[-1]) + 1, np.nan)
    there = at[~np.isnan(values)]
    if len(there):
        grid[there[0] : there[-1]] = fill
    grid[at] = values
    return grid
