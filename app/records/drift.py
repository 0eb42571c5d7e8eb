"""Compare the inputs and the answers of captured requests with those of the validation data.

The reference on a model card has a histogram of each feature, and the largest population stability index that is
usual. ``training.evaluation.drift`` computes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from app.store.card import Histogram, Reference

EMPTY_SHARE = 0.005  # so that bins may be empty
CHARACTERS = 10  # of each prompt that have features
Features = Mapping[str, float]


def image_features(pixels: np.ndarray, probabilities: Sequence[float]) -> Features:
    """Return the features of an image, given its pixels uint8 [channels, side, side] and its class probabilities.

    The methods ``mean`` and ``std`` of numpy would take twice as long.
    """
    values = pixels.astype(float)
    down, right = values[:, 1:] - values[:, :-1], values[:, :, 1:] - values[:, :, :-1]
    mean, confidence = float(values.sum()) / values.size, max(probabilities)
    return {
        "brightness": mean,
        "contrast": math.sqrt(max(float(np.vdot(values, values)) / values.size - mean * mean, 0.0)),
        "sharpness": float(np.abs(down).sum() + np.abs(right).sum()) / down.size,
        "confidence": confidence, "label": float(probabilities.index(confidence)),
    }  # fmt: skip


@np.errstate(all="ignore")
def series_features(values: np.ndarray, season: int | None) -> Features:
    """Return the features of a series [T] with NaN for missing values, given its season.

    Sizes are logarithms, and changes are relative to the spread of the series.
    """
    known = values[np.isfinite(values)]
    if len(known) < 4:
        return {"missing": 1.0}
    steps, spread, recent = np.diff(known), known.std() or 1.0, -(-len(known) // 4)
    lag = season if season and season < len(steps) else 1
    return {
        "level": float(np.arcsinh(np.median(known))),
        "steps": float(np.arcsinh(np.abs(steps).mean())),
        "shift": float((known[-recent:].mean() - known[:-recent].mean()) / spread),
        "seasonality": float((steps[lag:] * steps[:-lag]).mean() / ((steps**2).mean() or 1.0)),
        "missing": 1 - len(known) / len(values),
    }


def text_features(prompt: str) -> list[Features]:
    """Return the features of evenly spaced characters of a prompt: their code points, and the lengths of their words.

    A few characters of each prompt have the same distribution for short and long prompts.
    """
    lengths = [len(word) for word in re.findall(r"\s|\S+", prompt) for _ in word]
    positions = range(0, len(prompt), -(-len(prompt) // CHARACTERS) or 1)
    return [{"character": float(ord(prompt[at])), "word": float(lengths[at])} for at in positions]


def stability_index(histogram: Histogram, values: Sequence[float] | np.ndarray) -> float:
    """Return the population stability index of values. ``EMPTY_SHARE`` is added to the share of each bin."""
    bins = np.searchsorted(histogram.edges, values, side="right")
    now = np.bincount(bins, minlength=len(histogram.counts)) / len(values) + EMPTY_SHARE
    usual = np.array(histogram.counts) / sum(histogram.counts) + EMPTY_SHARE
    return float(((now - usual) * np.log(now / usual)).sum())


def drift(reference: Reference, rows: Sequence[Features]) -> dict[str, float]:
    """Return for each feature its stability index divided by the threshold; empty for fewer rows than the window."""
    found = {}
    for name, histogram in reference.features.items():
        values = [
            row[name] for row in rows if math.isfinite(row.get(name, math.nan))
        ]  # not if the values were too large
        if len(rows) == reference.window and values:
            found[name] = stability_index(histogram, values) / histogram.threshold
    return found
