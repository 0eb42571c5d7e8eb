"""Known covariates: their effect on forecasts, and the fields of requests that contain them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from support.networks import FORECASTER, publish_network, tiny_card
from support.service import TEST, serving

from app import store
from app.errors import BadValue
from app.networks import build
from app.settings import Settings
from app.store import HolidayCalendar, KnownCovariate, KnownCovariates
from app.store.version import Version
from app.tasks.covariates import covariate_effect, holiday_counts, step_seconds
from app.tasks.forecasting import GlobalForecaster

RANDOM = np.random.default_rng(0)
PRICE, PROMO = RANDOM.uniform(1, 3, 60), (np.arange(60) % 9 < 2).astype(float)
SALES = 40 + 5 * np.sin(np.arange(60) * np.pi / 2) - 6 * PRICE + 12 * PROMO + RANDOM.normal(0, 0.5, 60)
COLUMNS = [
    KnownCovariate(name="price", mean=2.0, scale=0.5, coefficient=0.0),
    KnownCovariate(name="promo", mean=0.2, scale=0.4, coefficient=0.1),
]
HOLIDAYS = KnownCovariate(name="holidays DE", mean=0.03, scale=0.2, coefficient=0.5)
STEPS = {"office": "day", "bank": "business day", "meter": "15 minutes"}  # of models with holidays
DATES = ["2024-01-01", "2024-05-01", "2024-05-09"]


def calendar(step: str) -> HolidayCalendar:
    return HolidayCalendar(country="DE", step=step, first_year=2023, last_year=2025, dates=DATES)


def covariates(count: int) -> np.ndarray:
    return np.stack([PRICE[:count], PROMO[:count]], axis=1)


# --- the effect


@pytest.mark.parametrize("proportional", [False, True])
def test_the_effect_of_covariates_is_found_in_the_values(proportional: bool) -> None:
    known = KnownCovariates(columns=COLUMNS, proportional=proportional)
    usual = 40 + 30 * np.sin(np.arange(60) * np.pi / 2) if proportional else np.full(60, 40.0)
    true = usual * (0.3 * PROMO - 0.2 * (PRICE - 2))
    effect = covariate_effect((usual + true)[:48], covariates(60), 4, known)
    assert effect.shape == (60,)
    assert np.corrcoef(effect, true)[0, 1] > 0.97
    assert np.abs((true - true.mean()) - (effect - effect.mean())).mean() < 0.4 * np.abs(true - true.mean()).mean()


def test_a_season_that_is_longer_than_the_series_is_ignored() -> None:
    known = KnownCovariates(columns=COLUMNS, proportional=True)
    expected = covariate_effect(SALES[:48], covariates(60), 1, known)
    np.testing.assert_array_equal(covariate_effect(SALES[:48], covariates(60), 52, known), expected)


def test_a_covariate_that_does_not_vary_has_the_effect_of_the_training() -> None:
    known = KnownCovariates(columns=COLUMNS)
    inputs = np.stack([np.full(60, 2.0), np.repeat([0.0, 1.0], [48, 12])], axis=1)
    effect = covariate_effect(SALES[:48], inputs, 4, known)
    level = np.abs(SALES[:48]).mean()
    assert effect[-1] - effect[0] == pytest.approx(0.1 / 0.4 * level)


@pytest.mark.parametrize("scale", [1e-300, 1e299])
def test_extreme_values_and_covariates_have_finite_effects(scale: float) -> None:
    known = KnownCovariates(columns=COLUMNS)
    inputs = covariates(60) * 1e300
    effect = covariate_effect(SALES[:48] * scale, inputs, 4, known)
    assert np.isfinite(effect).all()
    assert not covariate_effect(np.zeros(48), covariates(60), 4, known).any()


def test_forecasts_without_covariates_are_unchanged_and_gaps_are_aligned() -> None:
    forecaster = tiny_forecaster(KnownCovariates(columns=COLUMNS))
    values: list[float | None] = SALES[:48].tolist()
    inputs = covariates(60)
    item = forecaster.parse(values, 12, seasonality=4, covariates=inputs)
    effect = covariate_effect(SALES[:48], inputs, 4, KnownCovariates(columns=COLUMNS))
    assert item.added == pytest.approx(effect[48:])
    assert item.values[~np.isnan(item.values)] == pytest.approx((SALES[:48] - effect[:48])[-24:])
    shifted = forecaster.parse([None, None, *values[2:46], None, None], 12, seasonality=4, covariates=inputs)
    inner = covariate_effect(SALES[2:46], inputs[2:], 4, KnownCovariates(columns=COLUMNS))
    assert shifted.added == pytest.approx(inner[46:])
    assert forecaster.parse(values, 12, seasonality=4).added is None


@pytest.mark.parametrize(("proportional", "missing"), [(False, 1), (True, 2)])
def test_missing_values_do_not_show_the_effect_of_covariates(proportional: bool, missing: int) -> None:
    """Every second value at a promotion, or every such value, is missing, or is an outlier."""
    promo = PROMO[:, None]
    usual = np.tile([10.0, 11, 13, 20], 15)
    values = usual + promo[:, 0] * (usual if proportional else usual[:48].mean())
    known = KnownCovariates(
        columns=[KnownCovariate(name="promo", mean=0.0, scale=1.0, coefficient=1.0)], proportional=proportional
    )
    places = np.flatnonzero(PROMO[1:47])[::missing] + 1
    sent: list[float | None] = values[:48].tolist()
    for place in places:
        sent[place] = None
    sent[places[0]] = 1e9
    item = tiny_forecaster(known).parse(sent, 12, seasonality=4, covariates=promo)
    assert item.added == pytest.approx((values - usual)[48:], rel=0.2)
    assert item.values == pytest.approx(usual[24:48], rel=0.2)


# --- holidays


def test_holidays_are_counted_in_each_time_step() -> None:
    def counts(step: str, start: str, count: int) -> list[float]:
        return holiday_counts(calendar(step), datetime.fromisoformat(start), count).tolist()

    assert counts("day", "2024-04-30", 3) == [0, 1, 0]
    assert counts("hour", "2024-04-30T23:00", 3) == [0, 1, 1]
    assert counts("12 hours", "2024-04-30T12:00", 4) == [0, 1, 1, 0]
    assert counts("week", "2024-04-22", 4) == [0, 1, 1, 0]
    assert counts("business day", "2024-04-26", 5) == [0, 0, 0, 1, 0]
    assert (step_seconds("15 minutes"), step_seconds("business day"), step_seconds("month")) == (900, None, None)
    with pytest.raises(BadValue, match="from 2025 to 2026; the holidays of the model are known from 2023 to 2025"):
        counts("day", "2025-12-31", 2)
    with pytest.raises(BadValue, match="from 9999 to 10000; the holidays of the model are known from 2023 to 2025"):
        counts("day", "9999-12-31", 2)


# --- requests


def tiny_forecaster(known: KnownCovariates) -> GlobalForecaster:
    torch.manual_seed(0)
    traits = store.SeriesTraits(season=4, known=known)
    card = tiny_card("sales", "forecast", "forecaster", FORECASTER, {"series": traits.model_dump()})
    card |= {"version": 1, "weights_sha256": ""}
    network = build("forecaster", FORECASTER)
    return GlobalForecaster(
        Version(Path("sales/1"), store.Card.model_validate(card), dict(network.state_dict())), torch.device("cpu")
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    models = tmp_path_factory.mktemp("known")
    holidays = KnownCovariates(columns=[COLUMNS[1], HOLIDAYS], calendar=calendar("day"))
    every: dict[str, KnownCovariates | None] = {"plain": None, "shop": holidays}
    every |= {name: KnownCovariates(columns=[HOLIDAYS], calendar=calendar(step)) for name, step in STEPS.items()}
    for name, known in {"sales": KnownCovariates(columns=COLUMNS), **every}.items():
        fields = {"series": store.SeriesTraits(season=4, known=known).model_dump()} if known else {}
        publish_network(models, name, seed=0, **fields)
    with serving(Settings(store=models, **TEST)) as client:
        yield client


def body(**changes: Any) -> dict[str, Any]:
    """Return a request for one series with changed fields. A field with the value None is left out."""
    columns = {"price": PRICE[:54].tolist(), "promo": PROMO[:54].tolist()}
    fields = {"model": "sales", "values": SALES[:48].tolist(), "horizon": 6, "covariates": columns, **changes}
    return {name: value for name, value in fields.items() if value is not None}


def test_a_request_gives_the_covariates_over_the_series_and_the_horizon(client: httpx.Client) -> None:
    (result,) = client.post("/v1/series/forecast", json=body()).json()["results"]
    forecaster = tiny_forecaster(KnownCovariates(columns=COLUMNS))
    (direct,) = forecaster.predict([forecaster.parse(SALES[:48].tolist(), 6, covariates=covariates(54))])
    assert result["median"] == pytest.approx(direct.median)
    raised = body(covariates={"price": PRICE[:54].tolist(), "promo": [*PROMO[:48].tolist(), *[1] * 6]})
    (promoted,) = client.post("/v1/series/forecast", json=raised).json()["results"]
    assert np.mean(promoted["median"]) > np.mean(result["median"]) + 3


def test_the_start_of_a_series_gives_its_holidays(client: httpx.Client) -> None:
    def median(start: str | list[str]) -> Any:
        request = body(model="shop", covariates={"promo": PROMO[:54].tolist()}, start=start)
        return client.post("/v1/series/forecast", json=request).json()["results"][0]["median"]

    holiday, usual = median("2024-03-14"), median("2024-02-14")  # the horizons start on 1 May and on 2 April
    assert holiday[0] > usual[0] + 5
    assert median(["2024-03-14"]) == holiday == median("2024-03-14T00:00:00Z")
    assert median("2024-03-14T00:00:00+02:00") == holiday  # days begin at local midnights, as in training
    assert median("2024-03-14T23:00:00-02:00") == median("2024-03-15")


def test_the_start_timestamp_of_kserve_gives_the_holidays(client: httpx.Client) -> None:
    def forecast(*starts: str | None) -> httpx.Response:
        series = {"type": "univariate_time_series", "series": SALES[:48].tolist(), "frequency": "D"}
        inputs = [{**series, "start_timestamp": start} for start in starts]
        request = {"model": "office", "inputs": inputs, "options": {"horizon": 6}}
        return client.post("/v1/timeseries/forecast", json=request)

    starts = ["2024-03-14", "2024-02-14T00:00:00Z"]
    native = body(model="office", values=[SALES[:48].tolist()] * 2, covariates=None, start=starts)
    results = client.post("/v1/series/forecast", json=native).json()["results"]
    outputs = forecast(*starts).json()["outputs"]
    assert [output["content"][0]["mean_forecast"] for output in outputs] == [result["mean"] for result in results]
    missing = forecast(starts[0], None).json()["error"]
    assert (missing["param"], missing["message"]) == (
        "inputs.1.start_timestamp",
        "inputs.1.start_timestamp is missing; office needs the time of the first value, to know the holidays",
    )
    late = forecast(starts[0], "2025-12-01").json()["error"]
    assert late["param"] == "inputs.1.start_timestamp"
    assert late["message"].startswith("inputs.1.start_timestamp: the series and its forecast are from 2025 to 2026")


@pytest.mark.parametrize(
    ("model", "right", "wrong", "allowed", "begin", "start"),
    [
        ("office", "D", "H", "'day' or 'D'", "2024-04-22", "2024-05-02T00:00:00"),
        ("bank", "D", "H", "'day' or 'D'", "2024-04-22T09:30", "2024-05-06T09:30:00"),
        # Friday in local time, but Saturday in UTC. Holidays are counted in UTC, so the first value is on Monday.
        ("bank", "D", "week", "'day' or 'D'", "2024-04-19T23:00-02:00", "2024-05-05T23:00:00-02:00"),
        ("meter", "T", "D", "'minute' or 'T'", "2024-04-22T00:00Z", "2024-04-22T02:30:00Z"),
    ],
)
def test_the_time_step_of_the_holidays_decides_the_frequency_and_the_start_of_the_forecast(
    client: httpx.Client, model: str, right: str, wrong: str, allowed: str, begin: str, start: str
) -> None:
    def forecast(frequency: str) -> Any:
        series = {"type": "univariate_time_series", "series": SALES[:10].tolist(), "start_timestamp": begin}
        request = {"model": model, "inputs": [{**series, "frequency": frequency}], "options": {"horizon": 2}}
        return client.post("/v1/timeseries/forecast", json=request).json()

    assert forecast(right)["outputs"][0]["content"][0]["start_timestamp"] == start
    error = forecast(wrong)["error"]
    assert (error["param"], error["message"]) == (
        "inputs.0.frequency",
        f"inputs.0.frequency is '{wrong}'; {model} was trained with one value per {STEPS[model]}, "
        f"so it should be {allowed}",
    )
