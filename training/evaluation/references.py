"""Write the features of the validation data into the cards of published versions, so that the service reports drift.

    python -m training.evaluation.references [--store DIR] NAME ...

A training writes the reference itself. The command is for the active versions of models that have none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from app import store
from app.store import Store
from app.tasks import TASKS
from training.data import datasets, texts
from training.data.image_dataset import ImageDataset, subset
from training.evaluation.drift import reference_of
from training.evaluation.evaluate import own_data
from training.loops.own_series import OwnSeries
from training.options import STORE, STORE_HELP


def examples(card: store.Card, models: Path, part: str) -> list[Any]:
    """Return images uint8 [C, S, S], series [T] or prompts of the part ``validation`` or ``test``.

    Prompts and own series for validation may be from the training part, because their features do not depend on the
    network. Of M4, the even-numbered series are for validation, and the odd-numbered ones are for testing.
    """
    if card.task == "sample":  # drift is about inputs, and generators have none
        return []
    own = own_data(card, models)
    sources = [own] if own else [getattr(datasets, name)() for name in card.data]
    return [example for data in sources for example in _examples(data, card.held_out, is_test=part == "test")]


def _examples(data: Any, held_out: int | None, is_test: bool) -> Iterable[Any]:
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
