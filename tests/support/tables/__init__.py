"""Tables of users."""

from __future__ import annotations

from pathlib import Path


def write_table(folder: Path, lines: list[str]) -> Path:
    """Write a CSV file and return its path."""
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path
