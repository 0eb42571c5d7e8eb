"""Tables of measured figures. They are printed as Markdown, and saved as JSON in benchmarks/results/."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from app.tasks.speed import processor
from docs import markdown

Table = dict[str, Any]  # title; columns: the decimals of each column, or None for texts; rows
SOFTWARE = ("torch", "fastapi", "uvicorn", "uvloop", "httptools", "pillow", "numpy")


def table(title: str, columns: Mapping[str, int | None], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table with rounded numbers. NaN becomes None, because JSON cannot represent it."""
    rounded = [[_rounded(value, digits) for value, digits in zip(row, columns.values(), strict=True)] for row in rows]
    return {"title": title, "columns": dict(columns), "rows": rounded}


def _rounded(value: Any, digits: int | None) -> Any:
    if not isinstance(value, float) or digits is None:
        return value
    return None if math.isnan(value) else round(value, digits or None)


def figures(*rows: tuple[str, Any, str]) -> Table:
    """Return a table with one figure in each row: its name, its value and its unit."""
    return {"title": "", "columns": {"figure": None, "value": "g", "unit": None}, "rows": [list(row) for row in rows]}


def show(content: Table) -> str:
    """Return a table in Markdown."""
    columns = content["columns"]
    rows = [
        ["" if value is None else f"{value:,}" if isinstance(value, int | float) else value for value in row]
        for row in content["rows"]
    ]
    text = markdown.table(list(columns), rows, [name for name, digits in columns.items() if digits is not None])
    return f"{content['title']}\n\n{text}" if content["title"] else text


def save(path: Path, command: str, tables: Sequence[Table]) -> None:
    """Write tables with the command, the machine and the date."""
    cores = len(os.sched_getaffinity(0))
    content = {
        "title": path.stem,
        "command": command,
        "machine": f"{processor()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}",
        "date": time.strftime("%Y-%m-%d"),
        "software": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SOFTWARE),
        "tables": list(tables),
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
