"""Parse numbers as people write them: decimal and thousands separators, currencies, and missing values."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from app.tables import TableError

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
NUMBER = (
    rf"(?P<open>\()?(?P<sign>[-+]?)(?P<before>{CURRENCY})? ?(?P<sign2>[-+]?)(?P<digits>\d(?:[\d.,'’ ]*[\d.,])?|[.,]\d+)"
    rf"(?P<exponent>e[-+]?\d{{1,3}})?(?P<after> ?(?:{CURRENCY}|%|UNITS))?(?P<minus>-)?(?P<close>\))?"
)
UNIT = re.compile(r"[-+]?\d[\d.,'’ ]*?(?P<unit>[^\W\d_][^\d,;]{0,11}|°[CFK]?)")  # a number and a unit such as kWh
# A whole number with thousands separators, and what follows it. {0}: the decimal separator. {1}: thousands separators.
PATTERN = r"(?:[1-9]\d{{0,2}}([{1}'’ ])\d{{3}}(?:\1\d{{3}})*|\d*)(?:[{0}]\d*)?"
FITS = {".": re.compile(PATTERN.format(".", ",") + r"|[1-9]\d?(?:,\d\d)+,\d{3}(?:\.\d*)?")}  # 1,23,456 in India
FITS[","] = re.compile(PATTERN.format(",", "."))
NO_GROUPS = {".": str.maketrans("", "", ",'’ "), ",": str.maketrans("", "", ".'’ ")}
SAMPLE_CELLS = 1000  # a column without a number among so many distinct cells holds no numbers
SENTINELS = (-9.0, -99.0, -999.0, -9999.0, -99999.0, 9999.0, 99999.0, -99.9, -999.9, -9999.9, 999.9, 9999.9, -200.0)


class Written(NamedTuple):
    """The parts of a number as written. ``mark``: its currency or unit. ``fits``: the possible decimal separators."""

    negative: bool
    digits: str
    exponent: str
    mark: str
    fits: tuple[str, ...]

    def value(self, decimal: str) -> float:
        digits = self.digits.translate(NO_GROUPS[decimal]).replace(",", ".")
        number = float(digits + self.exponent)
        return -number if self.negative else number


def written(cell: Any, units: Collection[str] = ()) -> Written | None:
    """Split a number into its parts; return None if the cell is not the text of a number.

    ``units``: texts that may follow a number.
    """
    pattern = NUMBER.replace("UNITS", "|".join(map(re.escape, units)) or "%")
    text = cell.replace("−", "-").replace("–", "-") if isinstance(cell, str) else ""
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    if match is None or bool(match["open"]) != bool(match["close"]) or (match["before"] and match["after"]):
        return None
    signs = [sign for sign in match.group("sign", "sign2", "minus", "open") if sign]
    digits = match["digits"].strip()
    fits = tuple(sign for sign, fit in FITS.items() if fit.fullmatch(digits))
    if len(signs) > 1 or not fits:
        return None
    mark = (match["before"] or match["after"] or "").strip()
    return Written(bool(signs) and signs[0] != "+", digits, match["exponent"] or "", mark, fits)


class Column:
    """The cells of a column, split into plain numbers, numbers with marks or separators, missing cells, and others.

    Attributes:
        values: the plain numbers, float64; NaN for all other cells.
        written: the other texts of numbers, and their parts.
        others: the texts that are neither numbers nor missing.
        share: the share of numbers among the cells that are not missing; 0 if all are missing.
        missing: whether each cell is missing.
    """

    def __init__(self, cells: pd.Series, missing: Collection[str] = (), units: Collection[str] = ()) -> None:
        """``missing``: further texts of missing values. ``units``: texts after numbers."""
        values = pd.Series(pd.to_numeric(cells, errors="coerce"), cells.index, dtype="float64")
        values = values.replace([np.inf, -np.inf], np.nan)
        named = values.isin([float(text) for text in missing if is_plain(text)])
        self.cells, self.values, self.units = cells, values.mask(named), units
        self.missing = cells.isna() | named
        rest = cells[self.values.isna() & ~self.missing].astype("str")
        blank = rest.str.lower().isin(MISSING) | rest.isin(list(missing))
        self.missing[rest.index[blank]] = True
        counts = rest[~blank].value_counts()
        unique = counts.index.tolist()
        sample = unique[:: max(1, len(unique) // SAMPLE_CELLS)]
        is_numeric = any(written(cell, units) for cell in sample)  # otherwise a column of dates or names
        self.written = {cell: own for cell in unique if is_numeric and (own := written(cell, units))}
        self.others = set(unique) - set(self.written)
        numbers = int(self.values.notna().sum()) + int(counts[list(self.written)].sum())
        self.share = numbers / max(1, numbers + int(counts[list(self.others)].sum()))

    @property
    def integers(self) -> bool:
        """Whether all cells are non-negative integers, such as store numbers."""
        return bool(self.values.notna().all() and (self.values % 1 == 0).all() and (self.values >= 0).all())

    @property
    def unit(self) -> str:
        """The text that follows most numbers, such as kWh; "" if most cells are no numbers with a unit."""
        units = Counter(match["unit"].strip() for cell in self.others if (match := UNIT.fullmatch(cell)))
        return units.most_common(1)[0][0] if units.total() > len(self.others) / 2 else ""

    def texts(self) -> list[Written]:
        """Return the parts of at most some numbers with a point, and of all numbers that are not plain."""
        cells = self.cells[self.values.notna()]
        plain: list[Written] = []
        for sample in (cells.iloc[:1000], cells):  # usually the first cells decide
            plain = [own for cell in sample.unique() if (own := written(cell))]
            if not plain or any(len(own.fits) == 1 for own in plain):
                break
        return [*plain, *self.written.values()]


def is_plain(text: str) -> bool:
    """Return whether a text is a plain number such as -99.5."""
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.IGNORECASE) is not None


def decimal_evidence(texts: Sequence[Written]) -> dict[str, str]:
    """Return, for each decimal separator (``.`` or ``,``), digits that are a number only with this separator."""
    return {own.fits[0]: own.digits for own in reversed(texts) if len(own.fits) == 1 and re.search("[.,]", own.digits)}


def decimal_sign(name: str, texts: Sequence[Written], separator: str, file_evidence: dict[str, str]) -> str:
    """Return the decimal separator of a column, "." or ",". For a column without points and commas, return ".".

    The following rules are tried in this order:

    1. If a cell of the column, such as 1.234,5, is a number with only one of the two signs, this sign is returned.
    2. If other columns have such cells, and these agree on a sign, this sign is returned.
    3. If no column has such a cell, but this column has a whole number of more than three digits, such as 1234,
       thousands are not separated. So a separator is a decimal separator.
    4. In a file whose cells are separated by commas, the comma in amounts such as "$7,818" separates thousands.
    5. If the column has whole numbers, but none has more than three digits, a separator separates thousands. This rule
       does not hold for points in a file whose cells are separated by commas, because such points are rarely thousands
       separators.

    Raises:
        TableError: the sign is ambiguous, or the cells contradict each other.
    """
    evidence = decimal_evidence(texts)
    if len(evidence) == 2:
        raise TableError(
            f"{name} mixes decimal commas ({evidence[',']!r}) and decimal points ({evidence['.']!r}); use one of them "
            "for all its values"
        )
    signs = {match[0]: own.digits for own in reversed(texts) if (match := re.search("[.,]", own.digits))}
    if not signs:
        return "."
    if known := evidence or (file_evidence if len(file_evidence) == 1 else {}):
        return next(iter(known))
    sign, cell = next(iter(signs.items()))
    if len(signs) == 1 and not file_evidence:
        whole = [own.digits for own in texts if own.digits.isdigit()]
        if any(len(digits) > 3 for digits in whole):
            return sign
        if sign == separator == "," and any(re.search("[$£]", own.mark) for own in texts):
            return "."
        if whole and not (separator == "," and sign == "."):
            return "," if sign == "." else "."
    raise TableError(
        f"{name}: {cell!r} may have decimals or thousands separators; choose with --decimal . or --decimal ,"
    )


def parse(
    name: str, column: Column, decimal: str, missing: Sequence[str], rows: np.ndarray, remarks: list[str]
) -> pd.Series:
    """Return the numbers of a column, float64; NaN for missing values. Append remarks on how they were read.

    ``missing``: the cells of --missing. ``rows``: the row numbers of the file.

    Raises:
        TableError: a cell is not a number, or has another currency than the others; or a value such as -999 may stand
            for a missing value.
    """
    cells, parts = column.cells, dict(column.written)
    marks = Counter(own.mark for own in parts.values() if own.mark and own.mark not in column.units)
    mark = next((mark for mark, _ in marks.most_common(1)), "")
    if decimal == ",":  # a plain number such as 1.234 has a thousands separator
        parts |= {cell: own for cell in cells[column.values.notna()].unique() if (own := written(cell))}
    wrong = {
        cell for cell, own in parts.items() if decimal not in own.fits or own.mark not in ("", mark, *column.units)
    }
    if wrong := wrong | column.others:
        at = int(np.argmax(cells.isin(wrong)))
        text = str(cells.iloc[at])[:40]
        advice = f"use --missing {shlex.join([*missing, text])} to read such cells as missing"
        if unit := UNIT.fullmatch(text):
            advice = f"use --unit {shlex.join([*column.units, unit['unit']])} to leave out the unit, or {advice}"
        elif not column.share:
            advice = "write numbers instead of words, such as 1 for 'yes' and 0 for 'no'"
        unit_text = f" like those with {mark!r}" if mark else ""
        raise TableError(f"row {rows[at]}: {name} is {text!r}, not a number{unit_text}; {advice}")
    values = column.values
    if parts:
        values = cells.map({cell: own.value(decimal) for cell, own in parts.items()}).astype("float64").fillna(values)
    if mark:
        remarks.append(f"{name}: {mark!r} is left out of the values")
    values = values.mask(np.isinf(values))
    array = values.to_numpy()
    sentinel = next((own for own in SENTINELS if _stands_out(array[~np.isnan(array)], own)), None)
    if "none" not in missing and sentinel is not None:
        options = [f"--missing {shlex.join([*missing, text])}" for text in (f"{sentinel:g}", "none")]
        raise TableError(
            f"{name}: {sentinel:g} may be a value or stand for a missing value; use {options[0]}, or {options[1]} to "
            "read it as a value"
        )
    return values


def _stands_out(values: np.ndarray, sentinel: float) -> bool:
    """Return whether a value such as -999 occurs, and is far from all other values."""
    others = values[values != sentinel]
    if len(others) in (0, len(values)):
        return False
    spread = float(np.ptp(others)) or 1.0
    return bool(sentinel < others.min() - max(spread, 9) or sentinel > others.max() + 3 * spread)
