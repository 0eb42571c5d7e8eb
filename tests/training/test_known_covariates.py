"""``--known-covariates`` and ``--holidays``: users' tables with columns whose future values are known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.networks import FORECASTER, publish_network
from support.service import TEST, serving

from app.networks.series_reader import ForecasterSizes
from app.settings import Settings
from app.store import Store
from training import lstm
from training.data.datasets import DataError
from training.data.tables import TableOptions, read_table, without_gaps
from training.evaluation import evaluate
from training.loops import own_series

DAYS = pd.date_range("2023-01-02", periods=160)
PRICE = np.random.default_rng(0).choice([2.0, 2.5, 3.0], 160)
PROMO = (np.random.default_rng(1).random(160) < 0.2).astype(float)


def sold(level: float, seed: int) -> np.ndarray:
    """Return sales [160] with a season of 4 days and large effects of price and promotion."""
    season = np.sin(np.arange(160) * np.pi / 2)
    shares = 1 + 0.2 * season - 0.3 * (PRICE - 2.5) + 0.5 * PROMO
    return level * shares + np.random.default_rng(seed).normal(0, 0.02 * level, 160)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with the sales of two shops in a long table, and a store with a tiny forecaster."""
    monkeypatch.chdir(tmp_path)
    shops = [
        pd.DataFrame({"day": DAYS, "shop": name, "sold": sold(level, seed), "price": PRICE, "promo": PROMO})
        for seed, (name, level) in enumerate((("north", 50), ("south", 400)))
    ]
    pd.concat(shops).to_csv("sales.csv", index=False)
    publish_network(tmp_path / "models_store", "series-lstm", seed=3)
    return tmp_path


def read(**options: Any) -> Any:
    return read_table(Path("sales.csv"), TableOptions(**options))


def train(*options: str) -> None:
    short = ["--season", "4", "--epochs", "2", "--set", "batch=32", "--threads", "1", "--force"]
    lstm.main(["--csv", "sales.csv", "--name", "sales", *short, *options])


def test_known_covariates_are_read_beside_each_series(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = read(known_covariates="price,promo", holidays="US-NY")
    assert [series.name for series in table.series] == ["north", "south"]
    assert table.covariates == ["price", "promo", "holidays US-NY"]
    for series in table.series:
        assert (series.covariates[:, :2] == np.stack([PRICE, PROMO], axis=1)).all()
        assert [str(DAYS[i].date()) for i in np.flatnonzero(series.covariates[:, 2])][:3] == [
            "2023-01-02",
            "2023-01-16",
            "2023-02-12",
        ]
    assert (table.calendar.first_year, table.calendar.last_year) == (2023, 2033)
    without = read(column=["sold"], group="shop")
    assert without.sha256 != table.sha256
    frame = pd.read_csv("sales.csv").sample(frac=1, random_state=0)
    frame.to_csv("sales.csv", index=False)
    shuffled = {series.name: series.covariates for series in read(known_covariates="price,promo").series}
    assert (shuffled["south"] == np.stack([PRICE, PROMO], axis=1)).all()
    lstm.main(["--csv", "sales.csv", "--known-covariates", "price,promo", "--preview"])
    assert "no season; known: price, promo\n" in capsys.readouterr().out.replace("season of 4 steps", "no season")
    lstm.main(["--csv", "sales.csv", "--known-covariates", "price,promo", "--preview", "--json"])
    assert json.loads(capsys.readouterr().out)["known_covariates"] == ["price", "promo"]


@pytest.mark.usefixtures("workspace")
def test_yes_and_no_are_read_as_1_and_0() -> None:
    expected = [series.covariates for series in read(known_covariates="promo").series]
    frame = pd.read_csv("sales.csv")
    for yes, no in (("ja", "Nein"), ("TRUE", "false")):
        frame.assign(promo=frame["promo"].map({1: yes, 0: no})).to_csv("sales.csv", index=False)
        table = read(known_covariates="promo")
        assert all((own.covariates == other).all() for own, other in zip(table.series, expected, strict=True))
    frame.assign(promo=frame["promo"].map({1: "ja", 0: "maybe"})).to_csv("sales.csv", index=False)
    with pytest.raises(DataError, match=r"promo is 'ja', not a number|promo is 'maybe', not a number"):
        read(known_covariates="promo")


def test_missing_covariates_and_future_rows_are_reported(workspace: Path) -> None:
    frame = pd.DataFrame({"day": DAYS, "sold": sold(50, 0).round(2), "price": PRICE})
    frame.loc[5:6, "price"] = np.nan
    frame.loc[153:, "sold"] = np.nan
    frame.drop(index=20).to_csv("sales.csv", index=False)
    table = without_gaps(read(known_covariates="price"))
    (series,) = table.series
    assert len(series.values) == len(series.covariates) == 153
    assert (series.covariates[5:7, 0] == PRICE[4]).all()
    assert series.covariates[20, 0] == PRICE[19]
    assert any("3 missing values of 'price' repeat the value before them" in remark for remark in table.remarks)
    assert any("the last 7 rows have no value and are not used" in remark for remark in table.remarks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known_covariates": "rain"}, "no column 'rain'; its columns are: day, shop, sold"),
        ({"known_covariates": "price", "column": ["price"]}, "column 'price' is named twice"),
        ({"holidays": "XX"}, "--holidays XX: "),
        (
            {"holidays": "DE", "resample": "M", "aggregate": "sum"},
            "--holidays needs time steps of at most a week; this table has one row per month",
        ),
    ],
)
@pytest.mark.usefixtures("workspace")
def test_unusable_known_covariates_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as rejection:
        read(**options)
    assert message in str(rejection.value)


