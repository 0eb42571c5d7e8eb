"""Files as users have them. Each file is read correctly, or rejected with a message that names the missing option."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import zipfile
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pandas as pd
import pytest
from support.tables.random_files import write_random_file

from training import lstm
from training.data.datasets import DataError
from training.data.tables import Table, TableOptions, describe, read_table

NAN = None
V = [float(10 + (i * i) % 17) for i in range(400)]  # neighbours differ, and the values are in no order
DAYS = [date(2024, 1, 1) + timedelta(days=i) for i in range(400)]
MONTHS = [date(2021 + i // 12, i % 12 + 1, 1) for i in range(60)]
HOURS = [datetime(2024, 3, 30) + timedelta(hours=i) for i in range(72)]
EN = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def lines(*rows: Any, sep: str = ",", end: str = "\n") -> bytes:
    return "".join(sep.join(str(cell) for cell in row) + end if isinstance(row, (list, tuple)) else str(row) + end
                   for row in rows).encode()  # fmt: skip


def table(header: str, stamps: Sequence[Any], values: Sequence[Any] = V, sep: str = ",") -> bytes:
    return lines(header, *([stamp, value] for stamp, value in zip(stamps, values, strict=False)), sep=sep)


def series(
    start: str, step: str, values: Sequence[float | None], name: str | None = None
) -> dict[str, tuple[str, str, list[float | None]]]:
    return {name or "y": (start, step, list(values))}


def excel(**sheets: Sequence[Sequence[Any]]) -> bytes:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(list(row))
    output = io.BytesIO()
    book.save(output)
    return output.getvalue()


def parquet(frame: pd.DataFrame) -> bytes:
    output = io.BytesIO()
    frame.to_parquet(output)
    return output.getvalue()


def zipped(content: bytes) -> bytes:
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", content)
    return output.getvalue()


def damaged(content: bytes, at: int) -> bytes:
    """Return compressed data whose first byte, at position ``at``, starts no valid block."""
    return content[:at] + b"\xff" + content[at + 1 :]


def with_empty_formulas(content: bytes) -> bytes:
    """Return an Excel file in which the stored result of each formula is an empty text."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(output, "w") as archive:
        for name in source.namelist():
            part = source.read(name)
            archive.writestr(name, re.sub(rb'<c r="(\w+)"[^>]*><f>', rb'<c r="\1" t="str"><f>', part))
    return output.getvalue()


