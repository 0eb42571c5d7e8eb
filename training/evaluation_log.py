"""Record each measurement on a test part.

``test_measurements.jsonl`` in the folder of the runs gets one JSON object per line. The file of the same name beside
this module has the measurements of the included versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOG = "test_measurements.jsonl"


def record(runs: Path, card: Mapping[str, Any]) -> None:
    """Append the first metric of ``card`` to the log. Prints a warning if the log cannot be written."""
    name, metric = next(iter(card["metrics"].items()), ("none", {"value": 0.0, "decimals": 0}))
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": card["name"],
        "data": ", ".join(name for name in card["data"] if "@" not in name),
        "figure": f"{name} {metric['value']:.{metric['decimals']}f}",
        "commit": card["commit"],
        "command": card["command"],
    }
    path = runs / LOG
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        print(f"this measurement on the test part could not be logged in {path}: {error.strerror}")
