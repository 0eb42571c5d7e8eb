"""Write a line to ``test-measurements.md`` in the folder of the runs each time a network is measured on a test part."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOG = "test-measurements.md"
HEAD = "| time | model | data | first metric | commit | command |\n|---|---|---|---|---|---|\n"


def record(runs: Path, card: Mapping[str, Any]) -> None:
    """Append a line with the first metric of ``card`` to the log. Prints a warning if the log cannot be written."""
    name, metric = next(iter(card["metrics"].items()), ("none", {"value": 0.0, "decimals": 0}))
    data = ", ".join(name for name in card["data"] if "@" not in name)
    figure = f"{name} {metric['value']:.{metric['decimals']}f}"
    time = datetime.now(UTC).isoformat(timespec="seconds")
    cells = (time, card["name"], data, figure, card["commit"], f"`{card['command']}`")
    line = "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |\n"
    path = runs / LOG
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write((HEAD if file.tell() == 0 else "") + line)
    except OSError as error:
        print(f"this measurement on the test part could not be logged in {path}: {error.strerror}")
