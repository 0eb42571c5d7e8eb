"""Write the backtest report as one HTML file that needs no other files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from training.data.tables import summary
from training.evaluation.leaderboard import INTERVAL, MAX_WINDOWS, Leaderboard
from training.evaluation.report import figures
from training.run import save_figure

MAX_REMARKS, MAX_SERIES = 30, 40  # largest numbers of remarks and of series that the page lists
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: 0.3rem 1.1rem 0.3rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #1b1f24; } tbody td { border-bottom: 1px solid #d8dee4; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.mark { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin-right: 0.5em; }
.verdict { font-size: 1.1rem; padding: 0.8rem 1rem; background: #eef5fb; border-left: 4px solid #0072b2; }
svg { width: 100%; height: auto; } code { font-size: 0.9em; overflow-wrap: anywhere; }
@media print { body { margin: 0; } h2, svg, table { break-inside: avoid; } }
"""


def write(folder: Path, board: Leaderboard, command: str) -> None:
    """Write backtest.png and backtest.html to a folder. ``command`` is the command that made the report."""
    (folder / "backtest.html").write_text(_page(board, command), "utf-8")
    save_figure(figures.picture(board), folder / "backtest.png", dpi=100)


def _page(board: Leaderboard, command: str) -> str:
    table, origins = board.table, board.origins
    shown = figures.shown_series(board, figures.PAGE_SERIES)
    title = f"Backtest of {table.name}"
    step = table.frequency
    windows = (
        f"{len(origins.past):,} windows of {origins.horizon} steps (one per {step}), one horizon apart, from "
        f"{len(board.splits):,} series. The windows are at the end of each series. They were not used to train the "
        "networks. The season was determined from all values, unless --season is given."
    )
    if len(board.splits) < board.series:
        windows += (
            f" The {len(board.splits):,} series were chosen evenly from all {board.series:,} series, to limit "
            f"the number of windows to {MAX_WINDOWS}."
        )
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict">{escape(board.verdict())}</p>',
            "<h2>Errors</h2>",
            _errors(board),
            "<p>The quantile loss rates the whole distribution, and the mean absolute scaled error (MASE) its median. "
            "Both are in units of the mean difference between values one season apart. For both, lower is better. The "
            f"differences of the quantile loss from that of {escape(board.own)} have {INTERVAL} % intervals from a "
            "bootstrap over the windows. 80 % of the actual values should lie in the 80 % intervals.</p>",
            "<h2>Error by step ahead</h2>",
            figures.svg(figures.error_figure(board)),
            "<h2>Rolling forecasts</h2>",
            "<p>The black line shows the actual values. Each window starts at a vertical line. The blue area is the "
            f"80 % interval of {escape(board.own)}.</p>",
            *(figures.svg(figures.series_figure(board, number)) for number in shown),
            "<h2>Table</h2>",
            f"<p>{escape(summary(table))}.</p>",
            _list(table.remarks, MAX_REMARKS, "remarks"),
            "<h2>Windows</h2>",
            f"<p>{escape(windows)}</p>",
            _windows(board),
            "<h2>Methods</h2>",
            _list([f"{method.name}: {method.explanation}" for method in board.methods], len(board.methods), ""),
            f"<p>Made by <code>{escape(command)}</code></p>",
            "</body></html>\n",
        ]
    )


def _errors(board: Leaderboard) -> str:
    rows = []
    for name in board.ranking:
        error = board.errors[name]
        cells = (
            f"{error.quantile_loss:.3f}",
            "" if name == board.own else str(board.change(name)),
            f"{error.mase:.3f}",
            f"{error.coverage_80:.1%}",
        )
        mark = f'<span class="mark" style="background:{figures.color_of(board, name)}"></span>'
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{mark}{escape(name)}</td>{numbers}</tr>")
    return _table(["method", "quantile loss", "difference", "MASE", "in the 80 % interval"], rows)


def _windows(board: Leaderboard) -> str:
    rows = []
    for number, split in enumerate(board.splits[:MAX_SERIES]):
        own = [board.origins.places[at][1] for at in board.windows(number)]
        if not own:
            continue
        first, last = (_stamp(split.series.times[at]) for at in (own[0], own[-1]))
        rows.append(
            f"<tr><td>{escape(split.series.name)}</td>"
            + "".join(f'<td class="number">{text}</td>' for text in (f"{len(split.series.values):,}", len(own)))
            + f"<td>{escape(first)}</td><td>{escape(last)}</td></tr>"
        )
    hidden = len(board.splits) - MAX_SERIES
    more = f"<p>... and {hidden:,} more series</p>" if hidden > 0 else ""
    return _table(["series", "values", "windows", "first window starts", "last window starts"], rows) + more


def _stamp(time: Any) -> str:
    return str(np.datetime_as_string(time, unit="auto")) if isinstance(time, np.datetime64) else f"step {time}"


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    numeric = ("quantile loss", "difference", "MASE", "in the 80 % interval", "values", "windows")
    cells = "".join(f"<th{' class=number' if name in numeric else ''}>{name}</th>" for name in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _list(lines: Sequence[str], most: int, noun: str) -> str:
    if not lines:
        return ""
    more = [f"... and {len(lines) - most:,} more {noun}"] if len(lines) > most else []
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in [*lines[:most], *more]) + "</ul>"
