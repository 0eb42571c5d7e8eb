"""Find the columns of time stamps, the columns of values, and the columns that name the series of each row."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from app.tables import TableError, grid, numbers, times
from app.tables.header import Body, as_texts, role
from app.tables.times import Reading

INDEX_NAME = re.compile(r"|index|id|no\.?|nr\.?|#|obs|observation|rownames|unnamed: 0(\.\d+)?", re.IGNORECASE)
# Names of columns of numbers that may be codes or parts of the date, not values.
CODE_NAME = re.compile(
    r"(?i:(.*[ _.-])?(ids?|no|nr|num|number|codes?|key|uuid|sku|zip|zipcode|plz|postcode|phone|ean|isbn|barcode|lat|"
    r"long?|latitude|longitude)|invoice|receipt|ticket|transaction|account|customer|rechnung|beleg|kunde)|[A-Za-z]+(Id|ID|No|Nr|Code|Key)"
)
DATE_NAME = re.compile(r"week|month|day|dow|hour|year|quarter|date|mnth|yr|hr|decimal", re.IGNORECASE)
MIN_FILL = 0.5  # in the median series, at least this share of the time stamps has a row
MAX_TEXT_SHARE = 0.1  # largest share of cells in a column of numbers that are not numbers


@dataclass(frozen=True)
class TimeColumn:
    """The columns with the time stamps. ``reading`` holds the time of each row; NaT for rows without a time."""

    names: list[str]
    reading: Reading


def find_times(body: Body, time: str | None, pattern: str | None, taken: Sequence[str]) -> TimeColumn | None:
    """Find the time stamps of a table; return None if it has none.

    ``time``, ``pattern``: values of --time and --format. ``taken``: columns that do not hold time stamps.

    Raises:
        TableError: several columns or several formats are possible, or time stamps cannot be read.
    """
    names = list(body.frame.columns)
    if time is not None and time not in names:
        return None if time.lower() == "none" else read_times(body, [name.strip() for name in time.split(",")], pattern)
    candidates = [name for name in names if name not in taken]
    strong = [time] if time else [name for name in candidates if holds_times(body, name)]
    if len(strong) > 1:
        raise TableError(
            f"several columns hold time stamps; choose one: {' or '.join(f'--time {name!r}' for name in strong)}"
        )
    texts = [name for name in candidates if body.column(name).share <= 0.5 and len(body.column(name).others) > 1]
    if strong or pattern is not None:
        date = read_times(body, strong or (texts or candidates)[:1], pattern)
        clocks = [name for name in texts if times.times_of_day(body.texts(name)).notna().mean() > 0.8]
        if time or not clocks or date.reading.period or not date.reading.times.duplicated().any():
            return date
        return read_times(body, [*strong, clocks[0]], pattern)
    numeric = [name for name in candidates if body.column(name).share > 0.8]
    if len(numeric) + len(taken) > 1:  # the only column of numbers must hold the values
        for name in numeric:
            values, own = body.column(name).values, role(name)
            readings = times.numeric_readings(values)
            if own not in ("", "minute", "second"):
                if readings or times.readings(body.texts(name), own == "week") or _counter(values):
                    return read_times(body, [name], None)
                if own not in ("day", "hour", "clock"):
                    raise _unreadable(body, [name])
            if not INDEX_NAME.fullmatch(name) and any(map(grid.is_regular, readings)):
                options = f"--time {name!r}, or --time none to read it as values"
                raise TableError(f"column {name!r} may hold time stamps ({readings[0].label}) or values; use {options}")
    if texts:
        raise _unreadable(body, texts[:1])
    return None


def holds_times(body: Body, name: str) -> bool:
    """Return whether the cells of a column are time stamps, but not plain numbers."""
    return body.column(name).share <= 0.8 and bool(times.readings(body.texts(name), role(name) == "week"))


def read_times(body: Body, names: list[str], pattern: str | None) -> TimeColumn:
    """Read the time stamps of the columns ``names``. Raises TableError if they cannot be read or are ambiguous."""
    if wrong := [name for name in names if name not in body.frame]:
        raise TableError(f"there is no column {wrong[0]!r}; its columns are: {', '.join(body.frame.columns)}")
    column = body.column(names[0])
    cells = body.texts(names[0])
    for name in names[1:]:
        cells = cells + " " + body.texts(name)
    label, example = ", ".join(map(repr, names)), next(iter(cells.dropna()), "")
    readings: list[Reading] = []
    if pattern is not None:
        try:
            readings = [times.with_format(cells, pattern)]
        except (ValueError, re.error) as error:
            raise TableError(f"--format {pattern}: {error}") from error
        if readings[0].times.notna().sum() < 0.8 * cells.notna().sum() or not re.search("%[YyG]", pattern):
            raise TableError(f"--format {pattern} does not fit the cells of {label}, for example {example!r}")
    elif len(names) == 1 and column.share > 0.8 and role(names[0]) != "week":
        readings = times.numeric_readings(column.values)
    readings = readings or times.readings(cells, role(names[0]) == "week") or _counter(column.values)
    if not readings:
        raise _unreadable(body, names)
    if len(readings) > 1:
        readings = [own for own in readings if grid.is_regular(own)] or readings
    if len(readings) > 1:
        separator = next(iter(re.findall(r"[-/. ]", example)), "/")
        formats = [re.sub(r"[-/ ]", separator, own.label) for own in readings if "%" in own.label]
        options = " or ".join(f"--format {shlex.quote(own)}" for own in formats)
        raise TableError(
            f"column {label}: the time stamp {example!r} is ambiguous: {', '.join(own.label for own in readings)}; "
            f"choose {options or 'another column with --time, or --time none'}"
        )
    return TimeColumn(names, readings[0])


def _unreadable(body: Body, names: list[str]) -> TableError:
    example = next(iter(as_texts(body.frame[names[0]]).dropna()), "")
    return TableError(
        f"column {', '.join(map(repr, names))} holds no time stamps that can be read, for example {example!r}; give "
        "their format, for example --format %d.%m.%Y, or --time Year,Month --format '%Y %m' for two columns; or "
        "use --time "
        "none if there are none and the rows are in the order of time; or --by-rows if each row is a series"
    )


def _counter(values: pd.Series) -> list[Reading]:
    """Return the reading of a column that counts steps, such as 1, 2, 3 ...; [] for other columns.

    Step n becomes the time n seconds after the start of 1970.
    """
    unique = np.unique(values)
    if len(unique) < 3 or not abs(unique[0]) <= 1e5 or unique[0] % 1 or not (np.diff(unique) == 1).all():
        return []
    return [Reading("steps", "step", pd.to_datetime(values, unit="s").astype("datetime64[us]"))]


def value_columns(body: Body, used: Sequence[str], is_timed: bool) -> list[str]:
    """Return the names of the columns of values: all columns of numbers, except a first column of row numbers.

    ``used``: columns that hold time stamps, groups or known values. ``is_timed``: whether there are time stamps.

    Raises:
        TableError: a column may hold codes or parts of the date, mixes numbers and texts, or no column has numbers.
    """
    selected: list[str] = []
    suspect: list[str] = []
    texts = []
    for name in (name for name in body.frame.columns if name not in used and not body.column(name).missing.all()):
        column = body.column(name)
        if numbers_rows(body, name):
            body.remarks.append(f"column {name!r} only numbers the rows, so it is left out; --column {name!r} reads it")
        elif column.share >= 1 - MAX_TEXT_SHARE:
            is_code = CODE_NAME.fullmatch(name) or body.texts(name).str.fullmatch(r"0\d+").any()
            is_part = is_timed and (role(name) or DATE_NAME.search(name))
            (suspect if is_code or is_part else selected).append(name)
        elif column.unit:
            raise TableError(
                f"column {name!r} has numbers with {column.unit!r}; use --unit {shlex.quote(column.unit)} to "
                f"leave it out "
                "(a factor such as K is not applied), or name the columns to read with --column"
            )
        elif column.share > 0.3:
            at = int(np.argmax(body.texts(name).isin(column.others)))
            raise TableError(
                f"column {name!r} has numbers and other cells, for example {column.cells[at]!r} in row "
                f"{body.rows[at]}; "
                "use --missing with such cells, or name the columns to read with --column"
            )
        else:
            texts.append(name)
    if suspect:
        raise TableError(
            f"column {suspect[0]!r} may hold values, codes or a part of the date; name the columns to read with "
            f"--column {shlex.join(selected or suspect)}, or all columns of the time, such as --time Year,Month "
            f"--format '%Y %m'"
        )
    if not selected:
        raise TableError(f"has no column of numbers; its columns are: {', '.join(body.frame.columns)}")
    if texts:
        body.remarks.append(f"columns of text: {', '.join(map(repr, texts))}")
    return selected


def numbers_rows(body: Body, name: str) -> bool:
    """Return whether a column only numbers the rows, judged by its name and its values: it counts, or is the first
    column and its integers ascend, as in the index of a filtered DataFrame."""
    values = body.column(name).values
    if not INDEX_NAME.fullmatch(name) or values.isna().any() or len(values) < 2:
        return False
    ascends = body.frame.columns[0] == name and (values % 1 == 0).all() and (values.diff().iloc[1:] > 0).all()
    return bool(ascends or (np.diff(np.sort(values)) == 1).all())


def parse_values(body: Body, names: Sequence[str], decimal: str | None, missing: Sequence[str]) -> dict[str, pd.Series]:
    """Return the values of the columns ``names``. Missing values are NaN.

    ``missing``: further cells that stand for a missing value. If "none" is one of them, every other number is a value.

    Raises:
        TableError: a cell is not a number, the decimal separator is ambiguous, or a value such as -999 may stand for a
            missing value.
    """
    result = {}
    texts = {name: body.column(name).texts() for name in names}
    evidence = numbers.decimal_evidence([own for column in texts.values() for own in column])
    for name in names:
        sign = decimal or numbers.decimal_sign(name, texts[name], body.separator, evidence)
        result[name] = numbers.parse(name, body.column(name), sign, missing, body.rows, body.remarks)
        if any("," in own.digits or (sign == "," and "." in own.digits) for own in texts[name]):
            body.remarks.append(f"{name}: the decimal separator is {sign!r}")
    return result


def group_columns(
    body: Body, used: Sequence[str], values: Sequence[str], time: TimeColumn, optional: bool = False
) -> list[str]:
    """Return the columns of words that name the series of each row, so that no series has the same time stamp twice.

    Return [] if no time stamp occurs twice. If ``optional`` is true, also return [] if no columns separate the rows
    with the same time stamp.

    Raises:
        TableError: no columns, or several columns, separate the rows with the same time stamp; or a column may hold
            the names of several series whose rows alternate.
    """
    stamps = time.reading.times
    words = [
        name for name in body.frame.columns
        if name not in (*used, *values) and body.texts(name).str.contains(r"[^\W\d_]").all()
    ]  # fmt: skip
    codes = {name: pd.Series(pd.factorize(body.frame[name])[0]) for name in words}
    if not stamps.duplicated().any():
        for name, own in codes.items():
            parts = [Reading("", "", part) for _, part in stamps.groupby(own)]
            if 1 < len(parts) <= len(own) / 3 and all(map(grid.is_regular, parts)):
                raise TableError(
                    f"column {name!r} may name several series; use --group {shlex.quote(name)}, or --group none "
                    f"for one series"
                )
        return []
    found = {codes[name].to_numpy().tobytes(): [name] for name in reversed(words) if _separates(codes[name], stamps)}
    if not found and len(words) > 1 and _separates(pd.DataFrame(codes).groupby(words, sort=False).ngroup(), stamps):
        return words
    options = " or ".join(f"--group {shlex.quote(','.join(names))}" for names in reversed(found.values()))
    if len(found) > 1:
        raise TableError(f"several columns can name the series; use {options}")
    if found or optional:
        return next(iter(found.values()), [])
    at = int(np.argmax(stamps.duplicated()))
    first = int(np.argmax(stamps == stamps[at]))
    others = [name for name in body.frame.columns if name not in used and (name in words or body.column(name).integers)]
    stamp = int(stamps[at].timestamp()) if time.reading.period == "step" else stamps[at]
    raise TableError(
        f"rows {body.rows[first]} and {body.rows[at]} have the same time stamp {stamp}; use --aggregate sum, "
        f"mean or last "
        f"to combine such rows; or --group with the columns that name the series ({', '.join(others[:9])}); or --time "
        f"with all columns of the time, such as --time {shlex.quote(','.join(time.names))},hour, and their "
        f"--format; or --time none "
        "if each row is one step and the rows are in the order of time"
    )


def _separates(codes: pd.Series, stamps: pd.Series) -> bool:
    """Return whether no series has a time stamp twice, and the median series has at least three rows and few gaps."""
    rank = pd.Series(pd.factorize(stamps, sort=True)[0])
    spans = rank.groupby(codes).agg(["count", "min", "max"])
    fill = spans["count"] / (spans["max"] - spans["min"] + 1)
    is_complete = len(spans) > 1 and fill.median() >= MIN_FILL and spans["count"].median() >= 3
    return bool(is_complete and not pd.DataFrame({"series": codes, "rank": rank}).duplicated().any())


def reject_constant(body: Body, names: Sequence[str], groups: Sequence[str]) -> None:
    """Raise TableError if a column has one value in each series, such as the size of a store, but not in the table."""
    counts = body.frame[[*groups, *names]].groupby(list(groups), sort=False)[list(names)].nunique().max()
    constant = [name for name in names if counts[name] == 1 and body.frame[name].nunique() > 1]
    if 0 < len(constant) < len(names):
        others = shlex.join(name for name in names if name not in constant)
        raise TableError(f"column {constant[0]!r} has one value in each series; use --column {others} to leave it out")
