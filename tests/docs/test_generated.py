"""Generated pages are up to date. If a test here fails, run ``make docs`` or ``make report``."""

from __future__ import annotations

import json
import re

from support.service import ROOT

from app.store import Store
from docs import card_metrics, generate, measurements


def test_the_reference_pages_are_up_to_date() -> None:
    stale = [path.name for path, text in generate.pages().items() if path.read_text("utf-8") != text]
    assert not stale, "run make docs"
    assert {path.name for path in generate.FOLDER.iterdir()} == {path.name for path in generate.pages()}


def test_the_page_of_the_model_card_explains_every_metric_of_the_included_models() -> None:
    explained = card_metrics.names()
    assert card_metrics.base_name("untuned_known_mase") in explained  # of versions that use known covariates
    store = Store(ROOT / "models_store")
    cards = [store.card(*key) for key in store.versions()]
    assert cards
    for card in cards:
        assert not {card_metrics.base_name(name) for name in card.metrics} - explained, card.name


def test_the_measurements_are_up_to_date() -> None:
    stale = [path.name for path, text in measurements.pages().items() if path.read_text("utf-8") != text]
    assert not stale, "run make report"


def test_every_measurement_names_its_command_machine_and_date() -> None:
    results = sorted(measurements.RESULTS.rglob("*.json"))
    assert results
    for path in results:
        content = json.loads(path.read_text("utf-8"))
        assert all(content[key] for key in ("title", "command", "machine")), path
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"]), path
