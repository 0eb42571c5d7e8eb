"""Known covariates: columns such as price, promotion and holidays, whose future values the client knows.

A linear regression estimates the effect of the covariates on a series. This effect is subtracted from the series before
the network reads the series, and is added to the forecast afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from app.errors import BadValue, quote_value
from app.store import HolidayCalendar, KnownCovariates

PRIOR_VALUES = 10  # weight of the coefficients found in training: they count as much as this many values of a series
PROFILE_SEASONS = 8  # number of seasons that are averaged to get the usual values of a season
MAX_DEVIATION = 100.0  # standard deviations of a covariate; larger deviations are clipped
UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}  # seconds
BUSINESS_DAY = "business day"
Array = np.ndarray


def differences(
    values: Array, inputs: Array, season: int, known: KnownCovariates, observed: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return three arrays for the regression of ``values`` [T] on ``inputs`` [T + ahead, K].

    The first array [T + ahead, K] contains the regressors. The second array [T - season, K] contains the changes of the
    regressors from one season to the next. The third array [T - season] contains the changes of the values. The values
    are first divided by their mean absolute value. If ``observed`` [T] is False for a value, the value was missing and
    has been filled. Changes from or to such values are left out, because they do not show the effect of the covariates.

    A regressor is a standardised covariate. If ``known.proportional`` is true, the covariate is multiplied by the usual
    absolute value of the series at the same position in the season.
    """
    count = len(values)
    season = season if season < count else 1  # otherwise no two values are one season apart
    largest = np.abs(values).max() or 1.0  # scale first, so that no sum overflows
    relative = values / largest
    unit = np.abs(relative).mean() or 1.0
    relative = relative / unit
    columns = known.columns
    with np.errstate(over="ignore"):
        deviations = (inputs - [column.mean for column in columns]) / [column.scale for column in columns]
    effects = deviations.clip(-MAX_DEVIATION, MAX_DEVIATION)
    if known.proportional:
        seasons = max(1, min(PROFILE_SEASONS, count // season))
        usual = np.abs(relative[count - seasons * season :]).reshape(seasons, season).mean(0)
        effects = effects * usual[(np.arange(len(inputs)) - count) % season][:, None]
    inputs_change, change = effects[season:count] - effects[: count - season], relative[season:] - relative[:-season]
    if observed is not None and not observed.all():
        both_observed = observed[season:] & observed[:-season]
        inputs_change, change = inputs_change[both_observed], change[both_observed]
    return effects, inputs_change, change


def covariate_effect(
    values: Array, inputs: Array, season: int, known: KnownCovariates, observed: Array | None = None
) -> Array:
    """Return the effect [T + ahead] of covariates [T + ahead, K] on values [T] and on the ``ahead`` steps after them.

    The coefficients are fitted to the values by ridge regression, which pulls them towards the coefficients found in
    training with the weight PRIOR_VALUES. A covariate that is constant within the values keeps its coefficient from
    training, so it still has an effect. Values for which ``observed`` [T] is False do not influence the coefficients.
    """
    effects, inputs_change, change = differences(values, inputs, season, known, observed)
    prior = np.array([column.coefficient for column in known.columns])
    precision = inputs_change.T @ inputs_change + PRIOR_VALUES * np.eye(len(prior))
    coefficients = prior + np.linalg.solve(precision, inputs_change.T @ (change - inputs_change @ prior))
    largest = np.abs(values).max() or 1.0
    unit = np.abs(values / largest).mean() * largest
    result: Array = effects @ coefficients * unit
    return result


def step_seconds(step: str) -> int | None:
    """Return the seconds in a time step such as ``hour`` or ``15 minutes``, or None for business days and months."""
    *number, unit = step.split(" ")
    seconds = UNITS.get(unit.removesuffix("s"))
    if seconds is None or not all(part.isdigit() for part in number):
        return None
    return int(number[0]) * seconds if number else seconds


def holiday_counts(calendar: HolidayCalendar, start: datetime, count: int, param: str = "start") -> Array:
    """Return the number of holidays in each of ``count`` time steps from ``start``.

    If the steps are shorter than a day, the number is 1 for each step on a holiday.

    Raises:
        BadValue: a step is outside the years of the calendar.
    """
    seconds = step_seconds(calendar.step)
    if seconds is None:
        first = np.datetime64(start.date())
        days, span = np.busday_offset(first, np.arange(count), roll="forward"), 1
    else:
        begin = np.datetime64(start.replace(tzinfo=None), "s")
        days = (begin + np.arange(count) * np.timedelta64(seconds, "s")).astype("datetime64[D]")
        span = max(1, seconds // UNITS["day"])
    ends = np.array([days[0], days[-1] + (span - 1)])
    years = (ends.astype("datetime64[Y]").astype(int) + 1970).tolist()
    if years[0] < calendar.first_year or years[1] > calendar.last_year:
        raise BadValue(
            f"{param}: the series and its forecast are from {years[0]} to {years[1]}; the holidays of the model are "
            f"known from {calendar.first_year} to {calendar.last_year}",
            param,
        )
    dates = np.array(calendar.dates, dtype="datetime64[D]")
    result: Array = sum((np.isin(days + offset, dates).astype(np.float64) for offset in range(span)), np.zeros(count))
    return result


def parse_time(text: str, param: str, step: str) -> datetime:
    """Parse a time in ISO 8601. Raises BadValue.

    A time with an offset is converted to UTC. But if time steps last at least a day, the offset of a midnight is
    ignored, as in training. The midnight's date in UTC could be the day before.
    """
    try:
        time = datetime.fromisoformat(text)
        local, seconds = time.replace(tzinfo=None), step_seconds(step)
        if (seconds is None or seconds >= UNITS["day"]) and not any(local.timetuple()[3:6]):
            return local
        return time.astimezone(UTC) if time.tzinfo else time
    except (ValueError, OverflowError):
        problem = f"{param} is {quote_value(text)}; it should be a time in ISO 8601, such as 2024-01-31"
        raise BadValue(problem, param) from None


def read_covariates(
    name: str,
    known: KnownCovariates | None,
    covariates: Mapping[str, Any] | None,
    start: str | Sequence[str] | None,
    lengths: Sequence[int],
    horizon: int,
    many: bool,
    start_param: str = "start.{}",
) -> list[Array] | None:
    """Return the covariates [T + horizon, K] of each series in a request, or None if the model takes no covariates.

    Args:
        name: name of the model in error messages.
        known: the covariates that the model needs, or None if it takes no covariates.
        covariates: for each column, a list of values or, if ``many``, a list of such lists, one for each series.
        start: time of the first value of all series, or a list with one such time for each series.
        lengths: number of values of each series.
        horizon: steps to forecast.
        many: whether the request has a list of series.
        start_param: pattern for the name of a time in a list, in error messages, with {} in place of its index.

    Raises:
        BadValue: a column is missing, unknown or of the wrong length, or the start is missing or wrong.
    """
    if known is None:
        for param, sent in (("covariates", covariates), ("start", start)):
            if sent is not None:
                raise BadValue(f"{param}: {name} takes none; leave it out", param)
        return None
    names = known.named
    sent_columns = covariates or {}
    needs = f"{name} needs {', '.join(names)}" if names else f"{name} needs none, only the start of the series"
    for column in names:
        if column not in sent_columns:
            raise BadValue(f"covariates has no {quote_value(column)}; {needs}", "covariates")
    for column in sent_columns:
        if column not in names:
            raise BadValue(f"covariates has {quote_value(column)}; {needs}", "covariates")
    result = [np.empty((length + horizon, len(known.columns))) for length in lengths]
    for index, column in enumerate(names):
        sent = sent_columns[column]
        rows = sent if many else [sent]
        if many != (bool(sent) and isinstance(sent[0], list)) or len(rows) != len(lengths):
            shape = f"a list of {len(lengths)} lists, one for each series" if many else "a list of numbers"
            raise BadValue(f"covariates.{column} should be {shape}, like values", f"covariates.{column}")
        for number, row in enumerate(rows):
            param = f"covariates.{column}.{number}" if many else f"covariates.{column}"
            if len(row) != len(result[number]):
                raise BadValue(
                    f"{param} has {len(row)} values; it should have {len(result[number])}: {lengths[number]} for the "
                    f"series and {horizon} for the horizon",
                    param,
                )
            result[number][:, index] = row
    _add_holidays(name, known.calendar, start, result, start_param)
    return result


def _add_holidays(
    name: str,
    calendar: HolidayCalendar | None,
    start: str | Sequence[str] | None,
    result: list[Array],
    start_param: str,
) -> None:
    """Write the holiday counts into the last column of each array. Raises BadValue for a missing or wrong start."""
    if calendar is None:
        if start is not None:
            raise BadValue(f"start: {name} uses no holidays; leave it out", "start")
        return
    if start is None:
        raise BadValue(f"start is missing; {name} needs the time of the first value, to know the holidays", "start")
    starts = [start] * len(result) if isinstance(start, str) else list(start)
    if len(starts) != len(result):
        raise BadValue(f"start has {len(starts)} times; it should have one, or {len(result)}, one per series", "start")
    for index, (text, array) in enumerate(zip(starts, result, strict=True)):
        param = "start" if isinstance(start, str) else start_param.format(index)
        array[:, -1] = holiday_counts(calendar, parse_time(text, param, calendar.step), len(array), param)
