"""The plots of a backtest report."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from training.evaluation.classical import CLASSICAL
from training.evaluation.leaderboard import Leaderboard

# Colours that people with colour blindness can tell apart (Okabe and Ito 2008)
COLORS = {method.name: color for method, color in zip(CLASSICAL, ("#999999", "#e69f00", "#56b4e9"), strict=True)}
OWN_COLOR, OTHER_COLORS = "#0072b2", ("#cc79a7", "#009e73")
PICTURE_SERIES, PAGE_SERIES = 3, 8  # number of series that the picture and the page show
SHOWN_STEPS = 400  # number of steps of a series for which forecasts are drawn
SHOWN_PAST = 2  # number of horizons that are drawn before the first window


def color_of(board: Leaderboard, method: str) -> str:
    """Return the colour of a method in all plots."""
    if method == board.own:
        return OWN_COLOR
    return COLORS.get(method) or OTHER_COLORS[list(board.forecasts).index(method) % len(OTHER_COLORS)]


def picture(board: Leaderboard) -> Any:
    """Return one figure with the errors of the methods, the error by step ahead, and some rolling forecasts."""
    chosen = shown_series(board, PICTURE_SERIES)
    figure = _figure(11, 3.4 + 2.6 * len(chosen))
    grid = figure.add_gridspec(1 + len(chosen), 2, height_ratios=[1.15, *([1] * len(chosen))])
    draw_errors(figure.add_subplot(grid[0, 0]), board)
    draw_steps(figure.add_subplot(grid[0, 1]), board)
    for row, number in enumerate(chosen):
        draw_series(figure.add_subplot(grid[1 + row, :]), board, number)
    _legend(figure, board)
    return figure


def error_figure(board: Leaderboard) -> Any:
    """Return a figure that shows the error of each method for each step ahead."""
    figure = _figure(10, 3.6)
    draw_steps(figure.subplots(), board)
    _legend(figure, board, actual=False)
    return figure


def series_figure(board: Leaderboard, number: int) -> Any:
    """Return a figure with the rolling forecasts of one series."""
    figure = _figure(10, 3.2)
    draw_series(figure.subplots(), board, number)
    return figure


def svg(figure: Any) -> str:
    """Return the figure as an SVG element for an HTML page."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def shown_series(board: Leaderboard, count: int) -> list[int]:
    """Return the indices of up to ``count`` of the splits, evenly spaced."""
    last = len(board.splits) - 1
    return sorted({round(at) for at in np.linspace(0, last, min(count, last + 1))})


def draw_errors(axis: Any, board: Leaderboard) -> None:
    """Draw one bar per method. Its length is the MASE; the name and the other errors are above it."""
    names = [method.name for method in reversed(board.methods)]
    errors = [board.errors[name] for name in names]
    axis.barh(
        range(len(names)), [error.mase for error in errors], color=[color_of(board, n) for n in names], height=0.4
    )
    for at, (name, error) in enumerate(zip(names, errors, strict=True)):
        weight = "bold" if name == board.own else "normal"
        others = f"quantile loss {error.quantile_loss:.3f}, {error.coverage_80:.0%} in the 80 % interval"
        axis.text(0, at + 0.24, name, fontsize=9, va="bottom", weight=weight, parse_math=False)
        axis.text(1, at + 0.24, others, fontsize=9, va="bottom", ha="right", transform=axis.get_yaxis_transform())
        axis.text(error.mase, at, f" {error.mase:.3f}", fontsize=9, va="center", weight=weight)
    axis.set_xlim(0, 1.12 * max(error.mase for error in errors) or 1)  # all errors may be 0
    axis.set_ylim(-0.4, len(names) - 0.35)
    axis.set_axis_off()
    axis.set_title(f"mean absolute scaled error, {board.description}", loc="left", fontsize=10)


def draw_steps(axis: Any, board: Leaderboard) -> None:
    """Draw the MASE by step ahead, with one line per method."""
    steps = np.arange(1, board.origins.horizon + 1)
    for name in board.forecasts:
        axis.plot(
            steps,
            board.errors[name].by_step,
            color=color_of(board, name),
            linewidth=2.2 if name == board.own else 1.4,
            marker="o" if board.origins.horizon <= 31 else "",
            markersize=4,
            zorder=3 if name == board.own else 2,
        )
    axis.set_ylim(bottom=0)
    axis.set_xlim(0.5, board.origins.horizon + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(f"steps ahead, one per {board.table.frequency}", parse_math=False)
    axis.set_title("mean absolute scaled error by step ahead", loc="left", fontsize=10)
    axis.grid(alpha=0.25)


def draw_series(axis: Any, board: Leaderboard, number: int) -> None:
    """Draw the last values of a series, and the forecasts of all methods in each window."""
    split, windows = board.splits[number], board.windows(number)
    windows = windows[-max(1, SHOWN_STEPS // board.origins.horizon) :]
    starts = [board.origins.places[at][1] for at in windows]
    first = max(0, starts[0] - SHOWN_PAST * board.origins.horizon)
    x = split.series.times
    values = np.where(split.series.observed, split.series.values, np.nan)
    axis.plot(x[first:], values[first:], color="black", linewidth=1.1, zorder=4)
    for at, start in zip(windows, starts, strict=True):
        ahead = x[start : start + board.origins.horizon]
        axis.axvline(x[start], color="black", alpha=0.12, linewidth=0.8)
        for name, forecasts in board.forecasts.items():
            main = name == board.own
            style = {"color": color_of(board, name), "linewidth": 2 if main else 1.0, "zorder": 5 if main else 2}
            axis.plot(
                ahead, forecasts[at].median, marker="o" if board.origins.horizon == 1 else "", markersize=4, **style
            )
            if main:
                lower, upper = forecasts[at].interval(80)
                axis.fill_between(ahead, lower, upper, color=OWN_COLOR, alpha=0.18, linewidth=0)
    axis.set_title(split.series.name[:100], loc="left", fontsize=10, parse_math=False)
    axis.margins(x=0.01)
    axis.grid(alpha=0.25)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Any, board: Leaderboard, actual: bool = True) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], color="black", label="actual values")] if actual else []
    handles += [Line2D([], [], color=color_of(board, name), linewidth=2, label=name) for name in board.forecasts]
    if actual:
        handles.append(Patch(color=OWN_COLOR, alpha=0.18, label=f"80 % interval, {board.own}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3), frameon=False, fontsize=9)
