"""Write the backtest report as one HTML file that needs no other files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from training.data.tables import summary
from training.evaluation.report import figures
from training.evaluation.report.results import ETS, MAX_WINDOWS, NAIVE, Backtest, times
from training.run import save_figure

MAX_REMARKS, MAX_SERIES = 30, 40  # largest numbers of remarks and of series that the page lists
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: 0.3rem 1.1rem 0.3rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #1b1f24; } tbody td { border-bottom: 1px solid #d8dee4; }
.number { text-align: right; font-variant-numeric: tabular-nums; } .best { font-weight: 700; }
.mark { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin-right: 0.5em; }
.verdict { font-size: 1.1rem; padding: 0.8rem 1rem; background: #eef5fb; border-left: 4px solid #0072b2; }
svg { width: 100%; height: auto; } code { font-size: 0.9em; overflow-wrap: anywhere; }
@media print { body { margin: 0; } h2, svg, table { break-inside: avoid; } }
"""
EXPLANATIONS = {
    NAIVE: "the last season, repeated; without a season, the last value",
    ETS: (
        "exponential smoothing with trend and season; the model is chosen by AICc on the values before the first "
        "window, and its parameters are fitted again at every window"
    ),
}


def write(folder: Path, backtest: Backtest, command: str, explanations: dict[str, str]) -> Path:
    """Write backtest.png and backtest.html to a folder; return the path of the picture.

    ``command`` is the command that made the report. ``explanations`` explains each method that uses a network.
    """
    (folder / "backtest.html").write_text(_page(backtest, command, {**EXPLANATIONS, **explanations}), "utf-8")
    return save_figure(figures.picture(backtest), folder / "backtest.png", dpi=100)


def _page(backtest: Backtest, command: str, explanations: dict[str, str]) -> str:
    table, origins = backtest.table, backtest.origins
    shown = figures.shown_series(backtest, figures.PAGE_SERIES)
    title = f"Backtest of {table.name}"
    step = table.frequency
    windows = (
        f"{len(origins.past):,} windows of {backtest.horizon} steps (one per {step}), one horizon apart, from "
        f"{len(backtest.splits):,} series. The windows are at the end of each series. They were not used to train the "
        "networks. The season was determined from all values, unless --season is given."
    )
    if len(backtest.splits) < backtest.series:
        windows += (
            f" The {len(backtest.splits):,} series were chosen evenly from all {backtest.series:,} series, to limit "
            f"the number of windows to {MAX_WINDOWS}."
        )
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict">{escape(backtest.verdict())}</p>',
            "<h2>Errors</h2>",
            _errors(backtest),
            "<p>The mean absolute scaled error (MASE) is the mean error of the median forecast, in units of the mean "
            "difference between values one season apart. The weighted quantile loss (WQL) rates the whole "
            "distribution. For both, lower is better. 80 % of the actual values should lie in the 80 % intervals.</p>",
            "<h2>Error by step ahead</h2>",
            figures.svg(figures.error_figure(backtest)),
            "<h2>Rolling forecasts</h2>",
            "<p>The black line shows the actual values. Each window starts at a vertical line. The blue area is the "
            f"80 % interval of {escape(backtest.tuned)}.</p>",
            *(figures.svg(figures.series_figure(backtest, number)) for number in shown),
            "<h2>Table</h2>",
            f"<p>{escape(summary(table))}.</p>",
            _list(table.remarks, MAX_REMARKS, "remarks"),
            "<h2>Windows</h2>",
            f"<p>{escape(windows)}</p>",
            _windows(backtest),
            "<h2>Methods</h2>",
            _list(
                [f"{name}: {explanations[ETS if name.startswith(ETS) else name]}" for name in backtest.methods],
                len(backtest.methods),
                "",
            ),
            _list(backtest.remarks, MAX_REMARKS, "remarks"),
            f"<p>Made by <code>{escape(command)}</code></p>",
            "</body></html>\n",
        ]
    )


def _errors(backtest: Backtest) -> str:
    errors = {name: backtest.errors(name) for name in backtest.methods}
    best = {key: min(round(getattr(error, key), 3) for error in errors.values()) for key in ("mase", "wql")}

    def number(key: str, value: float) -> str:
        return f'<td class="number{" best" if round(value, 3) == best[key] else ""}">{value:.3f}</td>'

    rows = [
        f'<tr><td><span class="mark" style="background:{figures.color_of(backtest, name)}"></span>{escape(name)}</td>'
        f'{number("mase", error.mase)}{number("wql", error.wql)}<td class="number">{error.coverage:.1%}</td></tr>'
        for name, error in errors.items()
    ]
    return _table(["method", "MASE", "WQL", "in the 80 % interval"], rows)


def _windows(backtest: Backtest) -> str:
    rows = []
    for number, split in enumerate(backtest.splits[:MAX_SERIES]):
        own = [backtest.origins.places[at][1] for at in backtest.windows(number)]
        if not own:
            continue
        stamps = times(split.series.start, backtest.table.frequency, [own[0], own[-1]])
        first, last = [f"value {at + 1:,}" for at in (own[0], own[-1])] if stamps is None else map(_stamp, stamps)
        rows.append(
            f"<tr><td>{escape(split.series.name)}</td>"
            + "".join(f'<td class="number">{text}</td>' for text in (f"{len(split.series.values):,}", len(own)))
            + f"<td>{escape(first)}</td><td>{escape(last)}</td></tr>"
        )
    hidden = len(backtest.splits) - MAX_SERIES
    more = f"<p>... and {hidden:,} more series</p>" if hidden > 0 else ""
    return _table(["series", "values", "windows", "first window starts", "last window starts"], rows) + more


def _stamp(stamp: Any) -> str:
    return str(stamp.date() if stamp == stamp.normalize() else stamp)


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    numeric = ("MASE", "WQL", "in the 80 % interval", "values", "windows")
    cells = "".join(f"<th{' class=number' if name in numeric else ''}>{name}</th>" for name in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _list(lines: Sequence[str], most: int, noun: str) -> str:
    if not lines:
        return ""
    more = [f"... and {len(lines) - most:,} more {noun}"] if len(lines) > most else []
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in [*lines[:most], *more]) + "</ul>"
