"""Compute the histograms and thresholds with which the service reports drift, from validation data.

The thresholds are calibrated so that one window in 200 has a feature above its threshold: 2,000 times, a random half of
the validation data gives the histograms, and a window is drawn from the other half.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from app.records.drift import CHARACTERS, Features, image_features, series_features, stability_index, text_features
from app.store.card import Histogram, Reference
from training.limits import limits

BINS, WINDOWS = 10, 2000
CHARACTER_BINS = 20  # with 10, texts in lower case only are not noticed
FALSE_ALARMS = 0.005  # half of the aim, because test data differ from validation data a little
MIN_INDEX = 0.05  # a smaller population stability index is no drift, also if the validation data never change


def rows_of(predictor: Any, inputs: Sequence[Any]) -> list[Features]:
    """Return the features of the requests with these images, series or prompts."""
    if predictor.card.task == "continue":
        return [row for prompt in inputs for row in text_features(prompt)]
    if predictor.card.task == "forecast":
        arrays = [np.asarray(values, float) for values in inputs]
        return [series_features(values, predictor.parse(values, 1).season) for values in arrays]
    rows: list[Features] = []
    for at in range(0, len(inputs), 100):
        batch = inputs[at : at + 100]
        pairs = zip(batch, predictor.predict(batch), strict=True)
        rows += [image_features(image.numpy(), probabilities) for image, probabilities in pairs]
    return rows


def reference_of(predictor: Any, batches: Iterable[Iterable[Any]]) -> dict[str, Any] | None:
    """Return the histograms and thresholds of the features of batches of validation data, in the form of the card.

    Return None if there are fewer examples than a window has requests. Each prompt counts as ten characters.
    """
    rows = [row for batch in batches for row in rows_of(predictor, list(batch))]
    window, classes = limits().drift_window, len(predictor.card.labels or [])
    bins = BINS
    if predictor.card.task == "continue":
        window, bins = window * CHARACTERS, CHARACTER_BINS
    if len(rows) < window:
        return None
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    edges = {name: np.unique(np.quantile(each, np.arange(1, bins) / bins)) for name, each in table.items()}
    if "label" in table:
        edges["label"] = np.arange(classes - 1) + 0.5

    def histogram(name: str, chosen: np.ndarray, threshold: float = 1.0) -> Histogram:
        bins = np.searchsorted(edges[name], table[name][chosen], side="right")
        counts = np.bincount(bins, minlength=len(edges[name]) + 1).tolist()
        return Histogram(edges=[float(f"{edge:.6g}") for edge in edges[name]], counts=counts, threshold=threshold)

    generator, half = np.random.default_rng(0), len(rows) // 2
    indices = []
    for _ in range(WINDOWS):
        order = generator.permutation(len(rows))
        indices.append(
            [stability_index(histogram(name, order[:half]), table[name][order[half : half + window]]) for name in table]
        )
    usual = np.quantile(indices, 1 - FALSE_ALARMS, axis=0).clip(min=MIN_INDEX)
    thresholds = usual * np.quantile((indices / usual).max(axis=1), 1 - FALSE_ALARMS).clip(min=1)
    everything = np.arange(len(rows))
    found = {
        name: histogram(name, everything, float(f"{limit:.4g}")) for name, limit in zip(table, thresholds, strict=True)
    }
    return Reference(window=window, features=found).model_dump()