@pytest.mark.parametrize(
    ("first", "zone", "reported"),
    [
        ("2024-12-23 23:00", "Z", True),  # midnight in Germany
        ("2024-12-24 23:00", "", False),
        ("2024-12-24", " 00:00+01:00", False),
    ],
)
@pytest.mark.usefixtures("workspace")
def test_the_days_of_holidays_are_reported_for_times_with_a_zone(first: str, zone: str, reported: bool) -> None:
    days = pd.date_range(first, periods=40).astype(str)
    pd.DataFrame({"day": [f"{day}{zone}" for day in days], "sold": PRICE[:40]}).to_csv("sales.csv", index=False)
    remark = "time stamps with a zone are converted to UTC; for local days, write local times without a zone"
    assert (remark in read(holidays="DE").remarks) == reported


@pytest.mark.usefixtures("workspace")
def test_aggregated_rows_have_the_mean_of_a_known_column() -> None:
    table = read(known_covariates="price", group="none", aggregate="sum", column=["sold"])
    (series,) = table.series
    assert series.values == pytest.approx(sold(50, 0) + sold(400, 1))
    assert series.covariates[:, 0] == pytest.approx(PRICE)


@pytest.mark.usefixtures("workspace")
def test_a_known_column_that_does_not_vary_in_the_training_part_is_rejected() -> None:
    frame = pd.read_csv("sales.csv").assign(promo=np.tile(np.repeat([0, 1], [140, 20]), 2))
    frame.to_csv("sales.csv", index=False)
    with pytest.raises(DataError, match="known covariate 'promo' does not vary in the training part; leave it out"):
        train("--known-covariates", "promo")


