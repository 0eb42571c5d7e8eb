"""The backtest report for your own series, as a picture and as one HTML file that needs no other files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from training.data.tables import summary
from training.evaluation.classical import CLASSICAL
from training.evaluation.leaderboard import INTERVAL, MAX_WINDOWS, Leaderboard
from training.run import new_figure, save_figure

# Colours that people with colour blindness can tell apart (Okabe and Ito 2008)
COLORS = {method.name: color for method, color in zip(CLASSICAL, ("#999999", "#e69f00", "#56b4e9"), strict=True)}
OWN_COLOR, OTHER_COLORS = "#0072b2", ("#cc79a7", "#009e73")
PICTURE_SERIES, PAGE_SERIES = 3, 8  # number of series that the picture and the page show
SHOWN_STEPS = 400  # number of steps of a series for which forecasts are drawn
SHOWN_PAST = 2  # number of horizons that are drawn before the first window
MAX_LINES = 40  # largest number of remarks that the page lists
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: 0.3rem 1.1rem 0.3rem 0; }
th, td:first-child { text-align: left !important; } td { text-align: right; font-variant-numeric: tabular-nums; }
thead th { border-bottom: 2px solid #1b1f24; } tbody td { border-bottom: 1px solid #d8dee4; }
.verdict { font-size: 1.1rem; padding: 0.8rem 1rem; background: #eef5fb; border-left: 4px solid #0072b2; }
svg { width: 100%; height: auto; } code { font-size: 0.9em; overflow-wrap: anywhere; }
@media print { body { margin: 0; } h2, svg, table { break-inside: avoid; } }
"""


def write(folder: Path, board: Leaderboard, command: str) -> None:
    """Write backtest.png and backtest.html to a folder. ``command`` is the command that made the report."""
    (folder / "backtest.html").write_text(_page(board, command), "utf-8")
    save_figure(picture(board, PICTURE_SERIES), folder / "backtest.png", dpi=100)


def _description(board: Leaderboard) -> str:
    """Describe the windows."""
    origins, count = board.origins, len(board.splits)
    starts = pd.Series([board.splits[number].series.times[at] for number, at in origins.places])
    text = (
        f"{len(origins.past):,} windows of {origins.horizon} steps (one per {board.table.frequency}), one horizon "
        f"apart, from {count:,} series. The windows are at the end of each series. They were not used to train the "
        f"networks. The first window starts at {starts.min()}, the last at {starts.max()}. The season was determined "
        "from all values, unless --season is given."
    )
    if count < board.series:
        text += (
            f" The {count:,} series were chosen evenly from all {board.series:,} series, to limit the number of "
            f"windows to {MAX_WINDOWS}."
        )
    return text


def _page(board: Leaderboard, command: str) -> str:
    table, image = board.table, io.StringIO()
    save_figure(picture(board, PAGE_SERIES), image, format="svg", metadata={"Date": None})
    title = f"Backtest of {table.name}"
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict">{escape(board.verdict())}</p>',
            "<h2>Errors</h2>",
            pd.DataFrame([_errors(board, name) for name in board.ranking]).to_html(index=False, border=0),
            "<p>The quantile loss rates the whole distribution, and the mean absolute scaled error (MASE) its median. "
            "Both are in units of the mean difference between values one season apart. For both, lower is better. The "
            f"differences of the quantile loss from that of {escape(board.own)} have {INTERVAL} % intervals from a "
            "bootstrap over the windows. 80 % of the actual values should lie in the 80 % intervals.</p>",
            "<h2>Rolling forecasts</h2>",
            "<p>The black line shows the actual values. Each window starts at a vertical line. The blue area is the "
            f"80 % interval of {escape(board.own)}.</p>",
            image.getvalue()[image.getvalue().index("<svg") :],
            "<h2>Table</h2>",
            f"<p>{escape(summary(table))}.</p>",
            _list(table.remarks),
            "<h2>Windows</h2>",
            f"<p>{escape(_description(board))}</p>",
            "<h2>Methods</h2>",
            _list([f"{method.name}: {method.explanation}" for method in board.methods]),
            f"<p>Made by <code>{escape(command)}</code></p>",
            "</body></html>\n",
        ]
    )


