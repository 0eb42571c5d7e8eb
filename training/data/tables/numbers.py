"""Parse numbers as people write them: decimal and thousands separators, currencies, units, and missing values."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from numbers import Real
from typing import Any

import pandas as pd

# Spellings of a missing value, in lower case. Cells are converted to lower case before they are compared.
MISSING = {"", "-", "--", "---", "—", "–", "?", ".", "..", "...", "…", ":", "*", "/", "\\n", "no data", "no value"}
MISSING |= {
    "na",
    "n/a",
    "#n/a",
    "#na",
    "<na>",
    "n.a.",
    "k.a.",
    "k. a.",
    "n.v.",
    "n/v",
    "nd",
    "n.d.",
    "nan",
    "nat",
    "null",
}
MISSING |= {"(null)", "<null>", "none", "nil", "missing", "(missing)", "(blank)", "blank", "(leer)", "unknown", "tbd"}
MISSING |= {"#value!", "#ref!", "#div/0!", "#null!", "#num!", "#name?", "#wert!", "#bezug!", "#nv"}
CODES = "USD|EUR|GBP|JPY|CHF|CAD|AUD|NZD|SEK|NOK|DKK|PLN|CZK|HUF|CNY|RMB|INR|BRL|MXN|ZAR|KRW|SGD|HKD|TRY|RUB"
CURRENCY = rf"(?:(?:US|A|C|R|NZ|HK|S)?\$|[€£¥₹₩₽₺]|Rs\.?|kr\.?|zł|{CODES})"
UNIT = r"(?:%|‰|°\s?[CFK]?|[A-Za-zµμΩ][A-Za-zµμΩ²³°.]{0,11}[23]?(?:/[A-Za-zµμ²³°]{1,8}[23]?)?)"
GROUPS = r"\d[\d.,'’`\s]*"
NUMBER = re.compile(
    rf"(?P<prefix0>{CURRENCY})?\s*(?P<open>\()?\s*(?P<sign>[-+−–])?\s*(?P<prefix>{CURRENCY})?\s*(?P<sign2>[-+−–])?\s*"
    rf"(?P<digits>{GROUPS}|[.,]\d+)(?P<exponent>[eE][-+]?\d{{1,3}})?(?P<mark>[*†‡])?"
    rf"(?P<gap>\s*)(?P<suffix>{CURRENCY}|{UNIT})?\s*(?P<minus>[-−])?(?P<close>\))?(?P<mark2>[*†‡])?"
)
FACTORS = {"k": 1e3, "tsd": 1e3, "tsd.": 1e3, "m": 1e6, "mio": 1e6, "mio.": 1e6, "mn": 1e6, "million": 1e6}
FLAGS = {
    "b",
    "bp",
    "c",
    "d",
    "e",
    "ep",
    "f",
    "i",
    "n",
    "p",
    "r",
    "s",
    "u",
    "z",
}  # marks after numbers in tables of Eurostat, such as "e" for estimated and "p" for provisional
FACTORS |= {"b": 1e9, "bn": 1e9, "mrd": 1e9, "mrd.": 1e9, "billion": 1e9}
INDIAN = re.compile(r"[1-9]\d?(,\d\d)+,\d{3}(\.\d*)?")


@dataclass(frozen=True)
class Written:
    """The parts of a number as written: sign, digits with separators, exponent, currency and unit.

    ``attached``: whether the unit follows the digits without a space.
    """

    negative: bool
    digits: str
    exponent: str
    currency: str
    unit: str
    attached: bool


def is_missing(cell: Any) -> bool:
    """Return whether a cell is empty, not finite, or a usual spelling of a missing value, such as n/a."""
    if cell is None or cell is pd.NaT or cell is pd.NA:
        return True
    if isinstance(cell, str):
        return cell.strip().lower() in MISSING
    return isinstance(cell, float) and not math.isfinite(cell)


def is_typed(cell: Any) -> bool:
    """Return whether a cell is a number from Excel or Parquet, not a text. Booleans do not count as numbers."""
    return isinstance(cell, (Real, Decimal)) and not isinstance(cell, bool)


def is_plain(text: Any) -> bool:
    """Return whether a cell is a text that Python's ``float`` reads as a finite number."""
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False


def is_number(cell: Any) -> bool:
    """Return whether a cell is a number, or a text that spells a number."""
    if isinstance(cell, str):
        written = _written(cell)
        return written is not None and _either(written.digits)
    return is_typed(cell)


