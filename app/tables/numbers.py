"""Parse numbers as people write them: decimal and thousands separators, currencies, and missing values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from app.tables.messages import COLUMN, TableError, choice, option

# Spellings of a missing value, in lower case.
MISSING_WORDS = (
    "- -- --- — – ? . .. ... … : * *** / \\n na n/a #n/a #na <na> n.a. k.a. n.v. n/v nd n.d. nan nat null (null) "
    "<null> none nil missing (missing) (blank) blank (leer) unknown tbd inf -inf #value! #ref! #div/0! #null! #num! "
    "#name? #wert! #bezug! #nv"
)
MISSING = {"", "no data", "no value", "k. a.", *MISSING_WORDS.split()}
CURRENCY = (
    r"(?:(?:US|A|C|R|NZ|HK|S)?\$|[€£¥₹₩₽₺]|Rs\.?|kr\.?|zł|USD|EUR|GBP|JPY|CHF|CAD|AUD|SEK|NOK|DKK|PLN|CNY|INR|BRL)"
)
# A currency before a number, or a currency or a percent sign after it. The sign of the number stays.
MARK = re.compile(rf"^([-+(]?)(?:{CURRENCY}) ?|(?<=[\d.,]) ?(?:{CURRENCY}|%)(?=[-)]?$)", re.IGNORECASE)
ANY_MARK = re.compile(f"{CURRENCY}|%", re.IGNORECASE)
NEGATIVE = re.compile(r"^\((.*)\)$|^(.*)-$")  # as accountants write negative numbers
# A number and a unit such as kWh.
WITH_UNIT = re.compile(r"[-+]?\d[\d.,'’ ]*?(?:[^\W\d_][^\d,;]{0,11}|°[CFK]?)", re.ASCII)
# Numbers with thousands separators, for each decimal separator. In India, 1,23,456 is a number.
NUMBER = {
    decimal: re.compile(rf"[-+]?(?=[{decimal}]?\d){digits}(?:[eE][-+]?\d{{1,3}})?", re.ASCII)
    for decimal, digits in {
        ".": r"(?:\d*|[1-9]\d{0,2}(?:(?:,\d{3})+|(?:['’]\d{3})+|(?: \d{3})+)|[1-9]\d?(?:,\d\d)+,\d{3})(?:\.\d*)?",
        ",": r"(?:\d*|[1-9]\d{0,2}(?:(?:\.\d{3})+|(?:['’]\d{3})+|(?: \d{3})+))(?:,\d*)?",
    }.items()
}
WITHOUT_THOUSANDS = {".": str.maketrans("", "", ",'’ "), ",": str.maketrans(",", ".", ".'’ ")}
VAGUE = re.compile(r"[-+]?[1-9]\d{0,2}\.\d{3}", re.ASCII)  # with decimals or thousands
SAMPLE_CELLS = 1000  # a column without a number among so many distinct cells holds no numbers
MAX_VALUE = 1e150  # because squares of larger values overflow
SENTINELS = [-9.0, -99.0, -999.0, -9999.0, -99999.0, 9999.0, 99999.0, -99.9, -999.9, -9999.9, 999.9, 9999.9, -200.0]


class Number(NamedTuple):
    """A number as people write it.

    Attributes:
        values: the value with each decimal separator that fits.
        mark: the currency or the percent sign, or "".
    """

    values: dict[str, float]
    mark: str


def written(text: str) -> Number | None:
    """Return the number in a text, or None."""
    signed = re.sub("[−–]", "-", text)
    mark = ANY_MARK.search(signed)
    plain = NEGATIVE.sub(r"-\1\2", MARK.sub(r"\1", signed) if mark else signed)
    values = {
        decimal: float(plain.translate(WITHOUT_THOUSANDS[decimal]))
        for decimal, pattern in NUMBER.items()
        if pattern.fullmatch(plain)
    }
    return Number(values, mark[0] if mark else "") if values else None


class Column:
    """The cells of a column, split into plain numbers, numbers with marks or separators, missing cells, and others.

    Attributes:
        values: the plain numbers, float64 [T]; NaN for all other cells.
        numbers: the other texts of numbers, which are distinct.
        pointed: the text of a plain number whose point must separate decimals, or "". Without such a text, numbers such
            as 1.234 are not plain.
        others: the distinct texts that are neither numbers nor missing.
        share: the share of numbers among the cells that are not missing; 0 if all are missing.
        missing: whether each cell is missing, bool [T].
    """

    def __init__(self, cells: pd.Series, missing: Sequence[str] = ()) -> None:
        """``missing``: further texts of missing values."""
        values = pd.to_numeric(cells, errors="coerce").to_numpy("float64", na_value=np.nan).copy()
        named = np.isin(values, pd.to_numeric(np.array(missing, object), errors="coerce"))
        values[named | np.isinf(values)] = np.nan
        self.pointed = ""
        if cells.dtype.kind == "O" and not np.isnan(values).all():
            dotted = cells[~np.isnan(values) & cells.str.contains(".", regex=False).eq(True)].astype("str")
            self.pointed = next((text for text in dotted if not VAGUE.fullmatch(text)), "")
            if not self.pointed:
                values[dotted.index] = np.nan
        plain, there = ~np.isnan(values), cells.notna().to_numpy()
        self.cells, self.values = cells, values
        counts = Counter(cells[there & ~plain & ~named].astype("str").tolist())
        blank = {text for text in counts if text.lower() in MISSING} | (counts.keys() & {*missing})
        self.missing = ~there | named | cells.isin(blank).to_numpy()
        texts = [text for text, _ in counts.most_common() if text not in blank]
        has_numbers = any(map(written, texts[:: len(texts) // SAMPLE_CELLS + 1]))  # else dates or names
        self.numbers = {text: number for text in texts if has_numbers and (number := written(text))}
        self.others = [text for text in texts if text not in self.numbers]
        size = len(cells) - int(self.missing.sum())
        self.share = (size - sum(counts[text] for text in self.others)) / max(1, size)

    @property
    def has_units(self) -> bool:
        """Whether most of ``others`` are numbers with units."""
        return 2 * sum(map(bool, map(WITH_UNIT.fullmatch, self.others))) > len(self.others)

    @property
    def is_flag(self) -> bool:
        """Whether the cells are zeros and ones."""
        return not (self.numbers or self.others) and {*np.unique(self.values[~np.isnan(self.values)])} == {0.0, 1.0}


def decimal_sign(columns: Mapping[str, Column], separator: str) -> str:
    """Return the decimal separator of the columns of values, "." or ",". It is "." if no cell has a point or comma.

    1. A cell such as 1.234,5 is a number with only one of the two separators.
    2. If there is no such cell, and all whole numbers of a column are below 1000, then a column with 1,234 separates
       thousands. A point in a file with commas between the cells does so rarely, so this file is ambiguous.

    Raises:
        TableError: the separator is ambiguous, or the cells contradict each other.
    """
    certain: dict[str, str] = {}
    likely: dict[str, str] = {}
    unclear = ""
    for name, column in columns.items():
        numbers = column.numbers
        for sign in NUMBER:
            only = (text for text, number in numbers.items() if [*number.values] == [sign])
            if cell := next(only, column.pointed if sign == "." else ""):
                certain.setdefault(sign, f"{cell!r} in {name}")
        vague = {text: number for text, number in numbers.items() if len({*number.values.values()}) > 1}
        if not vague:
            continue
        cell = next(iter(vague))
        sign, other = (",", ".") if "," in cell else (".", ",")
        clear = [number.values.get(".", np.nan) for text, number in numbers.items() if text not in vague]
        whole = pd.Series(np.append(column.values, clear)).abs().max()
        below = whole < 1000 and (sign, separator) != (".", ",")
        if below and not any(other in text for text in vague):
            likely.setdefault(other, f"{cell!r} in {name}")
        else:
            unclear = unclear or f"{name}: {cell!r}"
    evidence = certain or likely
    if len(evidence) == 2:
        raise TableError(
            f"mixes decimal commas ({evidence[',']}) and decimal points ({evidence['.']}); use one of them in all "
            f"columns, or choose the columns with {COLUMN}"
        )
    if unclear and not certain:
        raise TableError(f"{unclear} may have decimals or thousands separators; choose with {choice('decimal', '.,')}")
    return next(iter(evidence), ".")


def parse(
    name: str, column: Column, decimal: str, missing: Sequence[str], rows: np.ndarray, remarks: list[str]
) -> np.ndarray:
    """Return the numbers of a column, float64 [T]; NaN for missing values. Append a remark about a currency.

    ``missing``: the cells of --missing. ``rows``: the row numbers of the file.

    Raises:
        TableError: a cell is not a number, or has another currency than the others; or a value such as -999 may stand
            for a missing value.
    """
    cells, numbers = column.cells, column.numbers
    marks = [number.mark for number in numbers.values() if number.mark]
    mark = max(sorted({*marks}), key=marks.count, default="")
    right = {text: n.values[decimal] for text, n in numbers.items() if decimal in n.values and n.mark in ("", mark)}
    points = [column.pointed] if decimal == "," and column.pointed else []
    if texts := [*column.others, *(numbers.keys() - right), *points]:
        at = int(np.argmax(cells.isin(texts)))
        text = str(cells.iloc[at])[:40]
        advice = f"use {option('missing', *missing, text)} to read such cells as missing"
        if not column.share:
            advice = "write numbers instead of words, such as 1 for 'yes' and 0 for 'no', and without units"
        raise TableError(
            f"row {rows[at]}: {name} is {text!r}, not a number{f' like those with {mark!r}' if mark else ''}; "
            f"{advice}; or name the columns to read with {COLUMN}"
        )
    values = column.values.copy()
    if right:
        values = np.where(np.isnan(values), cells.map(right).astype("float64"), values)
    if mark:
        remarks.append(f"{name}: {mark!r} is left out of the values")
    values[np.isinf(values)] = np.nan
    known = values[~np.isnan(values)]
    if len(large := known[abs(known) > MAX_VALUE]):
        raise TableError(f"{name} has the value {large[0]}; allowed are -{MAX_VALUE} to {MAX_VALUE}")
    others = known[~np.isin(known, SENTINELS)]
    low, high = others.min(initial=np.inf), others.max(initial=-np.inf)
    spread = (high - low) or 1.0
    found = [own for own in SENTINELS if own in known and not low - max(spread, 9) <= own <= high + 3 * spread]
    if found and "none" not in missing:
        options = [option("missing", *missing, text) for text in (f"{found[0]:g}", "none")]
        raise TableError(
            f"{name}: {found[0]:g} may be a value or stand for a missing value; use {options[0]}, or {options[1]} to "
            "read it as a value"
        )
    return values
