"""Markdown tables for the generated pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[str] = ()) -> str:
    """Return a Markdown table. The columns whose heads are in ``numbers`` are aligned to the right."""
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join('--:' if head in numbers else '---' for head in heads)}|"]
    lines += ["|" + "|".join(f" {text} " if (text := cell(value)) else " " for value in row) + "|" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    """Return a value on one line, for a table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def code(value: object) -> str:
    """Return a value as Markdown code, or an empty text for an empty value."""
    return f"`{value}`" if value not in ("", None) else ""


def sentence(text: str | None) -> str:
    """Return the first paragraph of a docstring in Markdown."""
    paragraph = (text or "").strip().split("\n\n", 1)[0]
    return " ".join(paragraph.split()).replace("``", "`")
