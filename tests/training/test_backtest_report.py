"""The report of ``--backtest``: its forecasts, its page, and the pictures of published versions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from support.networks import FORECASTER, tiny_card
from support.service import TEST, serving

from app.networks import build
from app.settings import Settings
from app.store import Store
from app.tasks.forecasting import QuantileForecast
from training import lstm
from training.data.datasets import DataError
from training.data.tables import Series, Table
from training.evaluation import backtest, forecast_metrics, forecaster
from training.evaluation.backtest import Split
from training.evaluation.report import ets, results
from training.evaluation.report.figures import draw_errors

PLAIN, STRANGE = "north", "<b>$\\frac&"  # names of series
TRAINING = ["--csv", "sales.csv", "--epochs", "1", "--batch", "16", "--threads", "1", "--season", "4", "--backtest"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with two series, and a store with a tiny, untrained forecaster."""
    monkeypatch.chdir(tmp_path)
    days = pd.date_range("2024-01-01", periods=120).strftime("%Y-%m-%d")
    pd.DataFrame({"day": days, PLAIN: sales(1), STRANGE: sales(2)}).to_csv("sales.csv", index=False)
    torch.manual_seed(3)
    card = tiny_card("series-lstm", "forecast", "forecaster", FORECASTER, {})
    Store(tmp_path / "models_store").publish(card, build("forecaster", FORECASTER).state_dict())
    return tmp_path


def sales(seed: int, length: int = 120) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 2, length)
    return 50 + 0.2 * np.arange(length) + 10 * np.sin(np.pi * np.arange(length) / 2) + noise


def split(values: np.ndarray, name: str = PLAIN) -> Split:
    observed = np.ones(len(values), bool)
    return Split(Series(name, values, "2024-01-01", observed), len(values) - 24, len(values) - 12)


@pytest.mark.parametrize("season", [1, 4, 7, 12, 24, 52])
def test_all_series_with_the_stated_number_of_values_can_be_split(season: int) -> None:
    fewest = max(season + 2, backtest.MIN_PAST) + 3  # for a horizon of one step
    for count in range(fewest - 1, 10 * season + 60):
        one = Series("sales", np.random.default_rng(count).random(count), "2024-01-01", np.ones(count, bool))
        table = Table("sales.csv", [one], "day", season, [])
        horizon = min(season, backtest.longest_horizon(table))
        if count < fewest:
            with pytest.raises(DataError, match=f"{count} values; season {season} .* need at least {fewest},"):
                backtest.split(table, horizon)
        else:
            (parts,) = backtest.split(table, horizon)
            assert parts.validation + horizon <= parts.test <= count - horizon