def _errors(board: Leaderboard, name: str) -> dict[str, str]:
    error = board.errors[name]
    return {
        "method": name,
        "quantile loss": f"{error.quantile_loss:.3f}",
        "difference": "" if name == board.own else board.change(name),
        "MASE": f"{error.mase:.3f}",
        "in the 80 % interval": f"{error.coverage(80):.1%}",
    }


def _list(lines: Sequence[str]) -> str:
    more = [f"... and {len(lines) - MAX_LINES:,} more"] if len(lines) > MAX_LINES else []
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in [*lines[:MAX_LINES], *more]) + "</ul>"


# --- the picture


def picture(board: Leaderboard, count: int) -> Any:
    """Return a figure with the errors of the methods by step ahead, and ``count`` series with forecasts."""
    numbers = list(dict.fromkeys(number for number, _ in board.origins.places))
    chosen = [numbers[round(at)] for at in np.linspace(0, len(numbers) - 1, min(count, len(numbers)))]
    figure = new_figure(11, 3.4 + 2.6 * len(chosen))
    first, *axes = figure.subplots(1 + len(chosen))
    draw_steps(first, board)
    for axis, number in zip(axes, chosen, strict=True):
        draw_series(axis, board, number)
    lines = {name: line for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}  # of the last windows
    columns, style = min(len(lines), 3), {"frameon": False, "fontsize": 9}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, **style)
    return figure


def style_of(board: Leaderboard, method: str, own: float, other: float) -> dict[str, Any]:
    """Return the style of the lines of a method. ``own`` and ``other``: widths for the own and for other methods."""
    if method == board.own:
        return {"color": OWN_COLOR, "lw": own, "zorder": 5, "markersize": 4}
    color = OTHER_COLORS[list(board.forecasts).index(method) % len(OTHER_COLORS)]
    return {"color": COLORS.get(method, color), "lw": other, "zorder": 2, "markersize": 4}


def draw_steps(axis: Any, board: Leaderboard) -> None:
    """Draw the MASE by step ahead, with one line per method. The legend has the mean MASE."""
    steps = np.arange(1, board.origins.horizon + 1)
    marker = "o" if len(steps) <= 31 else ""
    for name in board.ranking:
        errors = board.errors[name]
        label = f"{errors.mase:.3f}  {name}"
        axis.plot(steps, errors.by_step, label=label, marker=marker, **style_of(board, name, 2.2, 1.4))
    axis.set_ylim(bottom=0)
    axis.set_xlim(0.5, len(steps) + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(f"steps ahead, one per {board.table.frequency}", parse_math=False)
    axis.set_title(f"mean absolute scaled error, {board.description}", loc="left", fontsize=10)
    axis.legend(title="mean over all steps", fontsize=9)
    axis.grid(alpha=0.25)


def draw_series(axis: Any, board: Leaderboard, number: int) -> None:
    """Draw the last values of a series, and the forecasts of all methods in each window."""
    series, horizon = board.splits[number].series, board.origins.horizon
    windows = board.windows(number)[-max(1, SHOWN_STEPS // horizon) :]
    starts = [board.origins.places[at][1] for at in windows]
    first, times = max(0, starts[0] - SHOWN_PAST * horizon), series.times
    values = np.where(series.observed, series.values, np.nan)
    axis.plot(times[first:], values[first:], color="black", lw=1.1, zorder=4, label="actual values")
    marker = "o" if horizon == 1 else ""
    for at, start in zip(windows, starts, strict=True):
        axis.axvline(times[start], color="black", alpha=0.12, lw=0.8)
        ahead = times[start : start + horizon]
        for name, forecasts in board.forecasts.items():
            axis.plot(ahead, forecasts[at].median, label=name, marker=marker, **style_of(board, name, 2, 1))
        bounds, label = board.forecasts[board.own][at].interval(80), f"80 % interval, {board.own}"
        axis.fill_between(ahead, *bounds, color=OWN_COLOR, alpha=0.18, lw=0, label=label)
    axis.set_title(series.name[:100], loc="left", fontsize=10, parse_math=False)
    axis.margins(x=0.01)
    axis.grid(alpha=0.25)
