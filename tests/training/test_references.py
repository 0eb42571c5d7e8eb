"""The reference on a card, which trainings and `training.evaluation.references` write from the validation data."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trainings import KINDS, set_limits

from app.store import Store
from training.evaluation import references


@pytest.mark.parametrize("kind", ["own-cnn", "cnn"])
def test_a_training_writes_the_reference_that_the_command_writes(
    kind: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = KINDS[kind].model
    KINDS[kind].train(workspace, "--no-refit" if KINDS[kind].own else "--no-activate")
    assert Store(Path("models_store")).card(name, 1).reference is None  # fewer than 100 validation images
    with pytest.raises(SystemExit):
        references.main([name])
    set_limits(monkeypatch, drift_window=4)
    assert references.main([name]) == 0
    written = Store(Path("models_store")).verify(name, 1).card.reference
    assert written
    assert list(written.features) == ["brightness", "contrast", "sharpness", "confidence", "label"]
    assert len({sum(each.counts) for each in written.features.values()}) == 1  # each example counts once
    assert len(written.features["label"].counts) == len(Store(Path("models_store")).card(name, 1).labels or [])
    KINDS[kind].train(workspace, "--no-refit" if KINDS[kind].own else "--no-activate", "--name", "again")
    assert Store(Path("models_store")).card("again", 1).reference == written
