"""Write a line to a log each time that a network is measured on a test part.

Measurements on public data sets belong to the repository, so a git checkout logs them in training/LOG.md. Measurements
on users' data are logged in test-measurements.md in the folder of the runs. Without a git checkout, all measurements
are logged in test-measurements.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOG = Path(__file__).parent / "LOG.md"  # ends with the table of measurements, so that rows can be appended
OWN_LOG = "test-measurements.md"
HEAD = "| time | model | data | first metric | commit | command |\n|---|---|---|---|---|---|\n"


def record(runs: Path, card: Mapping[str, Any], own_data: bool) -> None:
    """Append a line with the first metric of ``card`` to the log. Prints a warning if the log cannot be written.

    ``own_data``: whether the metrics were measured on a user's data.
    """
    name, metric = next(iter(card["metrics"].items()), ("none", {"value": 0.0, "decimals": 0}))
    data = ", ".join(name for name in card["data"] if "@" not in name)
    figure = f"{name} {metric['value']:.{metric['decimals']}f}"
    time = datetime.now(UTC).isoformat(timespec="seconds")
    cells = (time, card["name"], data, figure, card["commit"], f"`{card['command']}`")
    line = "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |\n"
    path = LOG if not own_data and _is_writable_checkout() else runs / OWN_LOG
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write((HEAD if file.tell() == 0 else "") + line)
    except OSError as error:
        print(f"this measurement on the test part could not be logged in {path}: {error.strerror}")


def _is_writable_checkout() -> bool:
    return (LOG.parents[1] / ".git").exists() and os.access(LOG, os.W_OK)
