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
    c: dict[str, tuple[str, bytes, dict[str, Any], Any]] = {}

    def add(name: str, content: bytes, expected: Any, suffix: str = "csv", **options: Any) -> None:
        c[name] = (suffix, content, options, expected)

    # dates
    add("weekday before the date", table("d,y", [f"{x:%a %d.%m.%Y}" for x in d40]), day)
    add("day first", table("d,y", [f"{x:%d/%m/%Y}" for x in d40]), day)
    add("day or month first, monthly", table("d,y", [f"{x:%d/%m/%Y}" for x in MONTHS[:36]]), month)
    add("day or month first, one year", table("d,y", [f"{x:%d/%m/%Y}" for x in MONTHS[:12]]),
        series("2021-01-01", "month", V[:12]))  # fmt: skip
    add("days without a year", table("d,y", [f"{x:%d-%b}" for x in d40]), "give their format")
    add("21-Jan of one year", table("m,y", [f"{x:%y-%b}" for x in MONTHS[:12]]), series("2021-01-01", "month", V[:12]))
    add("quarters", table("q,y", quarters), series("2020-01-01", "quarter", V[:14]))
    add("ISO weeks", table("w,y", [f"{w.year}-W{w.week:02}" for w in weeks]), series("2024-01-01", "week", V[:60]))
    add("KW", table("KW;y", [f"KW {w.week}/{w.year}" for w in weeks], sep=";"), series("2024-01-01", "week", V[:60]))
    add("years", table("Year,y", range(1980, 2020)), series("1980-01-01", "year", v40))
    add("year and month in two columns", lines("Year,Month,y", *([x.year, x.month, V[i]] for i, x in enumerate(MONTHS[:36]))),
        month)  # fmt: skip
    add(
        "seconds since 1970",
        table("timestamp,y", [int((x - datetime(1970, 1, 1)).total_seconds()) for x in hours]),
        hour,
    )
    add("Excel dates as numbers", table("Date,y", [45292 + i for i in range(40)]), day)
    add("eight digits under a date", table("date,y", [f"{x:%Y%m%d}" for x in d40]), day)
    add("eight digits under another name", lines("ref,y", *([f"{x:%Y%m%d}", V[i]] for i, x in enumerate(d40))),
        "column 'ref' may hold time stamps .* or values; use --time ref")  # fmt: skip
    add("amounts like dates", lines("date,amount", *([d, 20240105 + i] for i, d in enumerate(d40))),
        series("2024-01-01", "day", [20240105.0 + i for i in range(40)], "amount"))  # fmt: skip
    zoned = [pd.Timestamp("2024-03-30", tz="Europe/Berlin") + pd.Timedelta(hours=i) for i in range(60)]
    add("time zone through a clock change", table("t,y", [x.isoformat() for x in zoned]),
        series("2024-03-29T23:00:00", "hour", V[:60]))  # fmt: skip
    midnights = [pd.Timestamp(x, tz="Europe/Berlin") for x in DAYS[60:120]]
    add("local midnights through a clock change", table("t,y", [x.isoformat() for x in midnights]),
        series("2024-03-01", "day", V[:60]))  # fmt: skip
    add("nanoseconds and a zone, by format", table("t,y", [f"{x:%d.%m.%Y %H:%M:%S}.000000000 -0530" for x in HOURS[:40]]),
        series("2024-03-30T05:30:00", "hour", v40), format="%d.%m.%Y %H:%M:%S.%f %z")  # fmt: skip
    add(
        "mixed dates",
        table("d,y", [f"{x:%Y-%m-%d}" if i % 2 else "soon" for i, x in enumerate(d40)]),
        "row 2: 'soon' in column 'd' is no time stamp",
    )
    # numbers
    add(
        "unquoted decimal commas",
        table("d,y", d40, [f"{v + 0.5:.1f}".replace(".", ",") for v in v40]),
        "save the file with semicol",
    )
    add("dollars and parentheses", table("d,y", d40, [f'"(${v:,.2f})"' if i % 5 == 0 else f'"${1000 + v:,.2f}"'
        for i, v in enumerate(v40)]),
        series("2024-01-01", "day", [-v if i % 5 == 0 else 1000 + v for i, v in enumerate(v40)]))  # fmt: skip
    add("units beside zeros and ones", lines("d,y,promo", *([x, f"{v} kWh", i % 2] for i, (x, v) in enumerate(dated))), "y is '10.0 kWh', not a number; write numbers .* without")  # fmt: skip
    add("trailing and Unicode minus", table("d,y", d40, [f"{v}-" if i % 2 else f"−{v}" for i, v in enumerate(v40)]),
        series("2024-01-01", "day", [-v for v in v40]))  # fmt: skip
    add("missing values", table("d,y", d40, [("NA", "-", "null", ".", "", "n/a", "#N/A", "..")[i // 4] if i % 4 == 1 and i < 32
        else v for i, v in enumerate(v40)]),
        series("2024-01-01", "day", [NAN if i % 4 == 1 and i < 32 else v for i, v in enumerate(v40)]))  # fmt: skip
    closed = table("d,y", d40, [{7: -999, 9: "closed for repair"}.get(i, v) for i, v in enumerate(v40)])
    known = [NAN if i == 9 else v for i, v in enumerate(v40)]
    for number, (missing, expected) in enumerate((
        ([], "not a number; use --missing 'closed for repair' to read"),
        (["closed for repair"], "use --missing 'closed for repair' -999, or --missing 'closed for repair' none to read"),
        (["closed for repair", "-999"], series("2024-01-01", "day", [NAN if i == 7 else v for i, v in enumerate(known)])),
        (["closed for repair", "none"], series("2024-01-01", "day", [-999 if i == 7 else v for i, v in enumerate(known)])),
    )):  # fmt: skip
        add(f"-999 and closed, {number}", closed, expected, missing=missing)
    # files
    add(
        "cp1251",
        table("Дата;Продажи", d40, sep=";").decode().encode("cp1251"),
        series("2024-01-01", "day", v40, "Продажи"),
    )
    add("UTF-16", table("d\ty", d40, sep="\t").decode().encode("utf-16"), day)
    add("UTF-8 with a mark, Windows lines", b"\xef\xbb\xbf" + lines("d,y", *dated, end="\r\n"), day)
    add("gzip", gzip.compress(table("d,y", d40)), day, "csv.gz")
    add(
        "Parquet with an index",
        parquet(pd.DataFrame({"y": v40}, index=pd.DatetimeIndex(d40, name="d"))),
        day,
        "parquet",
    )
    frame = pd.DataFrame({"d": pd.to_datetime(d40), "y": v40})
    kept = [i + i // 5 for i in range(40)]  # the row numbers of a filtered table
    add("Parquet, a sorted table", parquet(frame.set_index(pd.Index(kept[20:] + kept[:20]))), day, "parquet")
    add("damaged gzip", gzip.compress(table("d,y", d40))[:60], "is damaged or encrypted", "csv.gz")
    add("zip", zipped(table("d,y", d40)), day, "zip")
    add("HTML", b"<html>\n<table></table></html>", "is HTML or XML; save the table as CSV", "html")
    add("spaces", lines("d      y", *(f"{x}  {v}" for x, v in dated)), day, "txt")
    add("sep=;", b"sep=;\n" + table("d;y", d40, sep=";"), day)
    add("old Excel", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 9, "save it as .xlsx", "xls")
    # headers
    add("lines before the header", lines("Sales report", "Generated:,2024-05-01", "", "d,y", *dated,
        "", "Source: the shop"), day)  # fmt: skip
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
    dates = [f"{x},{v}" for x, v in dated]
    add("a row of empty cells between dates", lines(",y", *dates[:5], ",", *dates[5:]), day)
    add("an empty cell in one column", lines("y", *('""' if v is None else v for v in gap)), series("2", "step", gap))
    add("an empty line in one column", lines("y", *v40[:5], "", *v40[5:], "", '""'), series("2", "step", v40))
    # layouts
    add("one group column", lines("d,shop,sold", *grouped), two)
    swapped = [(d, "ab"[k], "xy"[(k + i) % 2], V[i] + k) for i, d in enumerate(d40) for k in (0, 1)]
    add("two columns that can name the series", lines('d,"shop, city",region,y', *swapped),
        "use --group 'shop, city' or --group region")  # fmt: skip
    add("two group columns of numbers", lines('date,"store, city",item,sales', *stores), by_store)
    add("two group columns", lines("date,store,item,sales", *((d, f"s{s}", f"t{t}", v) for d, s, t, v in stores)),
        {f"s{s} t{t}": by_store[f"{s} {t}"] for s in (1, 2) for t in (1, 2, 3)})  # fmt: skip
    add("code and name of each group", lines("d,code,country,y", *([d, g.upper(), g, v] for d, g, v in grouped)),
        {name.upper(): own for name, own in two.items()})  # fmt: skip
    add("transactions, summed", lines("date,product,amount", *([d40[i // 3], "pq"[i % 2], V[i]] for i in range(120))),
        series("2024-01-01", "day", [sum(V[3 * i : 3 * i + 3]) for i in range(40)], "amount"), aggregate="sum")  # fmt: skip
    add("duplicate dates", table("d,y", [*d40, d40[-1]]), "rows 41 and 42 have the same time stamp .* use --aggregate")
    cities = lines(["store", "city", *d40], ["a", "X", *v40], ["b", "X", *v40], ["c", "Y", *v40])
    sums = {"X": ("2024-01-01", "day", [2 * v for v in v40]), "Y": ("2024-01-01", "day", v40)}
    add("dates across, summed by city", cities, sums, group="city", aggregate="sum")
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
    add("hours across, a day per row", lines(["Date", *(f"H{h:02}" for h in range(24))], *([d40[r], *V[24 * r : 24 * r + 24]] for r
        in range(3))), "write one row per value")  # fmt: skip
    # steps
    jitter = [datetime(2024, 1, 1) + timedelta(minutes=5 * i, seconds=(i * 7) % 23) for i in range(40)]
    add("jitter", table("t,y", jitter), series("2024-01-01T00:00:00", "5 minutes", v40))
    add(
        "month ends", table("d,y", [x - timedelta(days=1) for x in MONTHS[1:37]]), series("2021-01-31", "month", V[:36])
    )
    for code, start in (("BMS", "2021-01-01"), ("BME", "2021-01-29")):
        working = pd.date_range("2021-01-01", periods=36, freq=code).date
        add(f"working days of months, {code}", table("d,y", working), series(start, "month", V[:36]))
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
    add("Eurostat", lines("freq,unit,geo\\TIME_PERIOD\t" + "\t".join(f"{y} " for y in range(2000, 2020)),
        "A,PC,DE\t" + "\t".join(": " if i == 3 else f"{V[i]} " for i in range(20))),
        series("2000-01-01", "year", [NAN if i == 3 else v for i, v in enumerate(V[:20])], "A,PC,DE"), "tsv")  # fmt: skip
    add("ENTSO-E", lines("MTU (CET/CEST),Load", *(f"{x:%d.%m.%Y %H:%M} - {x + timedelta(hours=1):%d.%m.%Y %H:%M},{V[i]}" for i, x
        in enumerate(hours))), {"Load": ("2024-01-01T00:00:00", "hour", v40)})  # fmt: skip
    alternating = [
        (datetime(2024, 1, 1) + timedelta(minutes=i, seconds=30 * k), "ab"[k], V[i]) for i in range(40) for k in (0, 1)
    ]
    add(
        "two sensors that alternate",
        lines("t,sensor,y", *alternating),
        "may name several series; use --group sensor, or",
    )
    add("profit and loss", excel(S=[["Company"], ["January - December 2023"], [None], [None, *(f"{m} 23" for m in EN), "TOTAL"],
        ["Income"], ["Sales", *V[:12], 99], ["Services", *V[12:24], 99], ["Total Income", *V[:12], 5]]),
        {"Sales": ("2023-01-01", "month", V[:12]), "Services": ("2023-01-01", "month", V[12:24])}, "xlsx")  # fmt: skip
    add("a country called Total", lines("Country,Year,y", *([c, y, V[y - 2000] + k] for k, c in enumerate(("Total", "Chad")) for y in
        range(2000, 2024))), {"Total": ("2000-01-01", "year", V[:24]), "Chad": ("2000-01-01", "year", [v + 1 for v in V[:24]])})  # fmt: skip
    add("weeks below 13 as numbers", table("week,y", range(202401, 202413)), series("2024-01-01", "week", V[:12]))
    add("two years across", lines("Product,2022,2023", ["a", 5, 7], ["b", 6, 8]),
        {"a": ("2022-01-01", "year", [5.0, 7.0]), "b": ("2022-01-01", "year", [6.0, 8.0])})  # fmt: skip
    # found in published data sets
    add("a size in each group", lines("Year,Region,Area,y", *([2000 + i, g, a, V[i] + a] for i in range(20) for g, a in (("n", 7), ("s", 9)))),
        {g: ("2000-01-01", "year", [v + a for v in V[:20]]) for g, a in (("n", 7), ("s", 9))})  # fmt: skip
    add("a comma in a column name", lines("Sales (north, south),Cost", *([V[i], i * i % 7] for i in range(30))),
        "row 2 has 2 cells, but the header has 3; put quotes around cells and names", time="none")  # fmt: skip
    # Excel
    add(
        "Excel with notes",
        excel(Notes=[["Read me"], ["made by us"]], Data=[["d", "y"], *dated]),
        day,
        "xlsx",
    )
    both = {"A": [["d", "y"], *dated], "B": [["d", "y"], *zip(d40, V[40:80], strict=True)]}
    add("Excel with two tables", excel(**both), series("2024-01-01", "day", V[40:80]), "xlsx")
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
    return c


CASES = cases()
# Kinds of files that are rejected, with a part of the message and the options with which the file is read.
REJECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "day or month first, one year": (
        "ambiguous: %d/%m/%Y, %m/%d/%Y; choose --format %d/%m/%Y or --format %m/%d/%Y",
        {"format": "%d/%m/%Y"},
    ),
    "cp1251": ("give its encoding, for example --encoding cp12", {"encoding": "cp1251"}),
    "Excel with two tables": ("choose one: --sheet A or --sheet B", {"sheet": "B"}),
    "year and month in two columns": ("--time Year,Month --format", {"time": "Year,Month", "format": "%Y %m"}),
    "21-Jan of one year": ("give their format", {"format": "%y-%b"}),
    "spaces": ("--separator ' '", {"separator": " "}),
    "lines before the header": ("--header N", {"header": 4}),
    "units below the header": ("row 2: has 'mm', but no time stamp .* --missing mm", {"missing": ["mm"]}),
    "no header": ("--header 0", {"header": 0}),
    "row numbers, codes and flags": ("--column y", {"column": ["y"]}),
    "parts of the date": ("--column y", {"column": ["y"]}),
    "a row of empty cells": ("--time none", {"time": "none", "missing": ["Source: B"]}),
    "an empty cell in one column": ("--time none", {"time": "none"}),
    "two group columns of numbers": ("--group with", {"group": '"store, city",item'}),
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


@pytest.mark.parametrize(("files", "accepted"), [(40, 31), pytest.param(100, 80, marks=pytest.mark.slow)])
def test_most_random_files_are_accepted(tmp_path: Path, files: int, accepted: int) -> None:
    """The rejected files have ambiguous dates, ambiguous decimals or units."""
    assert sum(is_accepted(tmp_path, seed) for seed in range(files)) >= accepted


SHUFFLED = ("day first", "ISO weeks", "one group column", "missing values", "duplicate dates")


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
    (one,) = shown["series"]
    assert (one["start"], one["step"], one["length"], one["missing"]) == ("2024-01-01", "day", 40, 0)
    assert (one["first"], one["last"]) == (V[:3], V[37:40])
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
