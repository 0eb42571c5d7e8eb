"""Find the columns of values, and the columns that name the series of each row."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pandas as pd

from training.data.tables import frequency, numbers, time_column, timestamps
from training.data.tables.header import INDEX_NAME, Body, role
from training.data.tables.time_column import TimeColumn, time_readings, values_of
from training.data.tables.timestamps import Reading

ID_NAME = re.compile(
    r"(?i:(.*[ _.-])?(ids?|no|nr|num|number|codes?|key|uuid|sku|zip|zipcode|plz|postcode|phone|ean|isbn|barcode|lat|"
    r"long?|latitude|longitude)|invoice|receipt|ticket|transaction|account|customer|rechnung|beleg|kunde)|[A-Za-z]+(Id|ID|No|Nr|Code|Key)"
)
SENTINELS = (-9.0, -99.0, -999.0, -9999.0, -99999.0, 9999.0, 99999.0, -99.9, -999.9, -9999.9, 999.9, 9999.9, -200.0)
FLAGS = {"true", "false", "yes", "no", "y", "n", "ja", "nein", "oui", "non", "si", "sí", "0", "1", "none"}
MAX_GROUP_COLUMNS = 3
# Columns name the series only if, in the median group, at least this share of the time stamps has a row.
MIN_FILL = 0.5
MAX_TEXT_SHARE = 0.1  # largest share of cells in a column of numbers that are not numbers


def detect_time(
    body: Body, time: str | None, pattern: str | None, columns: Sequence[str], groups: Sequence[str]
) -> TimeColumn | None:
    """Find the time stamps of a table; return None if it has none.

    ``time``, ``pattern``: values of --time and --format. ``columns``: the columns of --column and --known-covariates.
    ``groups``: the columns of --group.

    Raises:
        DataError: the time stamps are ambiguous, or ``columns`` or ``groups`` contain their column.
    """
    for name in columns:
        if time_readings(body, name):
            raise body.error(
                f"column {name!r} holds time stamps, not numbers; omit it in --column and --known-covariates"
            )
    detected = time_column.detect(body, time, pattern, [*columns, *groups])
    if (detected is None and time is None) or (detected and set(detected.names) <= set(groups)):
        for name in groups:
            numeric = role(name) and timestamps.numeric_readings(body.frame[name], values_of(body.frame[name]))
            if numeric or time_readings(body, name):
                raise body.error(
                    f"column {name!r} holds time stamps; it cannot name the series. Omit it in --group, or use --time "
                    "none if each of its values is a series and the rows are in the order of time"
                )
    return detected


def without_missing(frame: pd.DataFrame, missing: Sequence[str]) -> pd.DataFrame:
    """Return the cells without the words of --missing, so that a column with many such words is a column of numbers.

    Only columns whose other cells are mostly numbers change. In the names of series, such words are not missing.
    Numbers of --missing, such as -999, are removed later, from the columns of values.
    """
    words = [text for text in missing if text != "none" and not numbers.is_number(text)]
    columns = {}
    for name in frame.columns if words else ():
        cells = frame[name].mask(frame[name].isin(words), None)
        if numbers.share(cells) > 0.5 or cells.map(numbers.is_missing).all():
            columns[name] = cells
    return frame.assign(**columns)


def value_columns(
    body: Body, used: Sequence[str], requested: Sequence[str] | None, times: pd.Series | None
) -> list[str]:
    """Return the names of the columns of values: all columns of numbers except row numbers, codes and parts of dates.

    ``used``: columns that are skipped, because they hold time stamps, groups or known values. ``requested``: if given,
    exactly these columns are returned. ``times``: the time stamp of each row, or None.

    Raises:
        DataError: a column mixes numbers and texts, or no column has numbers.
    """
    frame = body.frame
    if requested:
        return list(requested)
    selected, left_out, texts = [], [], []
    for name in frame.columns:
        if name in used or frame[name].isna().all():
            continue
        part = numbers.share(frame[name])
        if _numbers_rows(name, frame, times is not None):
            left_out.append(f"column {name!r} only numbers the rows, so it is left out; --column {name!r} reads it")
        elif part > 0.5 and ID_NAME.fullmatch(name):
            left_out.append(f"column {name!r} holds codes, so it is left out; --column {name!r} reads it")
        elif part > 0.5 and (code := _code(frame[name])):
            left_out.append(
                f"column {name!r} holds codes such as {code!r}, so it is left out; --column {name!r} reads it"
            )
        elif part > 0.5 and times is not None and _part_of_date(name, values_of(frame[name]), times):
            left_out.append(
                f"column {name!r} repeats a part of the date, so it is left out; --column {name!r} reads it"
            )
        elif part >= 1 - MAX_TEXT_SHARE:
            selected.append(name)
        elif part > 0.3:
            row, cell = next(
                (r, c) for r, c in frame[name].items() if not numbers.is_missing(c) and not numbers.is_number(c)
            )
            raise body.error(
                f"column {name!r} has numbers and other cells, for example {str(cell)[:40]!r} in row {row}; correct "
                "them, or name the columns to read with --column"
            )
        else:
            texts.append(name)
    if not selected:
        reasons = "; ".join(["has no column of numbers", *left_out])
        raise body.error(f"{reasons}; its columns are: {', '.join(frame.columns)}")
    body.remarks += left_out
    if texts:
        body.remarks.append(f"columns of text: {', '.join(map(repr, texts))}")
    return selected


def restore_empty_rows(body: Body, named: bool) -> None:
    """Insert the rows without a filled cell, which are time steps, because the table has no time stamps.

    If rows are ``named``, or a column numbers them, time steps have a name or number. So empty rows only separate
    other rows, and stay left out.
    """
    if not named and not any(_numbers_rows(name, body.frame, False) for name in body.frame.columns):
        body.restore_empty_rows()


def _numbers_rows(name: str, frame: pd.DataFrame, timed: bool) -> bool:
    """Return whether a column only numbers the rows, judged by its name and its values.

    The name must be a word such as index. The first column may also have no name. Each value must be 1 larger than the
    next smaller value. In the first column, ascending integers may also have gaps, as in the index of a filtered
    DataFrame. ``timed``: whether another column holds the time stamps. If so, names such as time and period are allowed
    too, without gaps.
    """
    counts = timed and role(name) in ("time", "clock")
    first = bool(frame.columns[0] == name)
    index = INDEX_NAME.fullmatch(name) is not None or (name == "" and first)
    if not (counts or index):
        return False
    values = values_of(frame[name])
    if values.isna().any() or len(values) < 2:
        return False
    if index and first and (values == values.round()).all() and (np.diff(values) > 0).all():
        return True
    ordered = np.sort(values.to_numpy())  # rows may come in any order
    return bool((np.diff(ordered) == 1).all())


def _code(cells: pd.Series) -> str | None:
    """Return the first cell with a leading zero, such as 007; None if the column has no such cell."""
    return next((cell for cell in cells if isinstance(cell, str) and re.fullmatch(r"0\d+", cell)), None)


def _part_of_date(name: str, values: pd.Series, times: pd.Series) -> bool:
    """Return whether a column repeats a part of the time stamps, such as the weekday, judged by its name and values."""
    week = times.dt.isocalendar().week.astype("float64")
    parts = [times.dt.year, times.dt.month, times.dt.quarter, times.dt.day, times.dt.hour, times.dt.day_of_year, week]
    parts += [
        times.dt.day_of_week,
        times.dt.day_of_week + 1,
        (times.dt.day_of_week + 1) % 7,
        (times.dt.day_of_week + 1) % 7 + 1,
    ]
    both = values.notna() & times.notna()
    calendar = role(name) or re.search(
        r"week|month|day|dow|hour|year|quarter|date|mnth|yr|hr|decimal", name, re.IGNORECASE
    )
    years = times.dt.year + times.dt.day_of_year / 366
    if calendar and both.any() and ((values - years).abs()[both] < 0.1).all():  # such as 2024.5
        return True
    parts = [part for part in parts if part[both].nunique() > 1 or part is parts[0]]
    return bool(calendar) and bool(both.any()) and any((values[both] == part[both]).all() for part in parts)


def parse_values(body: Body, names: Sequence[str], decimal: str | None, missing: Sequence[str]) -> dict[str, pd.Series]:
    """Return the values of the columns ``names``. Missing values are NaN.

    ``missing``: further cells that stand for a missing value. If "none" is one of them, every other number is a value.

    Raises:
        DataError: a cell is not a number, the decimal separator is ambiguous, units are mixed, or a value such as -999
            may stand for a missing value.
    """
    frame, result = body.frame, {}
    texts = {
        name: [cell for cell in frame[name] if isinstance(cell, str) and not numbers.is_missing(cell)] for name in names
    }
    everything = [cell for cells in texts.values() for cell in cells]
    evidence = numbers.decimal_evidence(everything)
    for name in names:
        cells = frame[name].mask(frame[name].isin(missing))
        try:
            sign = decimal or numbers.decimal_sign(name, texts[name], body.delimiter, evidence)
            values = numbers.parse(name, cells, sign, body.remarks, missing)
            if any("," in cell or (sign == "," and "." in cell) for cell in texts[name]):
                body.remarks.append(f"{name}: the decimal separator is {sign!r}")
        except ValueError as error:
            raise body.error(str(error)) from error
        values = values.mask(values.isin([float(text) for text in missing if numbers.is_plain(text)]))
        if "none" not in missing and (sentinel := _sentinel(values)) is not None:
            raise body.error(
                f"{name}: {sentinel:g} may be a value or stand for a missing value; use "
                f"{numbers.missing_option(missing, f'{sentinel:g}')}, or {numbers.missing_option(missing, 'none')} to "
                "read it as a value"
            )
        result[name] = values
    return result


def _sentinel(values: pd.Series) -> float | None:
    """Return a value such as -999 that may mean "missing", because it is far from all other values.

    If there is no such value, return None.
    """
    known = values.dropna()
    for sentinel in SENTINELS:
        others = known[known != sentinel]
        if len(others) and len(others) < len(known):
            spread = float(others.max() - others.min()) or 1.0
            if sentinel < others.min() - max(spread, 9) or sentinel > others.max() + 3 * spread:
                return sentinel
    return None


def group_columns(
    body: Body, used: Sequence[str], values: Sequence[str], reading: Reading, optional: bool = False
) -> list[str]:
    """Return the columns that name the series of each row, so that no series has the same time stamp twice.

    At least one column of values does not name the series. It is not a part of the time, such as Settlement Period.
    Return [] if no time stamp occurs twice. If ``optional`` is true, also return [] if no columns separate the rows
    with the same time stamp.

    Raises:
        DataError: no columns, or several sets of columns, separate the rows with the same time stamp; or a column may
            hold a part of the time, or the names of several series whose rows alternate.
    """
    times = reading.times
    rows = times.notna()
    frame, times = body.frame[rows], times[rows]
    if not times.duplicated().any():
        return _reject_interleaved(body, frame, times, used, values)
    candidates = [name for name in frame.columns if name not in used and 1 < frame[name].nunique() <= len(frame) / 2]
    texts = [name for name in candidates if name not in values]
    counted = [name for name in candidates if name in values and _counted(frame[name])]
    measured = {name for name in values if not role(name)} or set(values)
    for pool in (texts, texts + counted):
        for count in range(1, min(len(pool), MAX_GROUP_COLUMNS) + 1):
            sets = [names for names in combinations(pool, count) if not measured <= set(names)]
            sets = [names for names in sets if _complete(frame, times, list(names))]
            sets = _without_synonyms(frame, sets)
            if len(sets) == 1:
                _reject_part_of_time(body, sets[0])
                return list(sets[0])
            if sets:
                options = " or ".join(map(group_option, sets))
                raise body.error(f"several columns can name the series; use {options}")
    if optional:
        return []
    row = times.index[times.duplicated()][0]
    first = times.index[times == times[row]][0]
    names = f"{group_option(texts[:1])} for one series per group, or " if texts else ""
    stamp = int(times[row].timestamp()) if reading.period == "step" else times[row]
    ordered = reading.period == "step" or times.is_monotonic_increasing or times.is_monotonic_decreasing
    raise body.error(
        f"rows {first} and {row} have the same time stamp {stamp}; use --aggregate sum, mean or last to combine "
        "such rows"
        + (f", with {names}without --group for one series" if names else "")
        + ("; or --time none if each row is one step and the rows are in the order of time" if ordered else "")
    )


def group_option(names: Sequence[str]) -> str:
    """Return the option --group for these columns, as it is typed in a shell."""
    return f"--group {shlex.quote(','.join(names))}"


def _reject_part_of_time(body: Body, names: Sequence[str]) -> None:
    """Raise DataError if a column that would name the series holds integers and has a name such as hour.

    The name min is only rejected here, because it may also mean minimum.
    """
    for name in names:
        if (role(name) or name.lower() == "min") and _counted(body.frame[name]):
            raise body.error(
                f"column {name!r} may be a part of the time or name the series; use {group_option(names)} if each "
                "of its values is a series, --time with all columns of the time, such as --time date,hour, or --time "
                "none if the rows are in the order of time"
            )


def varying(body: Body, names: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Return the columns ``names`` without those that are constant in each group, such as the size of a store.

    If all these columns are constant in each group, return all of them.
    """
    by_group = body.frame.groupby(list(groups), sort=False)
    constant = [
        name
        for name in names
        if by_group.ngroups > 1 and by_group[name].nunique().max() == 1 and body.frame[name].nunique() > 1
    ]
    if len(constant) == len(names):
        return list(names)
    body.remarks += [
        f"column {name!r} has one value in each series, so it is left out; --column {name!r} reads it"
        for name in constant
    ]
    return [name for name in names if name not in constant]