@cache
def _written(cell: str) -> Written | None:
    """Split a number into its parts; return None if the cell is not a number."""
    match = NUMBER.fullmatch(cell.strip().replace("\xa0", " ").replace("\u202f", " ").replace("\u2009", " "))
    if match is None or bool(match["open"]) != bool(match["close"]):
        return None
    signs = [sign for sign in (match["sign"], match["sign2"], match["minus"], match["open"]) if sign]
    suffix = match["suffix"] or ""
    attached = not (match["gap"] or match["digits"][-1].isspace())
    if len(signs) > 1 or suffix.lower() in {"am", "pm", "a.m.", "p.m.", "st", "nd", "rd", "th"}:
        return None
    if suffix.lower() == "e" and attached:  # an exponent without digits, such as 5e
        return None
    digits = re.sub(r"(?<=\d)['’`\s](?=\d{3}(?!\d))", "\u2009", match["digits"].strip())
    if re.search(r"[\s'’`]", digits.replace("\u2009", "")) or (
        (match["prefix"] or match["prefix0"]) and re.fullmatch(CURRENCY, suffix)
    ):
        return None
    currency = match["prefix"] or match["prefix0"] or (suffix if re.fullmatch(CURRENCY, suffix) else "")
    unit = "" if suffix == currency else suffix
    return Written(
        bool(signs) and signs[0] != "+",
        digits,
        match["exponent"] or "",
        currency,
        unit,
        bool(unit) and attached,
    )


@cache
def _digits(decimal: str, groups: str) -> re.Pattern[str]:
    return re.compile(rf"(?:[1-9]\d{{0,2}}(?:{re.escape(groups)}\d{{3}})+|\d+)?(?:{re.escape(decimal)}\d*)?")


def _parse(digits: str, decimal: str, exponent: str = "") -> float | None:
    """Return the value of digits with separators, or None if they do not fit the decimal separator."""
    thousands = "." if decimal == "," else ","
    groups = "\u2009" if "\u2009" in digits else thousands
    if not (_digits(decimal, groups).fullmatch(digits) or (decimal == "." and INDIAN.fullmatch(digits))):
        return None
    try:
        number = float(digits.replace(groups, "").replace(thousands, "").replace(decimal, ".") + exponent)
    except ValueError:  # there are only separators, and no digits
        return None
    return number if math.isfinite(number) else None


@cache
def _either(digits: str) -> bool:
    return _parse(digits, ".") is not None or _parse(digits, ",") is not None


def decimal_evidence(cells: Iterable[Any]) -> dict[str, str]:
    """Return, for each decimal separator (``.`` or ``,``), a cell that is a number only with this sign.

    Signs without such a cell are omitted.
    """
    evidence: dict[str, str] = {}
    for cell in cells:
        if isinstance(cell, str) and (written := _written(cell)) and re.search("[.,]", written.digits):
            fits = [sign for sign in ".," if _parse(written.digits, sign) is not None]
            if len(fits) == 1:
                evidence.setdefault(fits[0], cell)
    return evidence


def share(cells: pd.Series) -> float:
    """Return the share of numbers among the cells that are not missing; 0 if all are missing."""
    known = [cell for cell in cells if not is_missing(cell)]
    return sum(map(is_number, known)) / len(known) if known else 0.0


def decimal_sign(name: str, cells: Sequence[str], delimiter: str, file_evidence: dict[str, str]) -> str:
    """Return the decimal separator of a column, "." or ",". For a column without points and commas, return ".".

    The following rules are tried in this order:

    1. If a cell of the column, such as 1.234,5, is a number with only one of the two signs, this sign is returned.
    2. If other columns have such cells, and these agree on a sign, this sign is returned.
    3. If no column has such a cell, but this column has a whole number of more than three digits, such as 1234,
       thousands are not separated. So a separator is a decimal separator.
    4. In a file whose cells are separated by spaces, a point is a decimal separator.
    5. If the column has whole numbers, but none has more than three digits, a separator separates thousands. This rule
       does not hold for points in a file whose cells are separated by commas, because such points are rarely thousands
       separators.

    In all other cases, the sign is ambiguous.

    Raises:
        ValueError: the sign is ambiguous, or the cells contradict each other.
    """
    evidence = decimal_evidence(cells)
    if len(evidence) == 2:
        raise ValueError(
            f"{name} mixes decimal commas ({evidence[',']!r}) and decimal points ({evidence['.']!r}); use one of them "
            "for all its values"
        )
    if evidence:
        return next(iter(evidence))
    digits = [written.digits for cell in cells if (written := _written(cell))]
    unclear = {match[0] for text in digits if (match := re.search("[.,]", text))}
    if not unclear:
        return "."
    if len(file_evidence) == 1:
        return next(iter(file_evidence))
    if len(unclear) == 1 and not file_evidence:
        (sign,) = unclear
        if any(text.isdigit() and len(text) > 3 for text in digits) or (delimiter in (" ", "  ") and sign == "."):
            return sign
        if any(text.isdigit() for text in digits) and not (delimiter == "," and sign == "."):
            return "," if sign == "." else "."
    cell = next(cell for cell in cells if re.search("[.,]", cell))
    raise ValueError(
        f"{name}: {cell!r} may have decimals or thousands separators; choose with --decimal . or --decimal ,"
    )


