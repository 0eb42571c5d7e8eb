"""The commands ``compare`` and ``promote`` of ``quartet models``, for shadows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.capture import existing
from app.errors import QuartetError
from app.store import RolloutRefused, Store, StoreError

if TYPE_CHECKING:  # takes seconds to import
    from app.records.comparison import Comparison


def compare(store: Store, name: str, folder: Path) -> tuple[int, int, Comparison]:
    """Return the active version, the shadow and their comparison. Raises StoreError."""
    from app.records.comparison import compare_versions

    roles = store.roles(name)
    if roles.active is None or roles.shadow is None:
        raise RolloutRefused(f"{name} has no shadow; `shadow {name} VERSION` makes a version the shadow")
    active, shadow = roles.active, roles.shadow.version
    try:
        compared = compare_versions(existing(folder), store.card(name, active).task, name, active, shadow)
    except QuartetError as error:
        raise StoreError(str(error)) from None
    return active, shadow, compared


def table(active: int, shadow: int, compared: Comparison) -> list[tuple[object, ...]]:
    """Return the lines of a comparison."""

    def number(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.4g}"

    lines: list[tuple[object, ...]] = [
        ("FIGURE", f"VERSION {active}", f"VERSION {shadow}", "DIFFERENCE", "95 % INTERVAL", "REQUESTS")
    ]
    for row in compared.rows:
        bounds = "-" if row.difference is None else " to ".join(number(bound, "+") for bound in row.interval)
        means = number(row.active), number(row.shadow), number(row.difference, "+")
        lines.append((row.name, *means, bounds, row.requests))
    return lines
