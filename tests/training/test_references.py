"""The reference on a card, which trainings and `training.evaluation.references` write from the validation data."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trainings import KINDS, SALES, set_limits

from app.store import Store
from training.evaluation import references

IMAGE_FEATURES = ["brightness", "contrast", "sharpness", "confidence", "label"]


@pytest.mark.parametrize(
    ("kind", "features"),
    [
        ("own-cnn", IMAGE_FEATURES),
        ("cnn", IMAGE_FEATURES),
        ("gated", ["character", "word"]),
        ("own-lstm", ["level", "steps", "shift", "seasonality", "missing"]),
    ],
)
def test_a_training_writes_the_reference_that_the_command_writes(
    kind: str, features: list[str], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = KINDS[kind].model
    if kind == "own-lstm":
        values = [int(line) for line in SALES.splitlines()[1:]]
        rows = [f"{value},{2 * value + 5 * (i % 3)},{300 - value},{7 * value}" for i, value in enumerate(values)]
        Path("sales.csv").write_text("\n".join(["a,b,c,d", *rows]))
    set_limits(monkeypatch, drift_window=1000)
    KINDS[kind].train(workspace, "--no-refit" if KINDS[kind].own else "--no-activate")
    assert Store(Path("models_store")).card(name, 1).reference is None  # too few examples
    with pytest.raises(SystemExit):
        references.main([name])
    set_limits(monkeypatch, drift_window=4)
    assert references.main([name]) == 0
    written = Store(Path("models_store")).verify(name, 1).card.reference
    assert written
    assert list(written.features) == features
    assert len({sum(each.counts) for each in written.features.values()}) == 1  # each example counts once
    labels = Store(Path("models_store")).card(name, 1).labels
    assert not labels or len(written.features["label"].counts) == len(labels)
    KINDS[kind].train(workspace, "--no-refit" if KINDS[kind].own else "--no-activate", "--name", "again")
    assert Store(Path("models_store")).card("again", 1).reference == written
