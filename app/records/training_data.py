"""Captured requests with feedback as files from which networks are trained."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import orjson

from app.records.database import Database

TEST_SHARE = 0.2  # of the images, the newest


def training_data(database: Database, model: str) -> str:
    """Return the content of a file with what feedback says was true, oldest requests first.

    Images: a CSV with path, label and split; the newest fifth is the test part. Series: a CSV with series and value, in
    which the later values follow the captured ones. Texts: each prompt with its accepted or corrected text.
    """
    rows = database.truths(model)
    task = rows[0].task if rows else ""
    if task == "continue":
        return "\n\n".join(_texts(rows)) + "\n"
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    if task == "classify":
        first_test = len(rows) - round(TEST_SHARE * len(rows))
        lines.writerow(["path", "label", "split"])
        for number, row in enumerate(rows):
            part = "test" if number >= first_test else "train"
            lines.writerow([database.image(row.digest).resolve(), orjson.loads(row.truth), part])
    elif task == "forecast":
        lines.writerow(["series", "value"])
        lines.writerows(_values(rows))
    return table.getvalue()


def _texts(rows: Sequence[Any]) -> Iterator[str]:
    for row in rows:
        job, truth, text = map(orjson.loads, (row.job, row.truth, row.answer))
        if truth is not False:
            prompt = job["prompts"][row.item // job["n"]]
            yield prompt + (text["texts"][row.item] if truth is True else truth)


def _values(rows: Sequence[Any]) -> Iterator[tuple[str, float | None]]:
    for (request, item), group in groupby(rows, key=lambda row: (row.id, row.item)):
        later = {row.step: row for row in group}
        captured = orjson.loads(next(iter(later.values())).job)["series"][item]
        values = [orjson.loads(later[step].truth) if step in later else None for step in range(max(later) + 1)]
        yield from ((f"{request}-{item}", value) for value in [*captured, *values])
