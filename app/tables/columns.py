"""Find the columns of values, and the columns that name the series of each row."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pandas as pd

from app.tables import TableError, grid, numbers
from app.tables.header import Body, role
from app.tables.time_columns import INDEX_NAME
from app.tables.times import Reading

ID_NAME = re.compile(
    r"(?i:(.*[ _.-])?(ids?|no|nr|num|number|codes?|key|uuid|sku|zip|zipcode|plz|postcode|phone|ean|isbn|barcode|lat|"
    r"long?|latitude|longitude)|invoice|receipt|ticket|transaction|account|customer|rechnung|beleg|kunde)|[A-Za-z]+(Id|ID|No|Nr|Code|Key)"
)
DATE_NAME = re.compile(r"week|month|day|dow|hour|year|quarter|date|mnth|yr|hr|decimal", re.IGNORECASE)
FLAGS = {"true", "false", "yes", "no", "y", "n", "ja", "nein", "oui", "non", "si", "sí", "0", "1", "none"}
MAX_GROUP_COLUMNS = 3
# Columns name the series only if, in the median group, at least this share of the time stamps has a row.
MIN_FILL = 0.5
MAX_TEXT_SHARE = 0.1  # largest share of cells in a column of numbers that are not numbers


def value_columns(body: Body, used: Sequence[str], times: pd.Series | None) -> list[str]:
    """Return the names of the columns of values: all columns of numbers except row numbers, codes and parts of dates.

    ``used``: columns that are skipped, because they hold time stamps, groups or known values. ``times``: the time stamp
    of each row, or None.

    Raises:
        TableError: a column mixes numbers and texts, or no column has numbers.
    """
    selected, left_out, texts = [], [], []
    for name in body.frame.columns:
        column = body.column(name)
        if name in used or column.cells.isna().all():
            continue
        reason = ""
        if numbers_rows(body, name, times is not None):
            reason = "only numbers the rows"
        elif column.share > 0.5 and ID_NAME.fullmatch(name):
            reason = "holds codes"
        elif column.share > 0.5 and (code := _code(column.cells)):
            reason = f"holds codes such as {code!r}"
        elif column.share > 0.5 and times is not None and _part_of_date(name, column.values, times):
            reason = "repeats a part of the date"
        if reason:
            left_out.append(f"column {name!r} {reason}, so it is left out; --column {name!r} reads it")
        elif column.share >= 1 - MAX_TEXT_SHARE and not column.missing.all():
            selected.append(name)
        elif column.share > 0.3:
            at = int(np.argmax(column.cells.isin(column.others)))
            raise TableError(
                f"column {name!r} has numbers and other cells, for example {str(column.cells[at])[:40]!r} in row "
                f"{body.rows[at]}; correct them, or name the columns to read with --column"
            )
        else:
            texts.append(name)
    if not selected:
        reasons = "; ".join(["has no column of numbers", *left_out])
        raise TableError(f"{reasons}; its columns are: {', '.join(body.frame.columns)}")
    body.remarks += left_out
    if texts:
        body.remarks.append(f"columns of text: {', '.join(map(repr, texts))}")
    return selected


def numbers_rows(body: Body, name: str, timed: bool) -> bool:
    """Return whether a column only numbers the rows, judged by its name and its values.

    The name must be a word such as index. The first column may also have no name. Each value must be 1 larger than the
    next smaller value. In the first column, ascending integers may also have gaps, as in the index of a filtered
    DataFrame. ``timed``: whether another column holds the time stamps. If so, names such as time and period are allowed
    too, without gaps.
    """
    first = bool(body.frame.columns[0] == name)
    index = INDEX_NAME.fullmatch(name) is not None or (name == "" and first)
    if not (index or (timed and role(name) in ("time", "clock"))):
        return False
    values = body.column(name).values
    if values.isna().any() or len(values) < 2:
        return False
    if index and first and (values % 1 == 0).all() and values.is_monotonic_increasing and values.is_unique:
        return True
    return bool((np.diff(np.sort(values)) == 1).all())  # rows may come in any order


def _code(cells: pd.Series) -> str | None:
    """Return the first cell with a leading zero, such as 007; None if the column has no such cell."""
    if not isinstance(cells.dtype, pd.StringDtype) and cells.dtype != object:
        return None
    codes = cells[cells.astype("str").str.fullmatch(r"0\d+").fillna(False).astype(bool)]
    return next((cell for cell in codes if isinstance(cell, str)), None)


def _part_of_date(name: str, values: pd.Series, times: pd.Series) -> bool:
    """Return whether a column repeats a part of the time stamps, such as the weekday, judged by its name and values."""
    both = values.notna() & times.notna()
    if not (role(name) or DATE_NAME.search(name)) or not both.any():
        return False
    values, own = values[both], times[both].dt
    if ((values - own.year - own.day_of_year / 366).abs() < 0.1).all():  # such as 2024.5
        return True
    weekday = own.day_of_week
    parts = [own.year, own.month, own.quarter, own.day, own.hour, own.day_of_year, own.isocalendar().week]
    parts += [weekday, weekday + 1, (weekday + 1) % 7, (weekday + 1) % 7 + 1]
    return any((values == part).all() for part in parts if part is parts[0] or part.nunique() > 1)


def parse_values(body: Body, names: Sequence[str], decimal: str | None, missing: Sequence[str]) -> dict[str, pd.Series]:
    """Return the values of the columns ``names``. Missing values are NaN.

    ``missing``: further cells that stand for a missing value. If "none" is one of them, every other number is a value.

    Raises:
        TableError: a cell is not a number, the decimal separator is ambiguous, units are mixed, or a value such as -999
            may stand for a missing value.
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


