"""`training.evaluation.references`: the reference of the validation data on a card."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.trainings import KINDS

from app.store import Store
from training.evaluation import references


@pytest.mark.parametrize("kind", ["own-cnn", "cnn"])
def test_the_reference_has_all_features_and_usual_shares(
    finished: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    models, name = tmp_path / "models_store", KINDS[kind].model
    shutil.copytree(finished(kind) / "models_store", models)
    before = Store(models).card(name, 1)
    assert references.main([name, "--store", str(models), "--window", "4"]) == 0
    card = Store(models).card(name, 1)
    assert card.model_copy(update={"reference": None}) == before
    assert card.reference
    features = card.reference.features
    assert list(features) == ["brightness", "contrast", "sharpness", "confidence", "label"]
    assert len({sum(each.counts) for each in features.values()}) == 1  # each example is in one bin of each feature
    assert len(features["label"].counts) == len(card.labels or [])
    Store(models).verify(name, 1)
