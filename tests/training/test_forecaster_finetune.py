"""Fine-tuning of the forecaster on own series: held-out values, metrics and publishing."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.networks import FORECASTER, tiny_card
from support.service import TEST, serving

from app import store
from app.networks import build
from app.settings import Settings
from app.store import rollout
from app.tasks.classification import ImageClassifier
from app.tasks.forecasting import GlobalForecaster
from training import lstm, publishing
from training.data import tables
from training.data.datasets import DataError
from training.data.tables import ReadOptions
from training.evaluation import backtest, generation
from training.loops import forecaster_finetune
from training.options import base_version

SHORT = ["--season", "4", "--epochs", "8", "--batch", "32", "--learning-rate", "0.02", "--threads", "1"]


def sold(seed: int, count: int = 120) -> np.ndarray:
    """Sales with a season of four days, and so much noise that seasonal naive is poor."""
    return 50 + 10 * np.sin(np.pi * np.arange(count) / 2) + np.random.default_rng(seed).normal(0, 4, count)


def written(path: Path, **series: Any) -> Path:
    """A CSV with a column for each series; None is an empty cell."""
    count = max(len(values) for values in series.values())
    rows = [
        [(date(2024, 1, 1) + timedelta(days=i)).isoformat()]
        + ["" if i >= len(values) or values[i] is None else f"{values[i]:.6g}" for values in series.values()]
        for i in range(count)
    ]
    path.write_text("\n".join(",".join(row) for row in [["day", *series], *rows]) + "\n")
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with sales of two shops and a store with a tiny, untrained forecaster."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "sales.csv", north=sold(1), south=sold(2))
    torch.manual_seed(3)
    card = tiny_card("series-lstm", "forecast", "forecaster", FORECASTER, {})
    store.publish(tmp_path / "models_store", card, build("forecaster", FORECASTER).state_dict())
    return tmp_path


def train(*more: str, file: str = "sales.csv") -> None:
    lstm.main(["--csv", file, "--name", "sales", *SHORT, *more])


def test_a_forecaster_that_improves_is_published_and_served(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train()
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("Fine-tuning helped: quantile loss 0.")
    version = store.read_version(place / "models_store", "sales", 1)
    card = version.card
    losses = [card.metrics[f"{name}quantile_loss"].value for name in ("", "naive_", "untuned_")]
    assert losses == sorted(losses)
    assert set(card.metrics) == {
        f"{name}{key}" for name in ("", "untuned_", "naive_") for key in ("mase", "quantile_loss", "coverage_95")
    }
    assert card.metrics["mase"].split == "14 forecasts of 4 steps, from 2 series, on values held out of training"
    assert "Fine-tuned from series-lstm@1. Fine-tuning helped" in card.notes
    with serving(Settings(store=place / "models_store", **TEST)) as client:
        body: dict[str, Any] = {"values": sold(9).tolist(), "horizon": 4, "seasonality": 4}
        answers = {
            model: client.post("/v1/series/forecast", json={**body, "model": model}).json()
            for model in ("sales", "series-lstm")
        }
        assert answers["sales"]["version"] == 1
        middle, before = (np.array(one["results"][0]["median"]) for one in answers.values())
        tuned = GlobalForecaster(version, torch.device("cpu"))
        assert middle == pytest.approx(tuned.predict([tuned.parse(body["values"], 4, seasonality=4)])[0].median)
        assert not np.allclose(middle, before)
        assert client.get("/v1/models/sales").json()["card"]["metrics"]["mase"]["value"] == card.metrics["mase"].value


def test_without_improvement_only_force_publishes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--learning-rate", "1e-9")
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("Fine-tuning did not help: quantile loss ")
    assert told.endswith("Nothing was published; --force publishes anyway.")
    assert not (place / "models_store" / "sales").exists()
    (folder,) = (place / "runs" / "sales").iterdir()
    assert (folder / "finished").exists()
    assert "Fine-tuning did not help" in json.loads((folder / "card.json").read_text())["notes"]
    train("--learning-rate", "1e-9", "--force")
    assert "Fine-tuning did not help" in store.read_card(place / "models_store" / "sales" / "1").notes


@pytest.mark.parametrize(
    ("losses", "begin"),
    [
        ((0.5, 0.6, 0.7), "Fine-tuning helped: quantile loss 0.500; before fine-tuning 0.600, seasonal naive 0.700"),
        ((0.597, 0.6, 0.7), "Fine-tuning did not help: "),
        ((0.6, 0.5, 0.7), "Fine-tuning did not help: "),
        ((0.7, 0.8, 0.7), "Fine-tuning did not help enough: "),
    ],
)
def test_fine_tuning_helped_if_it_beats_the_base_version_and_seasonal_naive(losses: Any, begin: str) -> None:
    names = ("", "untuned_", "naive_")
    metrics = {f"{name}quantile_loss": {"value": loss} for name, loss in zip(names, losses, strict=True)}
    helped, sentence = forecaster_finetune.verdict(metrics)
    assert sentence.startswith(begin)
    assert helped == begin.startswith("Fine-tuning helped")


def test_test_values_do_not_influence_the_weights(place: Path) -> None:
    train("--force")
    values = sold(1), sold(2)
    changed = [np.concatenate([one[:92], one[92:] * 3]) for one in values]  # of 120 values 28 test
    written(place / "sales.csv", north=changed[0], south=changed[1])
    train("--force")
    first, second = (store.read_version(place / "models_store", "sales", 1), place / "models_store" / "sales" / "2")
    assert not second.exists()  # the same weights, so that there is nothing to publish
    runs = sorted((place / "runs" / "sales").iterdir())
    cards = [json.loads((folder / "card.json").read_text()) for folder in runs]
    assert cards[0]["metrics"] != cards[1]["metrics"]
    assert cards[0]["data"] != cards[1]["data"]
    assert first.card.data["series-lstm@1"] == cards[1]["data"]["series-lstm@1"]


def test_backtest_metrics_equal_a_plain_loop_over_all_origins(tmp_path: Path) -> None:
    values = sold(1).tolist()
    values[100] = None
    table = tables.without_gaps(tables.read(written(tmp_path / "one.csv", north=values), ReadOptions(season=4)))
    (parts,) = backtest.split(table, 4)
    assert (parts.validation, parts.test) == (68, 92)
    tried = backtest.origins([parts], 4, 4, "test")
    assert [len(past) for past in tried.past] == list(range(92, 120, 4))
    series = table.series[0].values
    unit = np.mean([abs(series[i] - series[i - 4]) for i in range(4, 68)])
    errors = []
    for at in range(92, 120, 4):
        known = [i for i in range(at, at + 4) if values[i] is not None]
        errors.append(np.mean([abs(series[i] - series[i - 4]) for i in known]) / unit)
    found = backtest.metrics(tried, backtest.seasonal_naive)
    assert found["mase"] == pytest.approx(np.mean(errors))
    validated = backtest.origins([parts], 4, 4, "validation")
    assert [len(past) for past in validated.past] == list(range(68, 89))
    assert [len(past) for past in validated.subset(3).past] == [68, 78, 88]


def test_the_quantile_loss_of_a_forecast_with_equal_quantiles_is_its_mase(tmp_path: Path) -> None:
    table = tables.read(written(tmp_path / "one.csv", north=sold(1)), ReadOptions(season=4))
    tried = backtest.origins(backtest.split(table, 4), 4, 4, "test")

    def sure(past: Any, season: int, horizon: int) -> Any:
        answers = backtest.seasonal_naive(past, season, horizon)
        for answer in answers:
            answer.quantiles[:] = answer.median[:, None]
        return answers

    found = backtest.metrics(tried, sure)
    assert found["quantile_loss"] == pytest.approx(found["mase"])
    assert found["coverage_95"] == 0


def test_a_horizon_beyond_the_networks_own_is_tested_too(place: Path) -> None:
    train("--horizon", "9", "--force")
    card = store.read_card(place / "models_store" / "sales" / "1")
    assert card.metrics["mase"].split.startswith("6 forecasts of 9 steps")


def test_series_that_are_too_short_or_never_change_are_left_out_by_name(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = np.tile([1.0, 2, 3, 4], 30)
    written(place / "sales.csv", north=sold(1), new=sold(2, 31), still=steps, young=sold(3, 12))
    train("--horizon", "12", "--force")
    told = capsys.readouterr().out
    assert "new: 31 values; season 4 and horizon 12 need at least 44" in told
    assert "still: its first 72 values repeat exactly with season 4" in told
    assert "young: 12 values; season 4 and horizon 12 need at least 44" in told
    assert "from 1 series" in store.read_card(place / "models_store" / "sales" / "1").metrics["mase"].split


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--horizon", "60"], "sales.csv: no series can be trained on and tested; south: 120 values; season 4"),
        (["--horizon", "-1"], "--horizon is -1; allowed are 1 or more"),
        (["--season", "365"], "--season is 365; allowed are 1 (no season) to 168 steps"),
        (["--season", "0"], "--season is 0; allowed are"),
        (["--from", "nobody"], "--from nobody: not in models_store, which holds series-lstm"),
        (["--from", "scratch"], "--from scratch: own series need a published forecaster"),
        (["--column", "east"], "sales.csv has no column 'east'; its columns are: day, north, south"),
    ],
)  # fmt: skip
def test_unusable_data_and_options_are_refused_before_a_run_starts(place: Path, more: list[str], sentence: str) -> None:
    with pytest.raises(DataError) as refused:
        train(*more)
    assert sentence in str(refused.value)
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("count", "frequency", "season", "horizon"),
    [(36, "MS", 12, 6), (104, "W-MON", 52, 6), (90, "D", 7, 6), (14, "QS", 4, 2)],
)
def test_short_business_series_can_be_tuned_and_tested(
    place: Path, count: int, frequency: str, season: int, horizon: int
) -> None:
    days = pd.date_range("2021-01-04" if season == 52 else "2021-01-01", periods=count, freq=frequency)
    values = np.random.default_rng(0).poisson(50 + 40 * np.sin(2 * np.pi * np.arange(count) / season))
    pd.DataFrame({"day": days, "sold": values}).to_csv("short.csv", index=False)
    options, config = lstm.arguments(["--csv", "short.csv", "--name", "short"])
    own = forecaster_finetune.read(options, config.horizon)
    assert (own.table.season, own.horizon) == (season, horizon)
    assert own.traits == store.SeriesTraits(season=season, non_negative=True, integer=True)
    for part in ("validation", "test"):
        assert backtest.origins(own.splits, season, own.horizon, part).past


def test_a_yearly_pattern_of_days_is_used_if_it_helps(place: Path) -> None:
    random, years = np.random.default_rng(0), np.arange(1300) / 365.25
    for strength, year in ((40, 365.25), (0, None)):
        values = 100 + strength * np.sin(2 * np.pi * years) + 5 * (np.arange(1300) % 7) + random.normal(0, 8, 1300)
        days = pd.date_range("2021-01-01", periods=1300)
        pd.DataFrame({"day": days, "sold": values}).to_csv("days.csv", index=False)
        options, config = lstm.arguments(["--csv", "days.csv", "--name", "days"])
        assert forecaster_finetune.read(options, config.horizon).traits.year == year


def test_a_random_walk_has_no_season(tmp_path: Path) -> None:
    walks = {f"w{seed}": np.random.default_rng(seed).normal(size=400).cumsum() for seed in range(4)}
    assert tables.read(written(tmp_path / "walks.csv", **walks)).season == 1


# --- which version is fine-tuned, and which one serves in the end


def test_the_serving_version_is_fine_tuned(place: Path) -> None:
    card = tiny_card("series-lstm", "forecast", "forecaster", FORECASTER, {})
    store.publish(place / "models_store", card, build("forecaster", FORECASTER).state_dict())
    words = ["--csv", "sales.csv", "--name", "sales"]

    def begun(*more: str) -> int:
        version = base_version(lstm.arguments([*words, *more])[0], ("forecaster",))
        assert version is not None
        return version.card.version

    assert begun() == 2
    rollout.activate(place / "models_store", "series-lstm", 1)
    assert begun() == 1
    assert begun("--from", "series-lstm@2") == 2


def test_the_serving_reference_classifier_is_used(tiny_store: Path) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        sizes = {"conv": [2, 3]}
        card = tiny_card(
            generation.REFERENCE_CLASSIFIER, "classify", "digit-net", sizes, {"labels": list("0123456789")}
        )
        store.publish(tiny_store, card, build("digit-net", sizes).state_dict())

    def judge() -> ImageClassifier:
        return generation.load_reference_classifier(tiny_store, "cpu")

    assert judge().card.version == 2
    rollout.activate(tiny_store, generation.REFERENCE_CLASSIFIER, 1)
    assert judge().card.version == 1
    assert generation.load_reference_classifier(tiny_store, "cpu", 2).card.version == 2


def test_a_version_published_under_another_active_one_is_reported_as_waiting(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = place / "models_store"
    train("--force")
    assert "waits" not in capsys.readouterr().out
    rollout.activate(models, "sales", 1)
    train("--force", "--seed", "1")
    told = capsys.readouterr().out
    command = "python -m app.models activate sales 2"
    assert f"sales@2 is not active; sales@1 is. To activate the new version: {command}\n" in told
    train("--force", "--seed", "1", "--store", str(models))
    told = capsys.readouterr().out
    assert "sales@2 already has these weights" in told
    assert f"{command} --store {models}\n" in told
    assert rollout.numbers(models, "sales") == [1, 2]


def test_a_run_killed_after_publishing_does_not_publish_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(publishing.rollout, "serving", killed)
        with pytest.raises(KeyboardInterrupt):
            train("--force", "--from", "series-lstm@1")
    card = tiny_card("sales", "forecast", "forecaster", FORECASTER, {})
    store.publish(place / "models_store", card, build("forecaster", FORECASTER).state_dict())  # by somebody else
    train("--force", "--from", "series-lstm@1", "--resume")
    assert rollout.numbers(place / "models_store", "sales") == [1, 2]