def group_option(names: Sequence[str]) -> str:
    """Return the option --group for these columns, as it is typed in a shell."""
    return f"--group {shlex.quote(','.join(names))}"


def group_columns(
    body: Body, used: Sequence[str], values: Sequence[str], reading: Reading, optional: bool = False
) -> list[str]:
    """Return the columns that name the series of each row, so that no series has the same time stamp twice.

    At least one column of values does not name the series. It is not a part of the time, such as Settlement Period.
    Return [] if no time stamp occurs twice. If ``optional`` is true, also return [] if no columns separate the rows
    with the same time stamp.

    Raises:
        TableError: no columns, or several sets of columns, separate the rows with the same time stamp; or a column may
            hold a part of the time, or the names of several series whose rows alternate.
    """
    times = reading.times
    codes = {name: pd.Series(pd.factorize(body.frame[name])[0]) for name in body.frame.columns if name not in used}
    if not times.duplicated().any():
        _reject_interleaved(body, {name: own for name, own in codes.items() if name not in values}, times)
        return []
    codes = {name: own for name, own in codes.items() if 1 < own.max() + 1 <= len(own) / 2}
    texts = [name for name in codes if name not in values]
    counted = [name for name in codes if name in values and body.column(name).integers]
    measured = {name for name in values if not role(name)} or set(values)
    rank = pd.Series(np.searchsorted(np.sort(times.unique()), times.to_numpy()))
    for pool in (texts, texts + counted):
        for count in range(1, min(len(pool), MAX_GROUP_COLUMNS) + 1):
            groups: dict[bytes, tuple[str, ...]] = {}
            for names in combinations(pool, count):
                if not measured <= set(names) and not any((codes[name] < 0).any() for name in names):
                    numbered = (
                        pd.DataFrame({name: codes[name] for name in names}).groupby(list(names), sort=False).ngroup()
                    )
                    if _complete(numbered, rank):
                        groups.setdefault(numbered.to_numpy().tobytes(), names)  # synonyms give the same groups
            if len(groups) == 1:
                (names,) = groups.values()
                _reject_part_of_time(body, names)
                return list(names)
            if groups:
                options = " or ".join(map(group_option, groups.values()))
                raise TableError(f"several columns can name the series; use {options}")
    if optional:
        return []
    raise _duplicate(body, texts, reading)


