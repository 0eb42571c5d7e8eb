"""Write the features of the validation data into the cards of published versions, so that the service reports drift.

    python -m training.evaluation.references [--store DIR] NAME ...

A training calls ``reference_of`` itself. The command is for the active versions of models that have no reference. The
thresholds are calibrated so that one window in 200 has a feature above its threshold: 2,000 times, a random half of the
validation data gives the histograms, and a window is drawn from the other half.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app import store
from app.records.drift import CHARACTERS, Features, image_features, series_features, stability_index, text_features
from app.store import Store
from app.store.card import Histogram, Reference
from app.tasks import TASKS
from training.data import datasets, texts
from training.data.image_dataset import ImageDataset, subset
from training.limits import limits
from training.options import STORE, STORE_HELP

BINS, WINDOWS = 10, 2000
CHARACTER_BINS = 20  # with 10, texts in lower case only are not noticed
FALSE_ALARMS = 0.005  # half of the aim, because test data differ from validation data a little
MIN_INDEX = 0.05  # a smaller population stability index is no drift, also if the validation data never change


def examples(card: store.Card, models: Path, part: str) -> list[Any]:
    """Return images uint8 [C, S, S], series [T] or prompts of the part ``validation`` or ``test``.

    Prompts and own series for validation may be from the training part, because their features do not depend on the
    network. Of M4, the even-numbered series are for validation, and the odd-numbered ones are for testing.
    """
    from training.evaluation.evaluate import own_data  # imported here, because trainings import this module

    if card.task == "sample":  # drift is about inputs, and generators have none
        return []
    own = own_data(card, models)
    sources = [own] if own else [getattr(datasets, name)() for name in card.data]
    return [example for data in sources for example in _examples(data, card.held_out, is_test=part == "test")]


def _examples(data: Any, held_out: int | None, is_test: bool) -> Iterable[Any]:
    from training.loops.own_series import OwnSeries  # as above

    if isinstance(data, datasets.Images):
        return data.measured(None if is_test else held_out)[1]
    if isinstance(data, datasets.Collection):
        return data.past[is_test::2]
    if isinstance(data, datasets.Text):
        return texts.chunks(data.test if is_test else data.train)
    if isinstance(data, OwnSeries):
        return data.past()
    if isinstance(data, ImageDataset):
        images = subset(data.images, data.split()[1 + is_test])
        return (image for batch in images.split(500) for image in batch)
    return ()


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


def main(argv: Sequence[str] | None = None) -> int:
    """Write the references; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="models")
    parser.add_argument("--store", metavar="DIR", type=Path, default=STORE, help=STORE_HELP)
    options = parser.parse_args(argv)
    models = Store(options.store)
    for name in options.names:
        try:
            version = models.read(name, models.roles(name).active or 0)
        except store.StoreError as error:
            parser.error(str(error))
        predictor: Any = TASKS[version.card.task].load(version, torch.device("cpu"))
        path = models.path(name, version.card.version) / store.CARD
        rows = examples(version.card, options.store, "validation")
        if (reference := reference_of(predictor, [rows])) is None:
            parser.error(f"{version.label} has only {len(rows)} validation examples")
        content = {**json.loads(path.read_bytes()), "reference": reference}
        with models.disk.lock(models.folder):
            models.disk.replace(path, store.card_text(content))
        print(f"{name}@{version.card.version}: reference of {len(rows):,} validation examples", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
