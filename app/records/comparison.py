"""Compare a shadow with the active version, by the figures of the same requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from app.records.database import Database
from app.store import TaskName
from app.store.card import HIGHER_IS_BETTER

MAIN: dict[TaskName, str] = {"classify": "accuracy", "forecast": "mase", "continue": "loss"}  # the figure that decides
MIN_REQUESTS = 30  # fewer differences do not have a normal mean


@dataclass(frozen=True)
class Row:
    """The mean of a figure for the active version and the shadow.

    ``difference`` is the mean of shadow minus active over ``requests`` that have the figure for both, and ``interval``
    its 95 % interval.
    """

    name: str
    active: float | None
    shadow: float | None
    difference: float | None = None
    interval: tuple[float, float] = (-math.inf, math.inf)
    requests: int = 0


@dataclass(frozen=True)
class Comparison:
    """All figures of both versions. ``verdict`` says in words whether the shadow is better."""

    rows: Sequence[Row]
    verdict: str
    is_better: bool


def compare_versions(database: Database, task: TaskName, model: str, active: int, shadow: int) -> Comparison:
    """Compare two versions. The shadow is better if the 95 % interval of its main figure excludes 0."""
    means = {(each["version"], each["name"]): each["mean"] for each in database.figures() if each["model"] == model}
    differences = database.differences(model, shadow, active)
    names = [name for version, name in means if version == shadow]
    rows = [Row(name, means.get((active, name)), means[shadow, name], *differences.get(name, ())) for name in names]
    figure = MAIN.get(task, "")
    sign = 1 if figure in HIGHER_IS_BETTER else -1
    main = next((row for row in rows if row.name == figure and row.difference is not None), None)
    label = f"{model}@{shadow}"
    if main is None or main.requests < MIN_REQUESTS:
        measured = f"{main.requests if main else 0} requests have {figure or 'a main figure'} for both versions"
        return Comparison(rows, f"{label} cannot be judged yet: {measured}, {MIN_REQUESTS} are needed", False)
    low, high = sorted(sign * bound for bound in main.interval)
    result = "is better" if low > 0 else "is worse" if high < 0 else "is not clearly better or worse"
    bounds = " to ".join(f"{bound:+.4g}" for bound in main.interval)
    return Comparison(rows, f"{label} {result}: {figure} {main.difference:+.4g} (95 % interval {bounds})", low > 0)