def missing_option(missing: Sequence[str], cell: str) -> str:
    """Return the option --missing with the cells that the user has given, and one more cell."""
    return f"--missing {shlex.join([*missing, cell])}"


def parse(name: str, cells: pd.Series, decimal: str, remarks: list[str], missing: Sequence[str] = ()) -> pd.Series:
    """Return the numbers of a column, float64; NaN for missing values. Append remarks on how they were read.

    ``missing``: the cells of --missing, for the message of an error. They are already missing in ``cells``.

    Raises:
        ValueError: a cell is not a number, or units are mixed.
    """
    unique: dict[Any, Written | float] = {}
    for row, cell in cells.items():
        if is_missing(cell) or cell in unique:
            continue
        parts = _written(cell) if isinstance(cell, str) else None
        if parts is not None and _parse(parts.digits, decimal, parts.exponent) is not None:
            unique[cell] = parts
        elif is_typed(cell):
            unique[cell] = float(cell)
        else:
            text = str(cell)[:40]
            advice = f"use {missing_option(missing, text)} to read such cells as missing"
            if text.lower() in ("true", "false"):
                advice = "write 1 for 'True' and 0 for 'False'"
            elif not share(cells):
                advice = "write numbers instead of words, such as 1 for 'yes' and 0 for 'no'"
            raise ValueError(f"row {row}: {name} is {text!r}, not a number; {advice}")
    written = {cell: parts for cell, parts in unique.items() if isinstance(parts, Written)}
    factors = _factors(name, written, remarks)
    values = {cell: parts for cell, parts in unique.items() if isinstance(parts, float)}
    for cell, parts in written.items():
        number = (_parse(parts.digits, decimal, parts.exponent) or 0.0) * factors.get(parts.unit, 1.0)
        values[cell] = -number if parts.negative else number
    return cells.map(lambda cell: math.nan if is_missing(cell) else values[cell]).astype("float64")


def _factors(name: str, written: dict[Any, Written], remarks: list[str]) -> dict[str, float]:
    """Return the factors of units such as million; append remarks. Raises ValueError if units are mixed or unclear."""
    flags = {parts.unit for parts in written.values() if parts.unit in FLAGS and not parts.attached}
    if flags and any(not parts.unit for parts in written.values()):
        written = {cell: replace(parts, unit="") if parts.unit in flags else parts for cell, parts in written.items()}
        remarks.append(f"{name}: the marks {', '.join(sorted(flags))} after numbers are left out")
    currencies = list(dict.fromkeys(parts.currency for parts in written.values() if parts.currency))
    units = list(dict.fromkeys(parts.unit for parts in written.values() if parts.unit))
    unmarked = [cell for cell, parts in written.items() if not parts.unit and _parse(parts.digits, ".") != 0]
    factors = {unit: FACTORS[unit.lower()] for unit in units if unit.lower() in FACTORS}
    if len(currencies) > 1:
        raise ValueError(f"{name} has several currencies: {', '.join(currencies)}; use one currency per column")
    if len(units) > 1 and len(factors) < len(units):
        raise ValueError(f"{name} has several units: {', '.join(units)}; use one unit per column")
    if currencies:
        remarks.append(f"{name}: the currency {currencies[0]!r} is left out of the values")
    if factors and len(factors) == len(units):
        attached = all(parts.attached for parts in written.values() if parts.unit)
        single = [unit for unit in units if len(unit) == 1]
        if single and not currencies and (not attached or (len(units) == 1 and not unmarked)):
            raise ValueError(f"{name}: {single[0]!r} after a number may be a unit or a factor; write plain numbers")
        remarks.append(f"{name}: {', '.join(f'{unit} is read as {factor:,.0f}' for unit, factor in factors.items())}")
        return factors
    if units and unmarked:
        raise ValueError(
            f"{name}: some values have the unit {units[0]!r}, but {unmarked[0]!r} has no unit; give all the same unit"
        )
    if units:
        remarks.append(f"{name}: the unit {units[0]!r} is left out of the values")
    return {}