@pytest.mark.slow
def test_a_published_version_has_the_report_as_a_picture(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lstm.main([*TRAINING, "--name", "sales", "--force"])
    page_path = Path(re.findall(r"wrote (\S+backtest\.html)", capsys.readouterr().out)[0])
    page = page_path.read_text("utf-8")
    card = Store(workspace / "models_store").card("sales", 1)
    rows = {
        cells[0]: cells[1:]
        for cells in (re.findall(r"(?:</span>|<td[^>]*>)([^<]+)</td>", row) for row in page.split("<tr>"))
        if cells
    }
    assert list(rows)[:4] == ["seasonal naive", "ETS", "series-lstm@1, not tuned", "sales, tuned"]
    for method, prefix in (
        ("sales, tuned", ""),
        ("series-lstm@1, not tuned", "untuned_"),
        ("seasonal naive", "naive_"),
    ):
        assert float(rows[method][0]) == pytest.approx(card.metrics[f"{prefix}mase"].value, abs=1e-3)
    assert rows[PLAIN] == ["120", "7", "2024-04-02", "2024-04-26"]  # windows of 4 days in the last quarter
    assert "&lt;b&gt;$\\frac&amp;" in page
    assert STRANGE not in page
    assert not re.search(
        r"src=|href=\"(?!#)|https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", page
    )
    with serving(Settings(store=workspace / "models_store", **TEST)) as client:
        assert "backtest.png" in client.get("/v1/models/sales").json()["pictures"]
        picture = client.get("/v1/models/sales@1/pictures/backtest.png")
        assert picture.content == (page_path.parent / "backtest.png").read_bytes()
    assert card.refit_steps is not None
    with pytest.raises(DataError, match=r"--version sales@1: this version was trained on all rows of sales\.csv"):
        lstm.main([*TRAINING, "--version", "sales"])


def test_a_report_needs_no_name_and_no_training(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, _ = lstm.arguments(TRAINING)
    assert (options.name, options.publish) == ("backtest", False)
    lstm.main([*TRAINING, "--version", "series-lstm@1"])
    page = Path(re.findall(r"wrote (\S+backtest\.html)", capsys.readouterr().out)[0]).read_text("utf-8")
    assert "The mean absolute scaled error of series-lstm@1 is " in page
    assert "tuned" not in page
    assert [name for name, _ in Store(workspace / "models_store").versions()] == ["series-lstm"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--backtest"], "--backtest needs --csv"),
        (
            [*TRAINING, "--no-publish"],
            "--backtest cannot be combined with --no-publish. To write only the report, omit --name",
        ),
        (["--csv", "sales.csv", "--version", "a", "--name", "b"], "--version needs --backtest"),
        (
            [*TRAINING, "--version", "sales@3"],
            "--version sales@3: there is no model 'sales' in the store; models in the store: series-lstm",
        ),
    ],
)
def test_contradictory_options_are_rejected(
    workspace: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    with pytest.raises((SystemExit, DataError)) as raised:
        lstm.main(options)
    assert sentence in capsys.readouterr().err + str(raised.value)


def test_ets_continues_trend_and_season() -> None:
    splits = [split(sales(5)), split(np.exp(sales(6) / 20), "positive")]
    origins = backtest.origins(splits, 4, 4, "test")
    forecasts, replaced, remarks = ets.forecasts(origins, [PLAIN, "positive"], 1e9)
    assert (replaced, remarks) == (0, [])
    naive = backtest.metrics(origins, backtest.seasonal_naive)
    own = backtest.metrics(origins, lambda *_: forecasts)
    assert own["mase"] < 0.85 * naive["mase"]
    assert own["coverage_95"] > 0.8
    for forecast in forecasts:
        assert (np.diff(forecast.quantiles, axis=1) > 0).all()


def test_seasonal_naive_replaces_ets_where_it_fails_or_takes_too_long() -> None:
    splits = [split(sales(5)), split(np.where(np.arange(120) % 4, 1e308, -1e308), "huge")]
    origins = backtest.origins(splits, 4, 4, "test")
    naive = backtest.seasonal_naive(origins.past, 4, 4)
    with np.errstate(all="ignore"):
        forecasts, count, (remark,) = ets.forecasts(origins, [PLAIN, "huge"], 1e9)
        methods = results.references(splits, 4, 4, seconds=1e9).methods
    assert (count, list(methods)) == (1, ["seasonal naive", "ETS, 1 of 2 series"])
    assert remark.startswith("ETS: seasonal naive replaces it for huge, because it failed (")
    replaced = [np.array_equal(own.median, other.median) for own, other in zip(forecasts, naive, strict=True)]
    assert replaced == [False] * 3 + [True] * 3

    assert list(results.references(splits, 4, 4, seconds=0).methods) == ["seasonal naive"]
    ticks = itertools.count()
    forecasts, _, (remark,) = ets.forecasts(origins, [PLAIN, "huge"], 5, lambda: next(ticks))
    assert remark == "ETS: seasonal naive replaces it for north, huge, because it took longer than 5 s"
    assert all(np.array_equal(own.median, other.median) for own, other in zip(forecasts, naive, strict=True))


def test_the_error_by_step_averages_to_the_mase() -> None:
    splits = [split(sales(5))]
    references = results.references(splits, 4, 4, seconds=0)
    compared = references.compare(None, 1, {"own": backtest.seasonal_naive})  # type: ignore[arg-type]
    errors = compared.errors("own")
    assert errors.by_step.mean() == pytest.approx(errors.mase)
    assert errors.mase == pytest.approx(
        forecast_metrics.mase(
            references.origins.actual,
            np.stack([each.median for each in compared.methods["own"]]),
            references.origins.mase_scale,
        )
    )


def test_metrics_of_non_negative_forecasts_use_no_negative_quantiles() -> None:
    def method(past: Any, season: int, horizon: int) -> Any:
        return [replace(each, non_negative=True) for each in backtest.seasonal_naive(past, season, horizon)]

    def clipped(past: Any, season: int, horizon: int) -> Any:
        return [replace(each, quantiles=np.maximum(each.quantiles, 0)) for each in method(past, season, horizon)]

    splits = [split(np.abs(sales(5) - sales(5).mean()))]
    origins = backtest.origins(splits, 4, 4, "test")
    references = results.References(splits, origins, {}, [])
    compared = references.compare(None, 1, {"own": method, "clipped": clipped})  # type: ignore[arg-type]
    assert min(forecast.quantiles.min() for forecast in compared.methods["own"]) < 0
    assert compared.errors("own").wql == compared.errors("clipped").wql
    own, other = (backtest.metrics(origins, each)["quantile_loss"] for each in (method, clipped))
    assert own == other
    own, other = (forecaster.metrics("own", origins.past, origins.actual, 4, each)["wql"]
                  for each in compared.methods.values())  # fmt: skip
    assert own == other


def test_a_report_on_constant_test_values_compares_with_exact_methods(tmp_path: Path) -> None:
    splits = [split(np.where(np.arange(120) < 70, sales(5), 7.0))]
    references = results.references(splits, 4, 4, seconds=0)
    table = Table("sales.csv", [splits[0].series], "day", 4, [])
    for shift, relation in ((1.0, "above"), (0.0, "equal to")):

        def shifted(past: Sequence[np.ndarray], season: int, horizon: int) -> list[QuantileForecast]:
            forecasts = backtest.seasonal_naive(past, season, horizon)
            return [replace(each, median=each.median + shift) for each in forecasts]  # noqa: B023

        compared = references.compare(table, 1, {"own": shifted})
        assert f", {relation} that of the best other method, seasonal naive (0.000)." in compared.verdict()
        draw_errors(Figure().subplots(), compared)


def test_ets_without_season_is_used_if_a_series_is_too_short_for_its_season() -> None:
    """statsmodels needs 10 + 2 (season // 2) values for the start values of a seasonal model."""
    for season, length in ((4, 10), (4, 13), (7, 15)):
        options, _ = ets._chosen(sales(5, length), season, lambda *_: None)
        assert "seasonal" not in options


def test_a_subset_of_windows_counts_only_its_series() -> None:
    origins = backtest.origins([split(sales(seed), f"s{seed}") for seed in range(6)], 4, 4, "test")
    assert (origins.series_count, origins.subset(3).series_count) == (6, 3)


def test_some_of_many_series_are_reported() -> None:
    splits = [split(sales(seed), f"s{seed}") for seed in range(130)]
    references = results.references(splits, 4, 4, seconds=0)
    assert 0.6 * results.MAX_WINDOWS < len(references.origins.past) <= results.MAX_WINDOWS
    assert references.splits[0] is splits[0]
    assert int(references.splits[-1].series.name[1:]) > 120


@pytest.mark.parametrize(
    ("start", "step", "third"),
    [
        ("2024-01-31", "month", "2024-03-31"),
        ("2015-02-28", "month", "2015-04-30"),
        ("2024-06-30", "quarter", "2024-12-31"),
        ("2024-01-28", "month", "2024-03-28"),
        ("2024-01-01 + 2 steps", "quarter", "2025-01-01"),
        ("2024-01-01T22:30:00", "45 minutes", "2024-01-02T00:00:00"),
        ("2024-01-05", "business day", "2024-01-09"),
        ("2024-01-05", "2 weeks", "2024-02-02"),
        ("5", "step", None),
    ],
)
def test_the_times_of_windows_follow_the_step(start: str, step: str, third: str | None) -> None:
    times = results.times(start, step, [0, 1, 2])
    assert times == third if times is None else times[2] == pd.Timestamp(third or "")