def cases() -> dict[str, tuple[str, bytes, dict[str, Any], Any]]:
    """Return for each case its suffix, content, options, and the expected series or a part of the error message."""
    d40, v40 = DAYS[:40], V[:40]
    dated = [*zip(d40, v40, strict=True)]
    day = series("2024-01-01", "day", v40)
    month = series("2021-01-01", "month", V[:36])
    hour = series("2024-01-01T00:00:00", "hour", v40)
    hours = [datetime(2024, 1, 1) + timedelta(hours=i) for i in range(40)]
    two = {**series("2024-01-01", "day", v40, "a"), **series("2024-01-01", "day", [v + 1 for v in v40], "b")}
    grouped = [(d, g, V[i] + k) for i, d in enumerate(d40) for k, g in enumerate("ab")]
    stores = [(d, s, t, V[i] + 10 * s + t) for i, d in enumerate(d40) for s in (1, 2) for t in (1, 2, 3)]
    by_store = {f"{s} {t}": ("2024-01-01", "day", [v + 10 * s + t for v in v40]) for s in (1, 2) for t in (1, 2, 3)}
    quarters = [f"{2020 + i // 4} Q{i % 4 + 1}" for i in range(14)]
    weeks = [(date(2024, 1, 1) + timedelta(weeks=i)).isocalendar() for i in range(60)]
    month12 = series("2021-01-01", "month", V[:12])
    c: dict[str, tuple[str, bytes, dict[str, Any], Any]] = {}

    def add(name: str, content: bytes, expected: Any, suffix: str = "csv", **options: Any) -> None:
        c[name] = (suffix, content, options, expected)

    # dates
    add("month names, newest first", table("d,y", [f"{x:%d-%b-%y}" for x in d40][::-1], v40[::-1]), day)
    add("English dates in quotes", table("d,y", [f'"{x:%b %d, %Y}"' for x in d40]), day)
    german = [f"{x.day}. {('Januar', 'Februar', 'März', 'April')[x.month - 1]} {x.year}" for x in DAYS[:100]]
    add("German month names", table("Datum;y", german, sep=";"), series("2", "step", V[:100]))
    add("weekday before the date", table("d,y", [f"{x:%a %d.%m.%Y}" for x in d40]), day)
    add("day first", table("d,y", [f"{x:%d/%m/%Y}" for x in d40]), day)
    add("month first", table("d,y", [f"{x:%m/%d/%y}" for x in d40]), day)
    add("day or month first, monthly", table("d,y", [f"{x:%d/%m/%Y}" for x in MONTHS[:36]]), month)
    add("day or month first, one year", table("d,y", [f"{x:%d/%m/%Y}" for x in MONTHS[:12]]),
        r"ambiguous: %d/%m/%Y, %m/%d/%Y; choose --format %d/%m/%Y or --format %m/%d/%Y")  # fmt: skip
    add("day first by format", table("d,y", [f"{x:%d/%m/%Y}" for x in MONTHS[:12]]), series("2021-01-01", "month", V[:12]),
        format="%d/%m/%Y")  # fmt: skip
    add("two-digit years, any order", table("d,y", [f"{i:02}/01/{i:02}" for i in range(1, 13)]), "is ambiguous")
    add("dots and two-digit years", table("Datum;y", [f"{x:%d.%m.%y}" for x in d40], sep=";"), day)
    add("days without a year", table("d,y", [f"{x:%d-%b}" for x in d40]), "give their format")
    add("Jan-21", table("m,y", [f"{x:%b-%y}" for x in MONTHS[:36]]), month)
    add("21-Jan of one year", table("m,y", [f"{x:%y-%b}" for x in MONTHS[:12]]), month12)
    add("months", table("m,y", [f"{x:%Y-%m}" for x in MONTHS[:36]]), month)
    add("months after a point", table("when;y", [f"{x:%Y.%m}" for x in MONTHS[:36]], sep=";"), month)
    add("months as numbers", table("month,y", [f"{x:%Y%m}" for x in MONTHS[:36]]), month)
    add("12/2021", table("Period;y", [f"{x:%m/%Y}" for x in MONTHS[:36]], sep=";"), month)
    add("quarters", table("q,y", quarters), series("2020-01-01", "quarter", V[:14]))
    add(
        "Q1 2020 and 1Q20",
        table("q,y", [f"Q{q[-1]} {q[:4]}" for q in quarters]),
        series("2020-01-01", "quarter", V[:14]),
    )
    add("ISO weeks", table("w,y", [f"{w.year}-W{w.week:02}" for w in weeks]), series("2024-01-01", "week", V[:60]))
    add("KW", table("KW;y", [f"KW {w.week}/{w.year}" for w in weeks], sep=";"), series("2024-01-01", "week", V[:60]))
    add("years and weeks in two columns", lines("year,week,y", *([w.year, w.week, V[i]] for i, w in enumerate(weeks))),
        series("2", "step", V[:60]))  # fmt: skip
    add("years", table("Year,y", range(1980, 2020)), series("1980-01-01", "year", v40))
    add("year and month in two columns", lines("Year,Month,y", *([x.year, x.month, V[i]] for i, x in enumerate(MONTHS[:36]))),
        month)  # fmt: skip
    add(
        "months without years",
        lines("month,y", *([x.month, V[i]] for i, x in enumerate(MONTHS[:36]))),
        "all columns of the time, such as --time Year,Month",
    )
    add("date and hour in two columns", lines("Date,Hour,y", *([x.date(), x.hour, v] for x, v in zip(hours, v40, strict=True))),
        hour)  # fmt: skip
    add("date and time in two columns", lines("Date;Time;y", *([f"{x:%d.%m.%Y}", f"{x:%H:%M}", v] for x, v in
                                                               zip(hours, v40, strict=True)), sep=";"), hour)  # fmt: skip
    add("12-hour clock", table("t,y", [f"{x:%m/%d/%Y %I:%M:%S %p}" for x in HOURS[:40]]),
        series("2024-03-30T00:00:00", "hour", v40))  # fmt: skip
    add(
        "seconds since 1970",
        table("timestamp,y", [int((x - datetime(1970, 1, 1)).total_seconds()) for x in hours]),
        hour,
    )
    add(
        "milliseconds since 1970",
        table("ts,y", [int((x - datetime(1970, 1, 1)).total_seconds() * 1000) for x in hours]),
        hour,
    )
    add("Excel dates as numbers", table("Date,y", [45292 + i for i in range(40)]), day)
    add("eight digits under a date", table("date,y", [f"{x:%Y%m%d}" for x in d40]), day)
    add("eight digits under another name", lines("ref,y", *([f"{x:%Y%m%d}", V[i]] for i, x in enumerate(d40))),
        "column 'ref' may hold time stamps .* or values; use --time ref")  # fmt: skip
    add("amounts like dates", lines("date,amount", *([d, 20240105 + i] for i, d in enumerate(d40))),
        series("2024-01-01", "day", [20240105.0 + i for i in range(40)], "amount"))  # fmt: skip
    add("values like years", lines("x,y", *([1700 + i * i % 300, V[i]] for i in range(40))),
        {"x": ("2", "step", [1700.0 + i * i % 300 for i in range(40)]), "y": ("2", "step", v40)})  # fmt: skip
    add(
        "values that count like years",
        lines("x,y", *([1700 + i, V[i]] for i in range(40))),
        "column 'x' may hold time stamps",
    )
    zoned = [pd.Timestamp("2024-03-30", tz="Europe/Berlin") + pd.Timedelta(hours=i) for i in range(60)]
    add("time zone through a clock change", table("t,y", [x.isoformat() for x in zoned]),
        series("2024-03-29T23:00:00", "hour", V[:60]))  # fmt: skip
    midnights = [pd.Timestamp(x, tz="Europe/Berlin") for x in DAYS[60:120]]
    add("local midnights through a clock change", table("t,y", [x.isoformat() for x in midnights]),
        series("2024-03-01", "day", V[:60]))  # fmt: skip
    add("nanoseconds and a zone, by format", table("t,y", [f"{x:%d.%m.%Y %H:%M:%S}.000000000 -0530" for x in HOURS[:40]]),
        series("2024-03-30T05:30:00", "hour", v40), format="%d.%m.%Y %H:%M:%S.%f %z")  # fmt: skip
    add("UTC by format", table("t,y", [*(f"{x:%Y-%m-%d %H:%M}Z" for x in HOURS[:40])]),
        series("2024-03-30T00:00:00", "hour", v40), format="%Y-%m-%d %H:%M%z")  # fmt: skip
    add("clock change without zone", table("t,y", [(pd.Timestamp("2024-10-26 22:00", tz="UTC") + pd.Timedelta(hours=i))
        .tz_convert("Europe/Berlin").strftime("%Y-%m-%d %H:%M") for i in range(40)]),
        r"same time stamp 2024-10-27 02:00:00; use --aggregate sum, mean or last")  # fmt: skip
    add(
        "mixed dates",
        table("d,y", [f"{x:%Y-%m-%d}" if i % 2 else "soon" for i, x in enumerate(d40)]),
        "row 2: 'soon' in column 'd' is no time stamp",
    )
    # numbers
    add("semicolons and decimal commas", table("d;y", d40, [f"{v + 0.5:.2f}".replace(".", ",") for v in v40], sep=";"),
        series("2024-01-01", "day", [v + 0.5 for v in v40]))  # fmt: skip
    add(
        "unquoted decimal commas",
        table("d,y", d40, [f"{v + 0.5:.1f}".replace(".", ",") for v in v40]),
        "save the file with semicol",
    )
    add("dollars and parentheses", table("d,y", d40, [f'"(${v:,.2f})"' if i % 5 == 0 else f'"${1000 + v:,.2f}"'
        for i, v in enumerate(v40)]),
        series("2024-01-01", "day", [-v if i % 5 == 0 else 1000 + v for i, v in enumerate(v40)]))  # fmt: skip
    add("euros, thousands with spaces", table("d;y", d40, [f"1 {100 + int(v)},50 €" for v in v40], sep=";"),
        series("2024-01-01", "day", [1100.5 + v for v in v40]))  # fmt: skip
    add("Swiss thousands", table("d,y", d40, [f"1'{100 + int(v)}.5" for v in v40]),
        series("2024-01-01", "day", [1100.5 + v for v in v40]))  # fmt: skip
    add("per cent", table("d,y", d40, [f"{v}%" for v in v40]), day)
    add(
        "units", table("d,y", d40, [f"{v} kWh" for v in v40]), "y is '10.0 kWh', not a number; write numbers .* without"
    )
    add("units beside zeros and ones", lines("d,y,promo", *([x, f"{v} kWh", i % 2] for i, (x, v) in enumerate(dated))), "y is '10.0 kWh', not a number; write numbers .* without")  # fmt: skip
    add("the mark p", table("d,y", d40, [f"{v} p" if i == 7 else v for i, v in enumerate(v40)]),
        series("2024-01-01", "day", [NAN if i == 7 else v for i, v in enumerate(v40)]), missing=[f"{v40[7]} p"])  # fmt: skip
    add("an exponent without digits", table("d,y", d40, [*map(str, v40[1:]), "5e"]), "row 41: y is '5e', not a number")
    add("K and M", table("d,y", d40, [f"{v}K" if i % 2 else f"{v}M" for i, v in enumerate(v40)]),
        "'10.0M', not a number; write numbers .* without units")  # fmt: skip
    for sep, expected in ((",", series("2024-01-01", "day", [7000 + v for v in v40])), ("\t", "--decimal")):
        add(
            f"dollars with thousands, separated by {sep!r}",
            table(f"d{sep}y", d40, [f'"${7000 + v:,.0f}"' for v in v40], sep),
            expected,
        )
    add("trailing and Unicode minus", table("d,y", d40, [f"{v}-" if i % 2 else f"−{v}" for i, v in enumerate(v40)]),
        series("2024-01-01", "day", [-v for v in v40]))  # fmt: skip
    add("missing values", table("d,y", d40, [("NA", "-", "null", ".", "", "n/a", "#N/A", "..")[i // 4] if i % 4 == 1 and i < 32
        else v for i, v in enumerate(v40)]),
        series("2024-01-01", "day", [NAN if i % 4 == 1 and i < 32 else v for i, v in enumerate(v40)]))  # fmt: skip
    add("-999", table("d,y", d40, [-999 if i == 7 else v for i, v in enumerate(v40)]), "use --missing -999")
    closed = table("d,y", d40, [{7: -999, 9: "closed for repair"}.get(i, v) for i, v in enumerate(v40)])
    known = [NAN if i == 9 else v for i, v in enumerate(v40)]
    for number, (missing, expected) in enumerate((
        ([], "not a number; use --missing 'closed for repair' to read"),
        (["-999"], "not a number; use --missing -999 'closed for repair' to read"),
        (["closed for repair"], "use --missing 'closed for repair' -999, or --missing 'closed for repair' none to read"),
        (["closed for repair", "-999"], series("2024-01-01", "day", [NAN if i == 7 else v for i, v in enumerate(known)])),
        (["closed for repair", "none"], series("2024-01-01", "day", [-999 if i == 7 else v for i, v in enumerate(known)])),
    )):  # fmt: skip
        add(f"-999 and closed, {number}", closed, expected, missing=missing)
    add("mostly closed", lines("d,a,b", *([x, v if i > 29 else "closed", v] for i, (x, v) in enumerate(dated))),
        {**series("2024-01-31", "day", v40[30:], "a"), **series("2024-01-01", "day", v40, "b")}, missing=["closed"])  # fmt: skip
    add("closed as the name of a series", lines("d,g,y", *([d, "closed" if g == "b" else g, y] for d, g, y in grouped)),
        {"a": day["y"], "closed": two["b"]}, missing=["closed"], group="g")  # fmt: skip
    add("words of a known covariate", lines("d,y,promo", *([x, v, "" if i % 9 == 4 else "no" if i % 7 else "yes"] for i, (x, v) in
        enumerate(dated))), series("2024-01-01", "day", v40, "y"), known_covariates="promo")  # fmt: skip
    add(
        "partly text",
        table("d,y", d40, ["closed" if i % 3 else v for i, v in enumerate(v40)]),
        "row 3: y is 'closed', not a number; use --missing closed to read such cells as missing; or name the columns",
    )
    # files
    add(
        "cp1252",
        table("Datum;Größe", d40, sep=";").decode().encode("cp1252"),
        series("2024-01-01", "day", v40, "Größe"),
    )
    add(
        "cp1251",
        table("Дата;Продажи", d40, sep=";").decode().encode("cp1251"),
        "give its encoding, for example --encoding cp12",
    )
    add("cp1251 by option", table("Дата;Продажи", d40, sep=";").decode().encode("cp1251"),
        series("2024-01-01", "day", v40, "Продажи"), encoding="cp1251")  # fmt: skip
    add("UTF-16", table("d\ty", d40, sep="\t").decode().encode("utf-16"), day)
    add("UTF-8 with a mark, Windows lines", b"\xef\xbb\xbf" + lines("d,y", *dated, end="\r\n"), day)
    add("gzip", gzip.compress(table("d,y", d40)), day, "csv.gz")
    add("Parquet", parquet(pd.DataFrame({"d": pd.to_datetime(d40), "y": v40})), day, "parquet")
    add(
        "Parquet with an index",
        parquet(pd.DataFrame({"y": v40}, index=pd.DatetimeIndex(d40, name="d"))),
        day,
        "parquet",
    )
    frame = pd.DataFrame({"d": pd.to_datetime(d40), "y": v40})
    kept = [i + i // 5 for i in range(40)]  # the row numbers of a filtered table
    add("Parquet, a sorted table", parquet(frame.set_index(pd.Index(kept[20:] + kept[:20]))), day, "parquet")
    add("Parquet, an index of two levels", parquet(frame.assign(shop="a").set_index(["shop", "d"])), day, "parquet")
    years = pd.RangeIndex(1980, 2020, name="year")
    add(
        "Parquet, an index of years",
        parquet(frame[["y"]].set_index(years)),
        series("1980-01-01", "year", v40),
        "parquet",
    )
    add("Parquet, a column of lists", parquet(frame.assign(tags=[["a"]] * 40)), day, "parquet")
    add("damaged gzip", damaged(gzip.compress(table("d,y", d40)), 10), "is damaged or encrypted", "csv.gz")
    add("zip", zipped(table("d,y", d40)), day, "zip")
    add("damaged zip", damaged(zipped(table("d,y", d40)), 35), "is damaged or encrypted", "zip")
    add("HTML", b"<html>\n<table></table></html>", "is HTML or XML; save the table as CSV", "html")
    add("names in angle brackets", lines("<TICKER>,<PER>,<DATE>,<CLOSE>", *(["SBER", "D", f"{x:%Y%m%d}", v] for x, v in
        dated)), series("2024-01-01", "day", v40, "<CLOSE>"))  # fmt: skip
    add(
        "names in angle brackets, tabs",
        table("<DATE>\t<CLOSE>", d40, sep="\t"),
        series("2024-01-01", "day", v40, "<CLOSE>"),
    )
    add("spaces", lines("d      y", *(f"{x}  {v}" for x, v in dated)), day, "txt")
    add("sep=;", b"sep=;\n" + table("d;y", d40, sep=";"), day)
    add("JSON", b'[{"d": "2024-01-01", "y": 3}]', "is JSON; save the table as CSV", "json")
    add("old Excel", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 9, "save it as .xlsx", "xls")
    # headers
    add("lines before the header", lines("Sales report", "Generated:,2024-05-01", "", "d,y", *dated,
        "", "Source: the shop"), day)  # fmt: skip
    add("comments", lines("# station 7", "# unit: mm", "d,y", *dated), day)
    add(
        "comments with numbers",
        lines("#1 station", "# 7,5", "#2024 data, in mm", "d,y", *dated, "#2024-02-10,7", "#3.5,7"),
        day,
    )
    for name, mark in (("", ""), (" in quotes", '"')):
        orders = [f"{mark}#{1001 + i}{mark},{x} 10:00,{v}" for i, (x, v) in enumerate(dated)]
        add(f"numbers of orders{name}", lines("Name,Created at,Total", *orders),
            series("2024-01-01T10:00:00", "day", v40, "Total"))  # fmt: skip
    add(
        "a commented year",
        lines("year,value", *(f"{1960 + i},{v}" if i != 20 else f"#1980,{v}" for i, v in enumerate(v40))),
        series("1960-01-01", "year", [v if i != 20 else None for i, v in enumerate(v40)], "value"),
    )
    add(
        "commented header",
        lines("# station 7", "# d y", *(f"{x} {v}" for x, v in dated)),
        series("2024-01-01", "day", v40, "column 2"),
        "txt",
    )
    add("two header rows", lines(",North,,South,", "Date,Sold,Lost,Sold,Lost", *([x, V[i], i, V[i] + 1, 2 * i] for i, x in
        enumerate(d40))), "write the names of several rows into one row", header=2)  # fmt: skip
    add(
        "units below the header",
        lines("d,y", ",mm", *dated),
        day,
    )
    add("no header", lines(*dated), series("2024-01-01", "day", v40, "column 2"))
    add("totals at the end", lines("Monat;Umsatz", *([f"{x:%m.%Y}", V[i]] for i, x in enumerate(MONTHS[:36])), "Summe;9999", sep=";"),
        series("2021-01-01", "month", V[:36], "Umsatz"))  # fmt: skip
    add(
        "repeated header",
        lines("d,y", *zip(d40[:20], v40[:20], strict=True), "d,y", *zip(d40[20:], v40[20:], strict=True)),
        day,
    )
    add(
        "the same name twice",
        lines("d,y,y", *([x, v, v] for x, v in dated)),
        "column names must be unique",
    )
    add("row numbers, codes and flags", lines(",order_id,d,y,open,plz", *([i, 7000 + 3 * i, x, v, "True", "01234"] for i, (x, v)
        in enumerate(dated))), day)  # fmt: skip
    add("parts of the date", lines("d,year,month,weekday,y", *([x, x.year, x.month, x.weekday(), v] for x, v in
        dated)), day)  # fmt: skip
    add("a constant and a text", lines("d,y,c,note", *([x, v, 5, "ok"] for x, v in dated)),
        {**day, "c": ("2024-01-01", "day", [5.0] * 40)})  # fmt: skip
    add("two dates", lines("ordered,shipped,y", *([x, x + timedelta(days=i % 4), V[i]] for i, x in enumerate(d40))),
        "choose one: --time ordered or --time shipped")  # fmt: skip
    add("row numbers of a filtered table", lines(",y", *zip(kept, v40, strict=True)), series("2", "step", v40))
    gap = [NAN if i == 5 else v for i, v in enumerate(v40)]
    pairs = [f"{v},{v + 1}" for v in v40]
    expected = {"a": ("2", "step", gap), "b": ("2", "step", [v and v + 1 for v in gap])}
    add("a row of missing values", lines("a,b", *pairs[:5], "NA,NA", *pairs[6:]), expected)
    add("a row of empty cells", lines("a,b", *pairs[:5], ",", *pairs[6:], ",", "Source: B,"), expected)
    sheet = [["a", "b"], *([v and v + k for k in (0, 1)] for v in gap)]
    add("a row of empty cells, Excel", excel(Sheet=sheet), expected, "xlsx")
    split = [*v40[:5], NAN, *v40[5:]]
    for name, stamps, expected in (("dates", d40, day), ("row numbers", range(1, 41), series("2", "step", split))):
        rows = [f"{stamp},{v}" for stamp, v in zip(stamps, v40, strict=True)]
        add(f"a row of empty cells between {name}", lines(",y", *rows[:5], ",", *rows[5:]), expected)
    add(
        "a row of missing values, dates across",
        lines(["item", *d40], ["a", *v40], ["NA"] * 41, ["b", *(v + 1 for v in v40)]),
        two,
    )
    add("an empty cell in one column", lines("y", *('""' if v is None else v for v in gap)), series("2", "step", gap))
    add("an empty cell in one column, Parquet", parquet(pd.DataFrame({"y": gap})), series("2", "step", gap), "parquet")
    add("an empty line in one column", lines("y", *v40[:5], "", *v40[5:], "", '""'), series("2", "step", v40))
    # layouts
    add("wide", lines("d,a,b", *([x, v, v + 1] for x, v in dated)), two)
    add("one group column", lines("d,shop,sold", *grouped), two)
    quoted = lines('d,"shop, city",item,sold', *(f'{d},"{s}, x",{t},{v}' for d, s, t, v in stores))
    by_name = {f"{s}, x {t}": ("2024-01-01", "day", [v + 10 * s + t for v in v40]) for s in (1, 2) for t in (1, 2, 3)}
    add("a comma in the name of a group column", quoted, by_name, group="shop, city,item")
    add("a comma in the name of the only group column", quoted, "rows 2 and 3", group="shop, city")
    swapped = [(d, "ab"[k], "xy"[(k + i) % 2], V[i] + k) for i, d in enumerate(d40) for k in (0, 1)]
    add("two columns that can name the series", lines('d,"shop, city",region,y', *swapped),
        "use --group 'shop, city' or --group region")  # fmt: skip
    add("two group columns of numbers", lines("date,store,item,sales", *stores), by_store)
    add("code and name of each group", lines("d,code,country,y", *([d, g.upper(), g, v] for d, g, v in grouped)),
        {name.upper(): own for name, own in two.items()})  # fmt: skip
    add("transactions, summed", lines("date,product,amount", *([d40[i // 3], "pq"[i % 2], V[i]] for i in range(120))),
        series("2024-01-01", "day", [sum(V[3 * i : 3 * i + 3]) for i in range(40)], "amount"), aggregate="sum")  # fmt: skip
    add("duplicate dates", table("d,y", [*d40, d40[-1]]), "rows 41 and 42 have the same time stamp .* use --aggregate")
    add("years across the columns", lines("Country,Code," + ",".join(map(str, range(1990, 2020))), ["Aland", "AL", *V[:30]],
        ["Bland", "BL", *V[30:60]]), {"Aland": ("1990-01-01", "year", V[:30]), "Bland": ("1990-01-01", "year", V[30:60])})  # fmt: skip
    cities = lines(["store", "city", *d40], ["a", "X", *v40], ["b", "X", *v40], ["c", "Y", *v40])
    sums = {"X": ("2024-01-01", "day", [2 * v for v in v40]), "Y": ("2024-01-01", "day", v40)}
    add("dates across, summed by city", cities, sums, group="city", aggregate="sum")
    add("dates across, all rows summed", cities, series("2024-01-01", "day", [3 * v for v in v40], "file"), group="none",
        aggregate="sum")  # fmt: skip
    add("dates across, two columns of names", cities, {f"{a} {b}": ("2024-01-01", "day", v40) for a, b in ("Xa", "Xb", "Yc")},
        group="city,store")  # fmt: skip
    add(
        "dates across, rows not combined",
        cities,
        "rows 2 and 3 have the same time stamp .* use --aggregate",
        group="city",
    )
    add(
        "dates across, grouped by a date",
        cities,
        "column '2024-01-01' holds values or a part of the time",
        group="2024-01-01",
    )
    add("dates across, a row without a city", cities.replace(b"X", b"", 1), "row 2 has no city; write", group="city")
    add("by rows with a group", lines("a,b,c,d,e", *(["x", "y", 1, 2, 3] for _ in range(3))), "so --group needs time stamps",
        group="b", by_rows=True)  # fmt: skip
    add("a month per row, years across", lines(["Month", 2021, 2022, 2023], *([EN[m], *(V[12 * r + m] for r in range(3))] for m in
        range(12))), "write one row per value")  # fmt: skip
    add(
        "months across without a year",
        lines(["Product", *EN], ["a", *V[:12]]),
        "the columns 'Jan' to 'Dec' are times or parts of a time",
    )
    add("hours across, a day per row", lines(["Date", *(f"{h:02}:00" for h in range(24))], *([d40[r], *V[24 * r : 24 * r + 24]] for r
        in range(3))), "write one row per value")  # fmt: skip
    # steps
    jitter = [datetime(2024, 1, 1) + timedelta(minutes=5 * i, seconds=(i * 7) % 23) for i in range(40)]
    add("jitter", table("t,y", jitter), series("2024-01-01T00:00:00", "5 minutes", v40))
    irregular = [datetime(2024, 1, 1) + timedelta(minutes=i * i + 20 * i) for i in range(40)]
    add("irregular", table("t,y", irregular), "use --resample D")
    add("resampled", table("t,y", [datetime(2024, 1, 1) + timedelta(minutes=17 * i) for i in range(300)], V),
        series("2024-01-01", "day", [sum(V[i] for i in range(300) if 17 * i // 1440 == k) for k in range(3)]),
        resample="D", aggregate="sum")  # fmt: skip
    add("gaps", table("d,y", d40[:10] + d40[13:], v40[:10] + v40[13:]),
        series("2024-01-01", "day", v40[:10] + [NAN] * 3 + v40[13:]))  # fmt: skip
    workdays = [x for x in DAYS if x.weekday() < 5][:40]
    add("working days", table("d,y", workdays), series("2024-01-01", "business day", v40))
    add(
        "month ends", table("d,y", [x - timedelta(days=1) for x in MONTHS[1:37]]), series("2021-01-31", "month", V[:36])
    )
    add("a step counter", table("day,y", range(1, 41)), series("2", "step", v40))
    # files as their authors published them
    add("World Bank", lines('"Data Source","World Development Indicators",', "", '"Last Updated Date","2024-03-28",', "",
        '"Country Name","Country Code","Indicator Name",' + ",".join(f'"{y}"' for y in range(1960, 2000)) + ",",
        '"Aruba","ABW","GDP",' + ",".join(f'"{v}"' for v in v40) + ",", '"Nowhere","NOW","GDP",' + "," * 40),
        series("1960-01-01", "year", v40, "Aruba"))  # fmt: skip
    add("M5", lines(["id", "item_id", "state_id", *(f"d_{i}" for i in range(1, 41))], ["a_x", "a", "x", "", *v40[1:]],
        ["b_x", "b", "x", "", *v40[1:]]), dict.fromkeys(("a_x", "b_x"), ("2", "step", v40[1:])), by_rows=True)  # fmt: skip
    add("Johns Hopkins", lines("Province/State,Country/Region,Lat,Long," + ",".join(f"{x.month}/{x.day}/{x:%y}" for x in d40),
        ["", "Albania", 41.1, 20.1, *v40], ["Alberta", "Canada", 53.9, -116.5, *(v + 1 for v in v40)]),
        {"Albania": ("2024-01-01", "day", v40), "Alberta Canada": ("2024-01-01", "day", [v + 1 for v in v40])})  # fmt: skip
    add("GISTEMP", lines("Land-Ocean: Global Means", ["Year", *EN, "J-D", "DJF"], *([1880 + r, *V[12 * r : 12 * r + 12], -0.1,
        "***" if r == 0 else -0.2] for r in range(4))), "write one row per value")  # fmt: skip
    add("Eurostat", lines("freq,unit,geo\\TIME_PERIOD\t" + "\t".join(f"{y} " for y in range(2000, 2020)),
        "A,PC,DE\t" + "\t".join(": " if i == 3 else f"{V[i]} " for i in range(20))),
        series("2000-01-01", "year", [NAN if i == 3 else v for i, v in enumerate(V[:20])], "A,PC,DE"), "tsv")  # fmt: skip
    add("DWD", lines("STATIONS_ID;MESS_DATUM;TT_TU;eor", *(f"   44;{x:%Y%m%d%H};  {V[i]};eor" for i, x in enumerate(hours))),
        {"TT_TU": ("2024-01-01T00:00:00", "hour", v40)})  # fmt: skip
    add("ENTSO-E", lines("MTU (CET/CEST),Load", *(f"{x:%d.%m.%Y %H:%M} - {x + timedelta(hours=1):%d.%m.%Y %H:%M},{V[i]}" for i, x
        in enumerate(hours))), {"Load": ("2024-01-01T00:00:00", "hour", v40)})  # fmt: skip
    add("UCI air quality", lines("Date;Time;CO(GT);;", *(f"{x:%d/%m/%Y};{x:%H.%M.%S};{int(V[i])},5;;" for i, x in enumerate(
        datetime(2004, 3, 10, 18) + timedelta(hours=k) for k in range(100))), ";;;;"),
        {"CO(GT)": ("2004-03-10T18:00:00", "hour", [v + 0.5 for v in V[:100]])})  # fmt: skip
    add("pivot table", excel(S=[["Row Labels", "Sum of Sales"], *[[EN[m], V[m]] for m in range(12)], ["Grand Total", 9]]),
        "column 'Row Labels' holds no time stamps", "xlsx")  # fmt: skip
    alternating = [
        (datetime(2024, 1, 1) + timedelta(minutes=i, seconds=30 * k), "ab"[k], V[i]) for i in range(40) for k in (0, 1)
    ]
    add(
        "two sensors that alternate",
        lines("t,sensor,y", *alternating),
        "may name several series; use --group sensor, or",
    )
    add("Yahoo", lines("Price,Close,High", "Ticker,A,A", "Date,,", *([x, V[i], V[i] + 1] for i, x in enumerate(d40))),
        {"Close": ("2024-01-01", "day", v40), "High": ("2024-01-01", "day", [v + 1 for v in v40])})  # fmt: skip
    add(
        "provisional values",
        lines("d,y,state", *([x, V[i], "final" if i < 30 else "provisional"] for i, x in enumerate(d40))),
        day,
    )
    add("years above quarters", lines("Report", ",2022,,,,2023,,,", "Product,Q1,Q2,Q3,Q4,Q1,Q2,Q3,Q4", ["a", *V[:8]], ["b", *V[8:16]]),
        "row 3 has 9 cells, but the header has 6; .* choose another --separator or --header")  # fmt: skip
    add("profit and loss", excel(S=[["Company"], ["January - December 2023"], [None], [None, *(f"{m} 23" for m in EN), "TOTAL"],
        ["Income"], ["Sales", *V[:12], 99], ["Services", *V[12:24], 99], ["Total Income", *V[:12], 5]]),
        {"Sales": ("2023-01-01", "month", V[:12]), "Services": ("2023-01-01", "month", V[12:24])}, "xlsx")  # fmt: skip
    add("a country called Total", lines("Country,Year,y", *([c, y, V[y - 2000] + k] for k, c in enumerate(("Total", "Chad")) for y in
        range(2000, 2024))), {"Total": ("2000-01-01", "year", V[:24]), "Chad": ("2000-01-01", "year", [v + 1 for v in V[:24]])})  # fmt: skip
    add("years and weeks as numbers", table("yearweek,y", [w.year * 100 + w.week for w in weeks]),
        series("2024-01-01", "week", V[:60]))  # fmt: skip
    add("weeks below 13 as numbers", table("week,y", range(202401, 202413)), series("2024-01-01", "week", V[:12]))
    add("two years across", lines("Product,2022,2023", ["a", 5, 7], ["b", 6, 8]),
        {"a": ("2022-01-01", "year", [5.0, 7.0]), "b": ("2022-01-01", "year", [6.0, 8.0])})  # fmt: skip
    add("a time of day is missing", lines("Date;Time;y", *([f"{x:%d.%m.%Y}", "" if i == 7 else f"{x:%H:%M}", V[i]] for i, x in
        enumerate(hours)), sep=";"), "row 9: .* in column 'Date', 'Time' is no time stamp")  # fmt: skip
    add("hours from 1 to 24", lines("Date,Hour,y", *([d40[i // 24], i % 24 + 1, V[i]] for i in range(72))),
        series("2", "step", V[:72]))  # fmt: skip
    # found in published data sets
    add("a year and a month's name", table("Month,y", [f"{x:%Y %b}" for x in MONTHS[:36]]), month)
    add("row numbers called Obs and TIME", lines("Obs,Year,y,TIME", *([i + 1, 1947 + i, V[i], i + 1] for i in range(30))),
        series("1947-01-01", "year", V[:30]))  # fmt: skip
    add("a size in each group", lines("Year,Region,Area,y", *([2000 + i, g, a, V[i] + a] for i in range(20) for g, a in (("n", 7), ("s", 9)))),
        {g: ("2000-01-01", "year", [v + a for v in V[:20]]) for g, a in (("n", 7), ("s", 9))})  # fmt: skip
    add("a day and an hour without a date", lines("day,hr,bikes", *([i // 24 + 1, i % 24, V[i]] for i in range(240))),
        "'day' may hold values, codes or a part of the date; name the columns to read with --column bikes")  # fmt: skip
    add("only years for days", lines("Year,Return", *([1990 + i // 50, V[i]] for i in range(200))),
        "rows 2 and 3 have the same time stamp 1990-01-01 00:00:00; .*; or --time none if each row is one step")  # fmt: skip
    add("weeks of a month", lines("Week,y", *([i % 5 + 1, V[i]] for i in range(60))),
        "'Week' may hold values, codes or a part of the date; name the columns to read with --column y")  # fmt: skip
    add("millimetres without time stamps", lines("site,rain_mm", *(["abc"[i % 3], f"{V[i] + 0.7:.1f}"] for i in range(30))),
        "column 'site' holds no time stamps .* --time none")  # fmt: skip
    add("a comma in a column name", lines("Sales (north, south),Cost", *([V[i], i * i % 7] for i in range(30))),
        "row 2 has 2 cells, but the header has 3; put quotes around cells and names", time="none")  # fmt: skip
    # Excel
    add(
        "Excel",
        excel(Sheet1=[["d", "y"], *([datetime(x.year, x.month, x.day), v] for x, v in dated)]),
        day,
        "xlsx",
    )
    add(
        "Excel with notes",
        excel(Notes=[["Read me"], ["made by us"]], Data=[["d", "y"], *dated]),
        day,
        "xlsx",
    )
    both = {"A": [["d", "y"], *dated], "B": [["d", "y"], *zip(d40, V[40:80], strict=True)]}
    add("Excel with two tables", excel(**both), "choose one: --sheet A or --sheet B", "xlsx")
    add("Excel, the second sheet", excel(**both), series("2024-01-01", "day", V[40:80]), "xlsx", sheet="B")
    add("Excel, date and time", excel(S=[["Date", "Time", "y"], *([datetime(x.year, x.month, x.day), time(x.hour), v] for x, v in
        zip(hours, v40, strict=True))]), hour, "xlsx")  # fmt: skip
    add(
        "Excel, formulas without values",
        excel(S=[["d", "y"], *([x, "=1+1"] for x in d40)]),
        "holds the formula",
        "xlsx",
    )
    add(
        "Excel, formulas with an empty text",
        with_empty_formulas(excel(S=[["d", "y"], *([x, '=""' if i == 5 else V[i]] for i, x in enumerate(d40))])),
        series("2024-01-01", "day", gap),
        "xlsx",
    )
    add("Excel, a word among numbers", excel(S=[["d", "y"], *([x, "k.A." if i == 5 else V[i] + 0.234] for i, x in enumerate(d40))]),
        series("2024-01-01", "day", [v if v is None else v + 0.234 for v in gap]), "xlsx")  # fmt: skip
    add("Excel, months across", excel(S=[["Product", *(datetime(x.year, x.month, 1) for x in MONTHS[:24])], ["a", *V[:24]]]),
        series("2021-01-01", "month", V[:24], "a"), "xlsx")  # fmt: skip
    return c


CASES = cases()
# Kinds of files that are rejected, with a part of the message and the options with which the file is read.
REJECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "a step counter": ("--column y", {"column": ["y"]}),
    "years and weeks in two columns": ("--column y, or .* --time Year,Month", {"time": "none", "column": ["y"]}),
    "year and month in two columns": ("--time Year,Month --format", {"time": "Year,Month", "format": "%Y %m"}),
    "date and hour in two columns": ("--time Year,Month --format", {"time": "Date,Hour", "format": "%Y-%m-%d %H"}),
    "hours from 1 to 24": ("--column y", {"time": "none", "column": ["y"]}),
    "UCI air quality": ("--time Date,hour with --format", {"time": "Date,Time", "format": "%d/%m/%Y %H.%M.%S"}),
    "German month names": ("--time none", {"time": "none"}),
    "21-Jan of one year": ("give their format", {"format": "%y-%b"}),
    "spaces": ("--separator ' '", {"separator": " "}),
    "lines before the header": ("--header N", {"header": 4}),
    "comments with numbers": ("--header", {"header": 4, "missing": ["#2024-02-10", "#3.5"]}),
    "a commented year": ("--missing '#1980'", {"missing": ["#1980"]}),
    "commented header": ("--separator ' '", {"separator": " ", "header": 0, "missing": ["#"]}),
    "units below the header": ("row 2: has 'mm', but no time stamp .* --missing mm", {"missing": ["mm"]}),
    "Yahoo": ("--missing Ticker", {"missing": ["Ticker"]}),
    "no header": ("--header 0", {"header": 0}),
    "repeated header": ("--missing d", {"missing": ["d"]}),
    "row numbers, codes and flags": ("--column y", {"column": ["y"]}),
    "parts of the date": ("--column y", {"column": ["y"]}),
    "DWD": ("--column TT_TU", {"column": ["TT_TU"]}),
    "row numbers called Obs and TIME": ("--column y", {"column": ["y"]}),
    "a row of empty cells": ("--time none", {"time": "none", "missing": ["Source: B"]}),
    "a row of empty cells, Excel": ("--time none", {"time": "none"}),
    "a row of empty cells between row numbers": ("--time none", {"time": "none", "column": ["y"]}),
    "an empty cell in one column": ("--time none", {"time": "none"}),
    "an empty cell in one column, Parquet": ("--time none", {"time": "none"}),
    "a comma in the name of a group column": ("quotation marks", {"group": '"shop, city",item'}),
    "two group columns of numbers": ("--group with", {"group": "store,item"}),
    "provisional values": ("--group none", {"group": "none"}),
    "jitter": ("--resample", {"resample": "5min", "aggregate": "mean"}),
}


def read(folder: Path, suffix: str, content: bytes, options: dict[str, Any]) -> Table:
    path = folder / f"file.{suffix}"
    path.write_bytes(content)
    return read_table(path, TableOptions(**options))


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_correctly_or_rejected(tmp_path: Path, name: str) -> None:
    suffix, content, options, expected = CASES[name]
    if isinstance(expected, str) or name in REJECTED:
        message, more = REJECTED.get(name, (expected, {}))
        with pytest.raises(DataError) as rejected:
            read(tmp_path, suffix, content, options)
        assert re.search(message, str(rejected.value)), rejected.value
        if not more:
            return
        options = options | more
    result = read(tmp_path, suffix, content, options)
    assert [one.name for one in result.series] == list(expected)
    for one in result.series:
        start, step, values = expected[one.name]
        assert (one.start, result.frequency) == (start, step)
        assert one.values.tolist() == pytest.approx([np.nan if x is None else x for x in values], nan_ok=True)


# --- the same series in many formats

OPTIONS = r"--(column|format|decimal|time|resample|aggregate|group|header|by-rows|separator)"


def is_accepted(folder: Path, seed: int) -> bool:
    """Return whether a random file is accepted; fail if it is read wrongly or rejected without advice."""
    file = write_random_file(folder, seed)
    try:
        table = read_table(file.path, TableOptions(**file.options))
    except DataError as rejected:
        message = str(rejected)
    else:
        assert (table.frequency, {one.name for one in table.series}) == (file.step, {*file.series}), seed
        for one in table.series:
            values = [np.nan if x is None else x for x in file.series[one.name]]
            assert one.values.tolist() == pytest.approx(values, nan_ok=True), seed
            assert one.start.startswith(file.start), seed
        return True
    assert re.search(OPTIONS, message), (seed, message)
    return False


@pytest.mark.slow
def test_random_files_are_read_correctly_or_rejected_with_an_option(tmp_path: Path) -> None:
    seed = random.randrange(10**9)
    print(f"seeds from {seed}")  # pytest shows it if the test fails
    for number in range(60):
        is_accepted(tmp_path, seed + number)


@pytest.mark.parametrize(("files", "accepted"), [(12, 9), pytest.param(100, 80, marks=pytest.mark.slow)])
def test_most_random_files_are_accepted(tmp_path: Path, files: int, accepted: int) -> None:
    """The rejected files have ambiguous dates, ambiguous decimals or units."""
    assert sum(is_accepted(tmp_path, seed) for seed in range(files)) >= accepted


SHUFFLED = ("day first", "day or month first, monthly", "ISO weeks", "one group column", "wide", "missing values",
            "day or month first, one year", "duplicate dates")  # fmt: skip


@pytest.mark.parametrize("name", SHUFFLED)
def test_the_order_of_the_rows_changes_nothing(tmp_path: Path, name: str) -> None:
    _, content, options, expected = CASES[name]
    header, *rows = content.decode().splitlines()
    results = []
    for order in (range(len(rows)), np.random.default_rng(0).permutation(len(rows))):
        try:
            shown = describe(read(tmp_path, "csv", "\n".join([header, *(rows[i] for i in order)]).encode(), options))
            results.append({one["name"]: one for one in shown["series"]})
        except DataError:
            results.append("rejected")
    assert results[0] == results[1]
    assert (results[0] == "rejected") == isinstance(expected, str)


def test_rows_without_time_stamps_are_reported(tmp_path: Path) -> None:
    remark = "no column holds time stamps: the rows are read in the order of time"
    assert remark in read(tmp_path, "csv", lines("y", *V[:30]), {}).remarks
    assert remark not in read(tmp_path, "csv", lines("y", *V[:30]), {"time": "none"}).remarks


def test_look_prints_json_or_rejects_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(table("d,y", DAYS[:40]))
    lstm.main(["--csv", str(path), "--preview", "--json"])
    shown = json.loads(capsys.readouterr().out)
    one = {
        "name": "y",
        "start": "2024-01-01",
        "step": "day",
        "length": 40,
        "first": V[:3],
        "last": V[37:40],
        "missing": 0,
    }
    assert shown["series"] == [one]
    assert "time stamps: column 'd', %Y-%m-%d" in shown["remarks"]
    lstm.main(["--csv", str(path), "--preview"])
    assert "1 series (y) of 40 values, one per day" in capsys.readouterr().out
    path.write_bytes(table("d,y", [f"{x:%d/%m/%Y}" for x in MONTHS[:12]]))
    with pytest.raises(SystemExit) as stopped:
        lstm.main(["--csv", str(path), "--preview", "--json"])
    assert stopped.value.code == 2
    assert "--format %d/%m/%Y" in capsys.readouterr().err
    for arguments in (["--preview"], ["--csv", str(path), "--name", "x", "--json"]):
        with pytest.raises(SystemExit, match="2"):
            lstm.main(arguments)
