"""Parse numbers as people write them: decimal and thousands separators, currencies, and missing values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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
NEGATIVE = re.compile(r"^\((.*)\)$|^(.*)-$")  # as accountants write negative numbers
WITH_UNIT = r"[-+]?\d[\d.,'’ ]*?(?:[^\W\d_][^\d,;]{0,11}|°[CFK]?)"  # a number and a unit such as kWh
# Digits with thousands separators, for each decimal separator. In India, 1,23,456 is a number.
DIGITS = {
    ".": r"(?:\d*|[1-9]\d{0,2}(?:(?:,\d{3})+|(?:['’]\d{3})+|(?: \d{3})+)|[1-9]\d?(?:,\d\d)+,\d{3})(?:\.\d*)?",
    ",": r"(?:\d*|[1-9]\d{0,2}(?:(?:\.\d{3})+|(?:['’]\d{3})+|(?: \d{3})+))(?:,\d*)?",
}
SAMPLE_CELLS = 1000  # a column without a number among so many distinct cells holds no numbers
MAX_VALUE = 1e150  # because squares of larger values overflow
SENTINELS = [-9.0, -99.0, -999.0, -9999.0, -99999.0, 9999.0, 99999.0, -99.9, -999.9, -9999.9, 999.9, 9999.9, -200.0]


def written(texts: pd.Series) -> pd.DataFrame:
    """Return the numbers among distinct texts, which become the index.

    The column ``mark`` holds the currency. The columns ``.`` and ``,`` hold the value with this decimal separator, or
    NaN.
    """
    texts = texts.set_axis(texts)
    signed = texts.str.replace("[−–]", "-", regex=True)
    plain = signed.str.replace(MARK, r"\1", regex=True).str.replace(NEGATIVE, r"-\1\2", regex=True)
    mark = signed.str.extract(f"({CURRENCY}|%)", flags=re.IGNORECASE)[0]
    result = pd.DataFrame({"mark": mark.fillna("")}, index=pd.Index(texts, dtype="str"))
    for decimal, digits in DIGITS.items():
        fitting = plain.where(plain.str.fullmatch(rf"[-+]?{digits}(?:[eE][-+]?\d{{1,3}})?"))
        fitting = fitting.str.replace(rf"[^-+\deE{decimal}]", "", regex=True).str.replace(",", ".", regex=False)
        result[decimal] = pd.to_numeric(fitting, errors="coerce").astype("float64")
    return result[result[list(DIGITS)].notna().any(axis=1)]


class Column:
    """The cells of a column, split into plain numbers, numbers with marks or separators, missing cells, and others.

    Attributes:
        values: the plain numbers, float64; NaN for all other cells.
        numbers: the other texts of numbers, see ``written``.
        pointed: the text of a plain number whose point must separate decimals, if there is one.
        vague: the texts of plain numbers such as 1.234 if there is no such number.
        others: the distinct texts that are neither numbers nor missing.
        share: the share of numbers among the cells that are not missing; 0 if all are missing.
        missing: whether each cell is missing.
    """

    def __init__(self, cells: pd.Series, missing: Sequence[str] = ()) -> None:
        """``missing``: further texts of missing values."""
        values = pd.to_numeric(cells, errors="coerce").astype("float64")
        named = values.isin(pd.to_numeric(pd.Series(missing, dtype="str"), errors="coerce").dropna())
        values = values.mask(named | np.isinf(values))
        dotted = pd.Series(dtype="str")
        if cells.dtype.kind == "O" and values.notna().any():
            dotted = cells[values.notna() & cells.str.contains(".", regex=False).eq(True)].astype("str")
        self.pointed = dotted[~dotted.str.fullmatch(r"[-+]?[1-9]\d{0,2}\.\d{3}")].iloc[:1]
        self.vague = dotted if self.pointed.empty else dotted[:0]
        self.cells, self.values = cells, values
        counts = cells[values.isna() & cells.notna() & ~named].astype("str").value_counts()
        blank = counts.index.str.lower().isin(MISSING) | counts.index.isin(missing)
        self.missing = cells.isna() | named | cells.isin(counts.index[blank])
        counts = counts[~blank]
        texts = counts.index.to_series()
        has_numbers = len(written(texts.iloc[:: len(texts) // SAMPLE_CELLS + 1])) > 0  # else dates or names
        self.numbers = written(texts if has_numbers else texts[:0])
        others = counts.drop(self.numbers.index)
        self.others = others.index.to_series()
        there = len(cells) - int(self.missing.sum())
        self.share = (there - int(others.sum())) / max(1, there)

    @property
    def is_flag(self) -> bool:
        """Whether the cells are zeros and ones."""
        return {*self.values.dropna()} == {0.0, 1.0} and not len(self.numbers) + len(self.others)


def decimal_sign(columns: Mapping[str, Column], separator: str) -> str:
    """Return the decimal separator of the columns of values, "." or ",". It is "." if no cell has a point or comma.

    1. A cell such as 1.234,5 is a number with only one of the two separators.
    2. If there is no such cell, and all whole numbers of a column are below 1000, then a column with 1,234 separates
       thousands. A point in a file with commas between the cells does so rarely, so this file is ambiguous.
    3. In a file with commas between the cells, the comma in amounts such as "$7,818" separates thousands.

    Raises:
        TableError: the separator is ambiguous, or the cells contradict each other.
    """
    certain: dict[str, str] = {}
    likely: dict[str, str] = {}
    unclear = ""
    for name, column in columns.items():
        numbers = pd.concat([column.numbers, written(column.vague.iloc[:1])])
        fits = numbers[list(DIGITS)].notna()
        for sign in DIGITS:
            only = [*numbers.index[fits[sign] & ~fits.all(axis=1)], *(column.pointed if sign == "." else ())]
            if only:
                certain.setdefault(sign, f"{only[0]!r} in {name}")
        vague = numbers[fits.all(axis=1) & (numbers["."] != numbers[","])]
        if vague.empty:
            continue
        cell = vague.index[0]
        sign, other = (",", ".") if "," in cell else (".", ",")
        plain = column.values.drop(column.vague.index)
        whole = pd.concat([plain, numbers["."].drop(vague.index)]).abs().max()
        is_amount = sign == separator == "," and vague["mark"].str.contains("[$£]").any()
        below = whole < 1000 and (sign, separator) != (".", ",")
        if (below or is_amount) and not whole >= 1000 and not vague.index.str.contains(other, regex=False).any():
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
) -> pd.Series:
    """Return the numbers of a column, float64; NaN for missing values. Append a remark about a currency.

    ``missing``: the cells of --missing. ``rows``: the row numbers of the file.

    Raises:
        TableError: a cell is not a number, or has another currency than the others; or a value such as -999 may stand
            for a missing value.
    """
    cells, numbers = column.cells, column.numbers
    mark = next(iter(numbers["mark"][numbers["mark"] != ""].mode()), "")
    wrong = numbers[decimal].isna() | ~numbers["mark"].isin(["", mark])
    if texts := [*column.others, *numbers.index[wrong], *(column.pointed if decimal == "," else ())]:
        at = int(np.argmax(cells.isin(texts)))
        text = str(cells.iloc[at])[:40]
        advice = f"use {option('missing', *missing, text)} to read such cells as missing"
        if not column.share:
            advice = "write numbers instead of words, such as 1 for 'yes' and 0 for 'no', and without units"
        raise TableError(
            f"row {rows[at]}: {name} is {text!r}, not a number{f' like those with {mark!r}' if mark else ''}; "
            f"{advice}; or name the columns to read with {COLUMN}"
        )
    values = column.values
    if decimal == ",":
        values = values.mask(values.index.isin(column.vague.index), (1000 * values).round())
    if len(numbers):
        values = values.fillna(cells.map(numbers[decimal]).astype("float64"))
    if mark:
        remarks.append(f"{name}: {mark!r} is left out of the values")
    values = values.mask(np.isinf(values))
    largest = max(values.min(), values.max(), key=abs)
    if abs(largest) > MAX_VALUE:
        raise TableError(f"{name} has the value {largest}; allowed are -{MAX_VALUE} to {MAX_VALUE}")
    others = values[~values.isin(SENTINELS)]
    low, high = others.min(), others.max()
    spread = (high - low) or 1.0
    found = [own for own in SENTINELS if (values == own).any() and not low - max(spread, 9) <= own <= high + 3 * spread]
    if found and "none" not in missing:
        options = [option("missing", *missing, text) for text in (f"{found[0]:g}", "none")]
        raise TableError(
            f"{name}: {found[0]:g} may be a value or stand for a missing value; use {options[0]}, or {options[1]} to "
            "read it as a value"
        )
    return values
