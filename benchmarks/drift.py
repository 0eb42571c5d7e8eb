"""Measure how often drift is reported without reason, and after how many requests changes are reported.

    python -m benchmarks drift
    python -m benchmarks drift mnist-judge

The requests are drawn from the test data, for forecasters from the odd-numbered series of M4; prompts have 100
characters. A window of them without change should have no alarm. Then the newest requests of the window change, five
at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app.records.drift import CHARACTERS, Features, drift
from app.store import Store, TaskName
from app.tasks import TASKS
from benchmarks.support import report
from benchmarks.support.servers import ROOT
from training.data import texts
from training.evaluation.drift import rows_of
from training.evaluation.references import examples

MODELS = ["mnist-judge", "cifar10-lenet", "cifar10-whitened", "cifar10-accurate", "series-lstm", "shakespeare-rnn"]
WINDOWS, CHANGES, STEP = 1000, 100, 5
MANUAL = ROOT / "docs" / "how-to"


def blur(image: Tensor) -> Tensor:
    """Return the means of 3 x 3 pixels."""
    return F.avg_pool2d(image[None].float(), 3, 1, 1)[0].to(torch.uint8)


def noise(image: Tensor) -> Tensor:
    """Add Gaussian noise with a standard deviation of 16 of 256."""
    return (image + 16 * torch.randn(image.shape)).clamp(0, 255).to(torch.uint8)


def level_shift(values: Tensor) -> Tensor:
    """Raise the last quarter by two standard deviations."""
    last = len(values) // 4
    return torch.cat([values[:-last], values[-last:] + 2 * values.std()])


FUNCTIONS: dict[TaskName, dict[str, Callable[[Any], Any]]] = {
    "classify": {"blur": blur, "noise": noise},
    "forecast": {"level shift": level_shift},
    "continue": {"upper case": str.upper, "lower case": str.lower},
}


def measure(store: Path, name: str) -> list[list[Any]]:
    """Return rows: the model, the change, and the share of windows with an alarm, or the numbers of requests."""
    models = Store(store)
    version = models.read(name, models.roles(name).active or 0)
    predictor: Any = TASKS[version.card.task].load(version, torch.device("cpu"))
    reference, task = version.card.reference, version.card.task
    assert reference
    window, generator = reference.window, np.random.default_rng(1)
    rows_per_request = CHARACTERS if task == "continue" else 1
    inputs = examples(version.card, store, "test")

    def is_alarm(rows: Sequence[Features]) -> bool:
        return max(drift(reference, rows).values()) > 1

    def draw(rows: Sequence[Features]) -> list[Features]:
        return [rows[i] for i in generator.choice(len(rows), window, replace=False)]

    usual = rows_of(predictor, inputs)
    rows: list[list[Any]] = [[version.label, "none", sum(is_alarm(draw(usual)) for _ in range(WINDOWS)) / WINDOWS]]
    for change, function in FUNCTIONS[task].items():
        rows.append([change, rows_of(predictor, [function(each) for each in inputs])])
    if task == "continue":
        manual = "".join(path.read_text() for path in sorted(MANUAL.glob("*.md")))
        rows.append(["this manual", rows_of(predictor, texts.chunks(manual))])
    if task == "classify":
        rows.append(["half of the classes", [row for row in usual if row["label"] < len(predictor.labels) // 2]])
    for at, (change, changed) in enumerate(rows[1:], 1):
        delays = []
        for _ in range(CHANGES):
            before, after = draw(usual), draw(changed)
            counts = range(STEP * rows_per_request, window + 1, STEP * rows_per_request)
            first = next((n for n in counts if is_alarm([*after[:n], *before[n:]])), np.inf)
            delays.append(first / rows_per_request)
        rows[at] = [version.label, change, None, *map(float, np.quantile(delays, [0.5, 0.95]))]
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", default=MODELS, help=f"models (default: {', '.join(MODELS)})")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    torch.manual_seed(0)
    rows = [row + [None] * (5 - len(row)) for name in options.names for row in measure(ROOT / "models_store", name)]
    columns = {"model": None, "change": None, "windows with an alarm": 3, "requests, median": 0, "requests, 95 %": 0}
    return [report.table("drift", columns, rows)], []
