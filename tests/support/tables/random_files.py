"""Random table files whose series are known."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openpyxl
import pandas as pd

STAMPS = {  # time step -> offset of pandas, and formats of the time stamps
    "hour": ("h", ["%Y-%m-%d %H:%M", "%d.%m.%Y %H:%M", "%m/%d/%Y %I:%M %p", "%Y-%m-%dT%H:%M:%SZ", "%d/%m/%y %H:%M:%S"]),
    "15 minutes": ("15min", ["%Y-%m-%d %H:%M:%S", "%d.%m.%y %H:%M", "%Y%m%d %H%M"]),
    "day": ("D", ["%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y", "%d-%b-%y", "%b %d, %Y", "%Y%m%d", "%a %d %B %Y", "%Y/%m/%d"]),
    "business day": ("B", ["%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y"]),
    "week": ("W-MON", ["%G-W%V", "%d.%m.%y", "%Y/%m/%d", "%m-%d-%Y"]),
    "month": ("MS", ["%Y-%m", "%b-%y", "%B %Y", "%m/%Y", "%d/%m/%Y", "%m/%d/%Y", "%Y%m", "%Y-%m-%d"]),
    "quarter": ("QS", ["%Y-%m-%d", "%d.%m.%Y"]),
    "year": ("YS", ["%Y", "%Y-%m-%d"]),
}
LAYOUTS = ("one series", "a column per series", "a row per value", "a row per series", "without time stamps")


class RandomFile(NamedTuple):
    """A file, the options to read it, and what it holds: time step, first time, and values of each series."""

    path: Path
    options: dict[str, Any]
    step: str
    start: str
    series: dict[str, list[float | None]]


def write_random_file(folder: Path, seed: int) -> RandomFile:
    """Write a file with 40 values of one to three series. Encoding, separators, formats and layout are random."""
    random = np.random.default_rng(seed)

    def pick(choices: Any) -> Any:
        return choices[int(random.integers(len(choices)))]

    step, layout, kind = pick(list(STAMPS)), pick(LAYOUTS), pick(["csv"] * 6 + ["csv.gz", "xlsx", "parquet"])
    offset, formats = STAMPS[step]
    pattern, typed = pick(formats), kind in ("xlsx", "parquet")
    begin = pd.Timestamp("2001-01-01") + pd.Timedelta(days=int(random.integers(8000)))
    times = pd.date_range(begin if step != "year" else "1950-01-01", periods=40, freq=offset)
    names = ["y"] if layout == "one series" else ["apples", "pears, green", "plums 7"][: pick([2, 3])]
    digits, decimal = pick([0, 1, 2, 3]), pick(".,")
    mark = pick(["{}", "{}", "${}" if decimal == "." else "{} €", "{}%", "{} kWh", "-{}"])
    groups = pick(["", "", {".": ",", ",": "."}[decimal], " ", "'"])
    empty = pick(["", "NA", "-", "null", "k.A.", "n/a", "#N/A"])
    scale = pick([1, 30, 1000, 100_000]) * (-1 if mark == "-{}" else 1)
    series: dict[str, list[float | None]] = {
        name: [round(scale * float(x), digits) for x in 0.2 + random.random(40)] for name in names
    }
    for values in series.values():
        values[7] = None

    def cell(value: float | None) -> Any:
        if typed or value is None:
            return value if typed else empty
        text = f"{abs(value):,.{digits}f}".replace(",", "@").replace(".", decimal).replace("@", groups)
        return mark.format(text)

    stamps = [time.to_pydatetime() if typed else time.strftime(pattern) for time in times]
    rows: list[list[Any]]
    if layout in ("one series", "a column per series"):
        rows = [["when", *names], *([stamp, *(cell(series[n][i]) for n in names)] for i, stamp in enumerate(stamps))]
    elif layout == "a row per value":
        rows = [
            ["date", "product", "sold"],
            *([stamp, n, cell(series[n][i])] for i, stamp in enumerate(stamps) for n in names),
        ]
    else:
        titles = stamps if layout == "a row per series" else [f"V{i}" for i in range(40)]
        rows = [["product", *titles], *([n, *map(cell, series[n])] for n in names)]
    if layout in LAYOUTS[:3] and random.random() < 0.3:
        rows[1:] = [rows[i + 1] for i in random.permutation(len(rows) - 1)]
        series = (
            {name: series[name] for name in dict.fromkeys(row[1] for row in rows[1:])}
            if layout == LAYOUTS[2]
            else series
        )
    path = folder / f"file.{kind}"
    _write(
        path,
        rows,
        pick([[], [], ["Report 7", ""], ["# a comment"]]),
        pick(",;\t|"),
        pick(["utf-8", "utf-16", "cp1252"]),
    )
    untimed = layout == "without time stamps"
    start = "1" if untimed else f"{times[0]:%Y-%m-%d}"
    return RandomFile(path, {"by_rows": True} if untimed else {}, "step" if untimed else step, start, series)


def _write(path: Path, rows: list[list[Any]], above: list[str], separator: str, encoding: str) -> None:
    if path.suffix == ".parquet":
        pd.DataFrame(rows[1:], columns=list(map(str, rows[0]))).to_parquet(path)
    elif path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in [*([line] for line in above), *rows]:
            book.active.append(row)
        book.save(path)
    else:
        text = io.StringIO()
        text.write("".join(f"{line}\n" for line in above))
        csv.writer(text, delimiter=separator, lineterminator="\n").writerows(rows)
        content = text.getvalue().encode(encoding)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