def _reject_interleaved(
    body: Body, frame: pd.DataFrame, times: pd.Series, used: Sequence[str], values: Sequence[str]
) -> list[str]:
    """Return [] if the rows are a single series.

    Raises:
        DataError: a column of text may name several series whose rows alternate.
    """
    for name in frame.columns:
        if name in used or name in values or not 1 < frame[name].nunique() <= len(frame) / 3:
            continue
        if {str(cell).lower() for cell in frame[name]} <= FLAGS:
            continue
        parts = (times.dt.month, times.dt.day_of_week, times.dt.hour, times.dt.quarter, times.dt.year, times.dt.day)
        if any(frame[name].groupby(part).nunique().max() == 1 for part in parts):  # such as the month in words
            continue
        groups = sorted((np.sort(own.to_numpy()) for _, own in times.groupby(frame[name])), key=lambda own: own[0])
        if all(earlier[-1] < later[0] for earlier, later in pairwise(groups)):
            continue  # the groups follow one after the other, such as final and provisional values
        grids = [frequency.grid([own], "") for own in groups]
        if all(
            grid is not None and len(own) >= 3 and grid.holes <= 0.1 for grid, own in zip(grids, groups, strict=True)
        ):
            raise body.error(
                f"column {name!r} may name several series; use {group_option([name])}, or --group none for one series"
            )
    return []


