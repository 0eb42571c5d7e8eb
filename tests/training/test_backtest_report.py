"""The report of ``--backtest``: its forecasts, its page, and the pictures of published versions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.networks import publish_network
from support.service import TEST, serving

from app.settings import Settings
from app.store import Store
from training import lstm
from training.data.datasets import DataError
from training.data.tables import Series, Table
from training.evaluation import backtest, leaderboard
from training.evaluation.backtest import Method, Split
from training.evaluation.classical import NAIVE
from training.evaluation.report import picture

PLAIN, STRANGE = "north", "<b>$\\frac&"  # names of series
TRAINING = ["--csv", "sales.csv", "--epochs", "1", "--set", "batch=16", "--threads", "1", "--season", "4", "--backtest"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with two series, and a store with a tiny, untrained forecaster."""
    monkeypatch.chdir(tmp_path)
    days = pd.date_range("2024-01-01", periods=120).strftime("%Y-%m-%d")
    pd.DataFrame({"day": days, PLAIN: sales(1), STRANGE: sales(2)}).to_csv("sales.csv", index=False)
    publish_network(tmp_path / "models_store", "series-lstm", seed=3)
    return tmp_path


def sales(seed: int, length: int = 120) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 2, length)
    return 50 + 0.2 * np.arange(length) + 10 * np.sin(np.pi * np.arange(length) / 2) + noise


def split(values: np.ndarray, name: str = PLAIN) -> Split:
    observed = np.ones(len(values), bool)
    days = np.datetime64("2024-01-01", "us") + np.arange(len(values)) * np.timedelta64(1, "D")
    return Split(Series(name, values, days, observed), len(values) - 36, len(values) - 24, len(values) - 12)


def compared(splits: Sequence[Split], *networks: Method, season: int = 4) -> leaderboard.Leaderboard:
    table = Table("sales.csv", [split.series for split in splits], "day", season, [])
    return leaderboard.compare(table, splits, 4, "test", networks)


@pytest.mark.parametrize("season", [1, 4, 7, 12, 24, 52])
def test_all_series_with_the_stated_number_of_values_can_be_split(season: int) -> None:
    fewest = max(season + 2, backtest.MIN_PAST) + 4  # for a horizon of one step
    for count in range(fewest - 1, 10 * season + 60):
        one = Series("sales", np.random.default_rng(count).random(count), np.arange(count), np.ones(count, bool))
        table = Table("sales.csv", [one], "day", season, [])
        horizon = min(season, backtest.longest_horizon(table))
        if count < fewest:
            with pytest.raises(DataError, match=f"sales: {count - 3} values .* need at least {fewest - 3},"):
                backtest.split(table, horizon)
        else:
            (parts,) = backtest.split(table, horizon)
            assert parts.validation + 2 * horizon <= parts.decision + horizon <= parts.test <= count - horizon


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
    for method, prefix in (
        ("sales, tuned", ""),
        ("series-lstm@1, not tuned", "untuned_"),
        ("seasonal naive", "naive_"),
        ("AutoTheta", "autotheta_"),
    ):
        assert float(rows[method][0]) == pytest.approx(card.metrics[f"{prefix}quantile_loss"].value, abs=1e-3)
    assert "window starts at 2024-04-02 00:00:00, the last at 2024-04-26 00:00:00" in page  # 4 days in the last quarter
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
    assert lstm.main([*TRAINING, "--version", "series-lstm@1"]) == lstm.CLASSICAL_WINS
    page = Path(re.findall(r"wrote (\S+backtest\.html)", capsys.readouterr().out)[0]).read_text("utf-8")
    assert "so use Auto" in page  # an untrained network loses
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


def test_the_error_by_step_averages_to_the_mase() -> None:
    board = compared([split(sales(5))], replace(NAIVE, name="own"))
    assert board.errors["own"].by_step.mean() == pytest.approx(board.errors["own"].mase)
    assert board.errors["own"].quantile_loss == board.errors["seasonal naive"].quantile_loss
    assert board.errors["AutoETS"].mase < 0.85 * board.errors["own"].mase


def test_metrics_of_non_negative_forecasts_use_no_negative_quantiles() -> None:
    def bounded(origins: Any) -> Any:
        return [replace(each, non_negative=True) for each in NAIVE.forecast(origins)]

    def clipped(origins: Any) -> Any:
        return [replace(each, quantiles=np.maximum(each.quantiles, 0)) for each in bounded(origins)]

    splits = [split(np.abs(sales(5) - sales(5).mean()))]
    board = compared(splits, Method("own", "", "", bounded), Method("clipped", "", "", clipped))
    assert min(forecast.quantiles.min() for forecast in board.forecasts["own"]) < 0
    assert board.errors["own"].quantile_loss == board.errors["clipped"].quantile_loss


def test_a_report_on_constant_test_values_compares_with_exact_methods() -> None:
    """The seasonal naive forecast has no error, so no loss can be divided by its loss."""

    def shifted(origins: Any) -> Any:
        return [replace(each, quantiles=each.quantiles + 1) for each in NAIVE.forecast(origins)]

    board = compared([split(np.where(np.arange(120) < 70, sales(5), 7.0))], Method("own", "", "", shifted))
    assert board.errors["seasonal naive"].mase == 0
    assert board.text().endswith(f"so use {board.ranking[0]} instead of the network. {board.verdict().split('. ')[1]}")
    assert "+inf%" in leaderboard.change(board.errors["own"].losses, np.zeros(3))
    assert picture(board, 1)


def test_a_subset_of_windows_counts_only_its_series() -> None:
    origins = backtest.origins([split(sales(seed), f"s{seed}") for seed in range(6)], 4, 4, "test")
    assert (origins.series_count, origins.subset(3).series_count) == (6, 3)


def test_some_of_many_series_are_reported() -> None:
    splits = [split(sales(seed), f"s{seed}") for seed in range(130)]
    board = compared(splits, replace(NAIVE, name="own"), season=1)
    assert 0.6 * leaderboard.MAX_WINDOWS < len(board.origins.past) <= leaderboard.MAX_WINDOWS
    assert board.splits[0] is splits[0]
    assert int(board.splits[-1].series.name[1:]) > 120
