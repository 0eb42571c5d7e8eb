"""Find the columns of time stamps, the columns of values, and the columns that name the series of each row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from app.tables import grid, numbers, times
from app.tables.header import Body, as_texts, is_time_name
from app.tables.messages import NO_TIME, TableError, choice, option
from app.tables.times import Reading

INDEX_NAME = re.compile(r"|index|id|no\.?|nr\.?|#|obs|observation|rownames|unnamed: 0(\.\d+)?", re.IGNORECASE)
SAMPLE_CELLS = 1000  # number of cells that decide whether a column holds times of day
# Names of columns of numbers that may be codes or parts of the date, not values.
CODE_NAME = re.compile(
    r"(?i:(.*[ _.-])?(ids?|no|nr|num|number|codes?|key|uuid|sku|zip|zipcode|plz|postcode|phone|ean|isbn|barcode|lat|"
    r"long?|latitude|longitude)|invoice|receipt|ticket|transaction|account|customer|rechnung|beleg|kunde|minute|second|"
    r".*(week|month|day|dow|hour|year|quarter|date|mnth|yr|hr|decimal).*)|[A-Za-z]+(Id|ID|No|Nr|Code|Key)"
)

PARTS = f"{option('time', 'Year,Month')} {option('format', '%Y %m')}"  # an example in messages


def readings(body: Body, name: str) -> list[Reading]:
    """Return the possible readings of a column of texts or numbers as time stamps."""
    if name in body.readings:
        return body.readings[name]
    column, week = body.column(name), bool(re.search("week|wk|kw|woche", name, re.IGNORECASE))
    found = times.numeric_readings(column.values) if column.share > 0.8 and not week else []
    return body.readings.setdefault(name, found or times.readings(body.texts(name), week))


def holds_times(body: Body, name: str) -> bool:
    """Return whether the cells of a column are time stamps. Plain numbers are time stamps if the name says so."""
    return (body.column(name).share <= 0.8 or is_time_name(name)) and bool(readings(body, name))


def find_times(body: Body, taken: Sequence[str]) -> Reading | None:
    """Find the time stamps of a table; return None if it has none.

    ``taken``: columns that do not hold time stamps.

    Raises:
        TableError: several columns or several formats are possible, or time stamps cannot be read.
    """
    names, time = list(body.frame.columns), body.options.time
    if time == "none" and time not in names:
        return None
    if time is not None:
        return read_times(body, [time] if time in names else [name.strip() for name in time.split(",")])
    candidates = [name for name in names if name not in taken]
    numeric = [name for name in candidates if body.column(name).share > 0.8]
    if len(numeric) + len(taken) == 1:
        candidates, numeric = [name for name in candidates if name not in numeric], []  # the values
    found = [name for name in candidates if holds_times(body, name)]
    strong = [name for name in found if name not in numeric] or found[:1]
    if len(strong) > 1:
        raise TableError(f"several columns hold time stamps; choose one: {choice('time', strong)}")
    words = [name for name in candidates if body.column(name).share <= 0.5 and len(body.column(name).others) > 1]
    if strong or body.options.format is not None:
        date = read_times(body, strong or (words or names)[:1])
        if not date.times.duplicated().any():
            return date
        samples = {name: as_texts(body.frame[name].iloc[:SAMPLE_CELLS]) for name in words}
        clocks = [name for name, own in samples.items() if times.times_of_day(own).notna().mean() > 0.8]
        return read_times(body, [*strong, *clocks[:1]]) if clocks else date
    for name in numeric:
        possible = [own for own in times.numeric_readings(body.column(name).values) if grid.is_regular(own.times)]
        if possible and not INDEX_NAME.fullmatch(name):
            raise TableError(
                f"column {name!r} may hold time stamps ({possible[0].label}) or values; use {option('time', name)}, or "
                f"{NO_TIME} to read it as values"
            )
    if words:
        raise _unreadable(body, words[:1])
    return None


def read_times(body: Body, names: list[str]) -> Reading:
    """Read the time stamps of the columns ``names``. Raises TableError if they cannot be read or are ambiguous."""
    if wrong := [name for name in names if name not in body.frame]:
        raise TableError(f"there is no column {wrong[0]!r}; its columns are: {', '.join(body.frame.columns)}")
    cells = body.texts(names[0])
    for name in names[1:]:
        cells = cells + " " + body.texts(name)
    pattern = body.options.format
    label, example = ", ".join(map(repr, names)), next(iter(cells.dropna()), "")
    if pattern is not None:
        try:
            found = [times.with_format(cells, pattern)]
        except (ValueError, re.error) as error:
            raise TableError(f"{option('format', pattern)}: {error}") from error
        if found[0].times.notna().sum() < 0.8 * cells.notna().sum() or not re.search("%[YyG]", pattern):
            raise TableError(f"{option('format', pattern)} does not fit the cells of {label}, for example {example!r}")
    else:
        found = readings(body, names[0]) if len(names) == 1 else times.readings(cells)
    if not found:
        raise _unreadable(body, names)
    if len(found) > 1:
        found = [own for own in found if grid.is_regular(own.times)] or found
    if len(found) > 1:
        separator = next(iter(re.findall(r"[-/. ]", example)), "/")
        formats = [re.sub(r"[-/ ]", separator, own.label) for own in found if "%" in own.label]
        raise TableError(
            f"column {label}: the time stamp {example!r} is ambiguous: {', '.join(own.label for own in found)}; choose "
            f"{choice('format', formats) or f'{NO_TIME} or another column'}"
        )
    return replace(found[0], names=names)


def _unreadable(body: Body, names: list[str]) -> TableError:
    example = next(iter(as_texts(body.frame[names[0]]).dropna()), "")
    return TableError(
        f"column {', '.join(map(repr, names))} holds no time stamps that can be read, for example {example!r}; give "
        f"their format, for example {option('format', '%d.%m.%Y')}; or use {NO_TIME} if there are none and the rows "
        f"are in the order of time; or {option('by_rows')} if each row is a series"
    )


def value_columns(body: Body, used: Sequence[str]) -> list[str]:
    """Return the names of the columns of values: all columns of numbers, except row numbers, and zeros and ones.

    Beside other values, zeros and ones are rather a covariate, such as promotions. A column with many numbers and some
    other texts is a column of values. ``used``: columns that hold time stamps, groups or
    known values.

    Raises:
        TableError: a column may hold codes or parts of the date, or no column has numbers.
    """
    selected: list[str] = []
    suspect: list[str] = []
    flags: list[str] = []
    texts = []
    for name in (name for name in body.frame.columns if name not in used and not body.column(name).missing.all()):
        column = body.column(name)
        if numbers_rows(body, name):
            body.leave_out(name, "only numbers the rows")
        elif column.share > 0.3 or column.has_units:
            is_code = CODE_NAME.fullmatch(name) or is_time_name(name) or body.texts(name).str.fullmatch(r"0\d+").any()
            (flags if column.is_flag else suspect if is_code else selected).append(name)
        else:
            texts.append(name)
    if suspect:
        raise TableError(
            f"column {suspect[0]!r} may hold values, codes or a part of the date; name the columns to read with "
            f"{option('column', *(selected or suspect))}, or all columns of the time, such as {PARTS}"
        )
    for name in flags if selected else ():
        body.leave_out(name, "holds only zeros and ones")
    selected = selected or flags
    if not selected:
        raise TableError(f"has no column of numbers; its columns are: {', '.join(body.frame.columns)}")
    if texts:
        body.remarks.append(f"columns of text: {', '.join(map(repr, texts))}")
    return selected


def numbers_rows(body: Body, name: str) -> bool:
    """Return whether a column only numbers the rows, judged by its name and its values: it counts, or is the first
    column and its integers ascend, as in the index of a filtered DataFrame."""
    values = body.column(name).values
    if not INDEX_NAME.fullmatch(name) or np.isnan(values).any() or len(values) < 2:
        return False
    ascends = body.frame.columns[0] == name and (values % 1 == 0).all() and (np.diff(values) > 0).all()
    return bool(ascends or (np.diff(np.sort(values)) == 1).all())


def parse_values(body: Body, names: Sequence[str]) -> pd.DataFrame:
    """Return the values of the columns ``names``. Missing values are NaN.

    Raises:
        TableError: a cell is not a number, the decimal separator is ambiguous, or a value such as -999 may stand for a
            missing value.
    """
    columns = {name: body.column(name) for name in names}
    sign = body.options.decimal or numbers.decimal_sign(columns, body.separator)
    if any("," in text or sign == "," for own in columns.values() for text in own.numbers):
        body.remarks.append(f"the decimal separator is {sign!r}")
    missing = body.options.missing
    return pd.DataFrame(
        {name: numbers.parse(name, own, sign, missing, body.rows, body.remarks) for name, own in columns.items()}
    )


def group_columns(body: Body, used: Sequence[str], values: Sequence[str], stamps: pd.Series) -> list[str]:
    """Return the columns of words that name the series of each row, so that no series has the same time stamp twice.

    Return [] if no time stamp occurs twice, if no columns separate such rows, or if rows with the same time stamp are
    combined.

    Raises:
        TableError: several columns separate the rows with the same time stamp; or a column may hold the names of
            several series whose rows alternate.
    """
    words = [
        name for name in body.frame.columns
        if name not in (*used, *values) and body.texts(name).str.contains(r"[^\W\d_]").all()
    ]  # fmt: skip
    codes = {name: pd.Series(pd.factorize(body.frame[name])[0]) for name in words}
    if not stamps.duplicated().any():
        for name, own in codes.items():
            parts = [part for _, part in stamps.groupby(own)]
            if 1 < len(parts) <= len(own) / 3 and all(map(grid.is_regular, parts)):
                options = f"{option('group', name)}, or {option('group', 'none')} for one series"
                raise TableError(f"column {name!r} may name several series; use {options}")
        return []
    if body.options.aggregate and not body.options.resample:
        return []
    found = {codes[name].to_numpy().tobytes(): name for name in reversed(words) if _separates(codes[name], stamps)}
    if len(found) > 1:
        raise TableError(f"several columns can name the series; use {choice('group', [*reversed(found.values())])}")
    groups = [*found.values()]
    if not found and len(words) > 1 and _separates(pd.DataFrame(codes).groupby(words, sort=False).ngroup(), stamps):
        groups = words
    if groups:
        body.remarks.append(f"each value of {', '.join(groups)} is a series")
    return groups


def _separates(codes: pd.Series, stamps: pd.Series) -> bool:
    """Return whether no series has a time stamp twice, and the median of several series has at least three rows."""
    counts = codes.value_counts()
    return len(counts) > 1 and counts.median() >= 3 and not pd.DataFrame({0: codes, 1: stamps}).duplicated().any()