def _counted(cells: pd.Series) -> bool:
    """Return whether all cells are non-negative integers, such as store numbers."""
    values = values_of(cells)
    return bool(values.notna().all() and (values == values.round()).all() and (values >= 0).all())


def _complete(frame: pd.DataFrame, times: pd.Series, names: list[str]) -> bool:
    """Return whether the columns ``names`` can name the series.

    Their cells must be filled, and no group may have the same time stamp twice. The median group must have at least
    three rows and few gaps.
    """
    keys = pd.DataFrame({**{name: frame[name] for name in names}, "(time)": times})
    if keys.duplicated().any() or frame[names].isna().any().any():
        return False
    position = pd.Series(np.searchsorted(np.sort(times.unique()), times.to_numpy()), index=times.index)
    by_group = position.groupby([frame[name] for name in names])
    fill = by_group.count() / (by_group.max() - by_group.min() + 1)
    return bool(fill.median() >= MIN_FILL and by_group.count().median() >= 3)


def _without_synonyms(frame: pd.DataFrame, sets: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """If several sets of columns give the same groups of rows, keep only the first of these sets.

    For example, a column with country codes and a column with country names give the same groups.
    """
    distinct: list[tuple[tuple[str, ...], pd.Series]] = []
    for names in sets:
        numbered = frame.groupby(list(names), sort=False).ngroup()
        if not any(_same_groups(numbered, other) for _, other in distinct):
            distinct.append((names, numbered))
    return [names for names, _ in distinct]


def _same_groups(first: pd.Series, second: pd.Series) -> bool:
    pairs = pd.DataFrame({"a": first, "b": second}).drop_duplicates()
    return len(pairs) == first.nunique() == second.nunique()