def _duplicate(body: Body, texts: Sequence[str], reading: Reading) -> TableError:
    times = reading.times
    at = int(np.argmax(times.duplicated()))
    first = int(np.argmax(times == times[at]))
    names = f"{group_option(texts[:1])} for one series per group, or " if texts else ""
    stamp = int(times[at].timestamp()) if reading.period == "step" else times[at]
    ordered = reading.period == "step" or times.is_monotonic_increasing or times.is_monotonic_decreasing
    return TableError(
        f"rows {body.rows[first]} and {body.rows[at]} have the same time stamp {stamp}; use --aggregate sum, mean or "
        "last to combine such rows"
        + (f", with {names}without --group for one series" if names else "")
        + ("; or --time none if each row is one step and the rows are in the order of time" if ordered else "")
    )


def _reject_part_of_time(body: Body, names: Sequence[str]) -> None:
    """Raise TableError if a column that would name the series holds integers and has a name such as hour.

    The name min is only rejected here, because it may also mean minimum.
    """
    for name in names:
        if (role(name) or name.lower() == "min") and body.column(name).integers:
            raise TableError(
                f"column {name!r} may be a part of the time or name the series; use {group_option(names)} if each of "
                "its values is a series, --time with all columns of the time, such as --time date,hour, or --time "
                "none if the rows are in the order of time"
            )


def _complete(groups: pd.Series, rank: pd.Series) -> bool:
    """Return whether the numbers ``groups`` can be the series of the rows. ``rank``: the place of each time stamp.

    No group may have the same time stamp twice. The median group must have at least three rows and few gaps.
    """
    if pd.DataFrame({"group": groups, "rank": rank}).duplicated().any():
        return False
    spans = rank.groupby(groups).agg(["count", "min", "max"])
    fill = spans["count"] / (spans["max"] - spans["min"] + 1)
    return bool(fill.median() >= MIN_FILL and spans["count"].median() >= 3)


def _reject_interleaved(body: Body, codes: dict[str, pd.Series], times: pd.Series) -> None:
    """Raise TableError if a column of text may name several series whose rows alternate."""
    for name, own in codes.items():
        count = own.max() + 1
        if not 1 < count <= len(own) / 3 or {str(cell).lower() for cell in body.frame[name].dropna().unique()} <= FLAGS:
            continue
        parts = (times.dt.month, times.dt.day_of_week, times.dt.hour, times.dt.quarter, times.dt.year, times.dt.day)
        if any(own.groupby(part).nunique().max() == 1 for part in parts):  # such as the month in words
            continue
        groups = sorted((np.sort(part.to_numpy()) for _, part in times.groupby(own)), key=lambda part: part[0])
        if all(earlier[-1] < later[0] for earlier, later in pairwise(groups)):
            continue  # the groups follow one after the other, such as final and provisional values
        grids = [grid.find(part, np.zeros(len(part), int), "") for part in groups]
        if all(one and len(part) >= 3 and one.holes <= 0.1 for one, part in zip(grids, groups, strict=True)):
            raise TableError(
                f"column {name!r} may name several series; use {group_option([name])}, or --group none for one series"
            )


def varying(body: Body, names: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Return the columns ``names`` without those that are constant in each group, such as the size of a store.

    If all these columns are constant in each group, return all of them.
    """
    by_group = body.frame.groupby(list(groups), sort=False)
    constant = [
        name
        for name in names
        if by_group.ngroups > 1 and body.frame[name].nunique() > 1 and by_group[name].nunique().max() == 1
    ]
    if len(constant) == len(names):
        return list(names)
    body.remarks += [
        f"column {name!r} has one value in each series, so it is left out; --column {name!r} reads it"
        for name in constant
    ]
    return [name for name in names if name not in constant]