@pytest.mark.slow
def test_known_covariates_lower_the_loss_and_are_served(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--known-covariates", "price,promo", "--holidays", "US-NY")
    card = Store(workspace / "models_store").card("sales", 1)
    losses = {name: card.metrics[f"{name}quantile_loss"].value for name in ("untuned_", "untuned_known_", "")}
    assert losses["untuned_known_"] < 0.7 * losses["untuned_"]
    assert losses[""] < 0.7 * losses["untuned_"]
    assert card.series is not None
    known = card.series.known
    assert known is not None
    assert known.named == ["price", "promo"]
    price, promo, _ = known.columns
    assert price.mean == pytest.approx(2.5, abs=0.1)
    assert price.coefficient / price.scale == pytest.approx(-0.3, abs=0.06)
    assert promo.coefficient / promo.scale == pytest.approx(0.5, abs=0.1)
    assert re.search(r"series-lstm@1 with known covariates 0\.\d{3,}, ", card.notes)
    assert "known covariates price, promo, holidays US-NY" in card.notes
    assert evaluate.main(["sales"]) == 0
    with serving(Settings(store=workspace / "models_store", **TEST)) as client:
        medians = []
        for promotion in (0.0, 1.0):
            columns = {"price": [*PRICE[:100], *[2.5] * 4], "promo": [*PROMO[:100], *[promotion] * 4]}
            body = {"model": "sales", "values": [round(x, 3) for x in sold(90, 5)[:100]], "horizon": 4}
            body |= {"covariates": columns, "start": "2023-01-02"}
            medians.append(client.post("/v1/series/forecast", json=body).json()["results"][0]["median"])
        assert np.mean(medians[1]) - np.mean(medians[0]) == pytest.approx(45, abs=10)


@pytest.mark.slow
def test_a_version_with_known_covariates_is_measured_and_tuned_again(workspace: Path) -> None:
    train("--known-covariates", "price,promo", "--no-refit", "--backtest")
    assert evaluate.main(["sales"]) == 0
    with pytest.raises(
        DataError, match="sales@1 reads the known covariates price, promo; use --known-covariates price,promo"
    ):
        train("--from", "sales")
    train("--known-covariates", "price,promo", "--from", "sales", "--no-refit")
    cards = [Store(workspace / "models_store").card("sales", int(number)) for number in ("1", "2")]
    losses = [cards[i].metrics[name].value for i, name in ((0, "quantile_loss"), (1, "untuned_quantile_loss"))]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("helps", [True, False])
def test_known_covariates_without_effect_are_reported(helps: bool) -> None:
    frame = pd.read_csv("sales.csv").assign(rain=np.tile(np.random.default_rng(5).random(160), 2))
    frame.to_csv("sales.csv", index=False)
    names = ["--known-covariates", "price,promo" if helps else "rain", "--column", "sold", "--season", "4"]
    options, config = lstm.arguments(["--csv", "sales.csv", "--name", "a", *names])
    remarks = own_series.read(options, config.horizon).table.remarks
    assert any("compare with a training without --known-covariates" in remark for remark in remarks) == (not helps)


@pytest.mark.usefixtures("workspace")
def test_missing_values_do_not_show_the_effect_of_a_known_column() -> None:
    options, config = lstm.arguments(
        ["--csv", "sales.csv", "--name", "a", "--known-covariates", "price,promo", "--season", "4"]
    )
    past = []
    for missing in ([], np.flatnonzero(PROMO)[1:20:2]):
        frame = pd.read_csv("sales.csv")
        frame.loc[frame["day"].isin(DAYS[missing].astype(str)), "sold"] = np.nan
        frame.to_csv("sales.csv", index=False)
        own = own_series.read(options, config.horizon)
        assert own.traits.known
        promo = own.traits.known.columns[1]
        assert promo.coefficient / promo.scale == pytest.approx(0.5, abs=0.1)
        past.append(own_series.window_sampler(own, ForecasterSizes(**FORECASTER), [96, 96]).values.numpy())
    assert past[1] == pytest.approx(past[0], rel=0.2)


@pytest.mark.usefixtures("workspace")
def test_test_values_of_covariates_influence_no_training() -> None:
    options, config = lstm.arguments(
        ["--csv", "sales.csv", "--name", "a", "--known-covariates", "price", "--season", "4"]
    )
    before = own_series.read(options, config.horizon).traits
    frame = pd.read_csv("sales.csv")
    late = frame["day"] >= str(DAYS[125].date())
    frame.loc[late, ["price", "sold"]] *= 3
    frame.to_csv("sales.csv", index=False)
    assert own_series.read(options, config.horizon).traits == before
