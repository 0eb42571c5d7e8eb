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


def record(runs: Path, card: Mapping[str, Any], run: str = "") -> list[dict[str, Any]]:
    """Append the first metric of ``card`` to the log. Prints a warning if the log cannot be written.

    Return the earlier measurements of this model on the same data, for the field ``earlier_readings`` of a card.
    ``run``: the name of the run; its own measurements before it was resumed do not count.
    """
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": card["name"],
        "run": run,
        "data": ", ".join(name for name in card["data"] if "@" not in name),
        "metrics": {name: metric["value"] for name, metric in [*card["metrics"].items()][:1]},
        "commit": card["commit"],
        "command": card["command"],
    }
    path = runs / LOG
    try:
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            lines = [json.loads(text) for text in file]
            file.write(json.dumps(line) + "\n")
    except (OSError, ValueError) as error:
        print(f"this measurement on the test part could not be logged in {path}: {error}")
        return []
    return [
        {"reason": f"{each['time']}: {each['command']}", "metrics": each.get("metrics", {})}
        for each in lines
        if each.get("run") != run and all(each[key] == line[key] for key in ("model", "data"))
    ]
