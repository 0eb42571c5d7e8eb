"""Forecasting any series: the network, the predictor, seasons, missing values and the service."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import publish_network, publish_tiny
from support.service import ROOT
from torch import nn

from app import store
from app.networks.forecaster import FEW_SERIES, MEDIAN, QUANTILES, Forecaster
from app.networks.series_reader import ERROR_FLOOR, ForecasterSizes, Reader
from app.store import Store
from app.store.version import Version
from app.tasks.forecasting import MAX_READ, MEAN_WEIGHTS, NORMAL, SCORES, GlobalForecaster, QuantileForecast
from app.tasks.seasonality import SEASONS, detect_season, fill_missing, seasonal_medians

SIZES = ForecasterSizes(context=24, patch=12, horizon=6, hidden=8, lags=2, members=2)


@pytest.fixture
def forecaster(tmp_path: Path) -> GlobalForecaster:
    return GlobalForecaster(publish_tiny(tmp_path, "tiny-forecaster"), torch.device("cpu"))


@pytest.fixture(scope="module")
def shipped_forecaster() -> GlobalForecaster:
    return GlobalForecaster(Store(ROOT / "models_store").read("series-lstm", 3), torch.device("cpu"))


def series(seed: int, count: int = 60) -> np.ndarray:
    """Return a random walk with a season of 7."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=count).cumsum() + 3 * np.sin(2 * np.pi * np.arange(count) / 7)


def test_the_reader_equals_a_loop_over_the_values() -> None:
    values = torch.from_numpy(np.stack([series(0, 24), series(1, 24)]))
    values[1, :9] = torch.nan
    seasons = torch.tensor([7, 1])
    reading = Reader(SIZES)(values, seasons)
    for row, (observed, season) in enumerate(((values[0], 7), (values[1, 9:], 1))):
        past = observed.tolist()
        steps = [abs(past[i] - past[i - season]) for i in range(season, len(past))]
        assert reading.scale[row].item() == pytest.approx(sum(steps) / len(steps))
        naive = [past[len(past) - season + step % season] for step in range(6)]
        assert reading.naive[row].tolist() == pytest.approx(naive)
        expected = [(past[len(past) - 2 * season + step % season] - naive[step]) / reading.scale[row].item()
                    for step in range(6)]  # fmt: skip
        assert reading.ahead[row, :, 1].tolist() == pytest.approx(np.arcsinh(expected), rel=1e-5)
        assert (reading.ahead[row, :, 0] == 0).all()
    padding = reading.patches[1, 0, :-3].view(12, 4)[:9]
    assert (padding == 0).all()


def test_the_same_week_of_earlier_years_is_a_feature() -> None:
    sizes = ForecasterSizes(context=120, patch=12, horizon=6, hidden=8, lags=2, members=1)
    values = torch.from_numpy(series(0, 120)).unsqueeze(0)
    reading = Reader(sizes)(values, torch.tensor([1]))
    expected = (values[0, 120 - 52 : 126 - 52] - values[0, 119 - 52]) / reading.scale[0]
    assert torch.allclose(reading.ahead[0, :, 2].double(), expected.asinh(), atol=1e-6)
    assert (Reader(sizes)(values, torch.tensor([7])).ahead[0, :, 2:7] == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_shift_and_scale_of_a_series_shift_and_scale_its_forecast(forecaster: GlobalForecaster, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = series(seed, int(random.integers(8, 200)))
    factor, shift = float(10 ** random.uniform(-9, 9)), float(random.normal() * 10 ** random.uniform(-2, 4))
    horizon = int(random.integers(1, 61))
    items = [forecaster.parse(inputs.tolist(), horizon) for inputs in (values, (values + shift) * factor)]
    plain, moved = forecaster.predict(items)
    assert moved.seasonality == plain.seasonality
    assert np.abs(moved.quantiles / factor - shift - plain.quantiles).max() < 1e-4 * np.abs(plain.quantiles).max()


@pytest.fixture
def smoothing(tmp_path: Path) -> GlobalForecaster:
    """Return a forecaster that combines forecasts of exponential smoothing."""
    sizes = dataclasses.asdict(dataclasses.replace(SIZES, context=60, smoothings=4))
    return GlobalForecaster(publish_network(tmp_path, "smoothing", sizes=sizes, seed=0), torch.device("cpu"))


@pytest.mark.parametrize(("season", "count"), [(1, 60), (7, 30)])
def test_a_line_with_a_season_is_continued_by_the_smoothed_lines(season: int, count: int) -> None:
    """A candidate is a forecast minus the naive forecast, divided by the scale.

    One third of the candidates are weighted means, one third are lines, and one third are damped lines.
    """
    sizes = dataclasses.replace(SIZES, context=60, smoothings=4)
    steps = torch.arange(66, dtype=torch.float64)
    profile = torch.randn(season, generator=torch.Generator().manual_seed(season)).double()
    values = 5 + 2 * steps + 10 * profile[torch.arange(66) % season]
    past = values[:60].clone()
    past[: 60 - count] = torch.nan
    reading = Reader(sizes)(past.unsqueeze(0), torch.tensor([season]))
    forecasts = reading.candidates[0].double() * reading.scale[0] + reading.naive[0].unsqueeze(1)
    means, lines, damped = forecasts.chunk(3, dim=1)
    assert (lines[:, -1] - values[60:]).abs().max() < 0.1 * (values[60:] - values[59]).abs().max() + 1
    assert (means.diff(dim=1) < 0).all()  # a mean with a longer memory is further behind
    assert (damped < lines).all()


def test_a_multiple_of_the_season_is_repeated_if_it_fits() -> None:
    """The series repeats every 6 values, and the network receives the season 2: the third of 4 lags fits exactly."""
    sizes = dataclasses.replace(SIZES, context=60, horizon=12, lags=4, lag_forecasts=True)
    values = (torch.arange(72).double() % 6).square()
    past = values[:60].clone()
    past[:30] = torch.nan
    reading = Reader(sizes)(past.unsqueeze(0), torch.tensor([2]))
    forecasts = reading.candidates[0].double() * reading.scale[0] + reading.naive[0].unsqueeze(1)
    expected = torch.stack([values[60 - period : 60].repeat(6)[:12] for period in (4, 6, 8)], dim=1)
    assert (forecasts - expected).abs().max() < 1e-5
    errors, known = reading.ahead[0, :, -8:-4].exp() - ERROR_FLOOR, reading.ahead[0, :, -4:]
    assert errors[:, 2].abs().max() < 1e-6
    assert (errors[:, [0, 1, 3]] > 0.1).all()
    assert (known == 1).all()


def test_only_known_seasons_are_repeated() -> None:
    sizes = dataclasses.replace(SIZES, context=60, lags=4, lag_forecasts=True)
    past = torch.full((1, 60), torch.nan, dtype=torch.float64)
    past[0, -5:] = torch.tensor([1.0, 5.0, 2.0, 7.0, 3.0])
    reading = Reader(sizes)(past, torch.tensor([2]))
    assert (reading.candidates[0, :2] != 0).all(0).tolist() == [True, False, False]
    assert reading.candidates[0, 0].tolist()[1:] == [0.0, 0.0]  # the value 6 steps before the first step is unknown
    assert reading.ahead[0, 0, -4:].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_intervals_of_short_series_are_wider(smoothing: GlobalForecaster) -> None:
    """For ``SHORT_SERIES`` values, intervals are twice as wide as the network computes."""
    network: Any = smoothing.network
    values = torch.full((1, 60), torch.nan, dtype=torch.float64)
    values[0, -4:] = torch.tensor([1.0, 3.0, 2.0, 5.0])
    with torch.inference_mode():
        quantiles, reading = network(values, torch.tensor([1])), network.read(values, torch.tensor([1]))
        raw = torch.stack([member(reading) for member in network.members]).mean(0).double() * reading.scale
    assert torch.allclose(quantiles.diff(dim=2), 2 * raw.diff(dim=2))


@pytest.mark.parametrize("season", [1, 7])
def test_quantiles_never_cross_and_intervals_widen_to_ten_times_the_horizon(
    forecaster: GlobalForecaster, season: int
) -> None:
    item = forecaster.parse(series(season).tolist(), 60, seasonality=season)
    (forecast,) = forecaster.predict([item])
    assert forecast.quantiles.shape == (60, len(QUANTILES))
    assert (np.diff(forecast.quantiles, axis=1) > 0).all()
    for level in (10, 80, 95, 99.9):
        lower, upper = forecast.interval(level)
        width = upper - lower
        assert (width[season:] - width[:-season] > -1e-9).all()
        assert (np.diff(width[5:]) > 0).all()
        assert width[6] > width[:6].max()
        assert (lower < forecast.median).all()


def test_beyond_its_horizon_the_network_reads_its_own_medians() -> None:
    torch.manual_seed(0)
    network = Forecaster(SIZES)
    values = torch.from_numpy(np.stack([series(0, 24), series(1, 24)]))
    seasons = torch.tensor([7, 1])
    first = network(values, seasons)[..., MEDIAN]
    second = network(torch.cat([values, first], dim=1)[:, 6:], seasons)[..., MEDIAN]
    assert torch.equal(network.forecast(values, seasons, 11)[..., MEDIAN], torch.cat([first, second], dim=1)[:, :11])


@pytest.mark.parametrize(
    "sizes",
    [
        dataclasses.replace(SIZES, members=1, layers=2),
        dataclasses.replace(SIZES, context=60, members=3, smoothings=4, lag_forecasts=True),
    ],
)
def test_combined_members_compute_the_same_forecasts(sizes: ForecasterSizes) -> None:
    torch.manual_seed(0)
    network = Forecaster(sizes)
    for name, weight in network.named_parameters():
        nn.init.normal_(weight, std=1.0 if "norm" in name else 0.3)
    values = torch.from_numpy(np.stack([series(i, sizes.context) for i in range(3)]))
    seasons = torch.tensor([1, 3, 7])
    with torch.inference_mode():
        expected = network(values, seasons)
        network.combine()
        assert torch.equal(network(values, seasons), expected)
        for rows in range(1, FEW_SERIES + 1):
            combined = network(values[:rows], seasons[:rows])
            assert not torch.equal(combined, expected[:rows])
            torch.testing.assert_close(combined, expected[:rows], rtol=1e-5, atol=1e-5)


def test_a_constant_series_stays_constant(forecaster: GlobalForecaster) -> None:
    for value in (0.0, 5.0, -1e300):
        (forecast,) = forecaster.predict([forecaster.parse([value] * 30, 20)])
        assert forecast.mean.tolist() == forecast.median.tolist() == [value] * 20
        assert forecast.interval(95)[0].tolist() == [value] * 20


@pytest.mark.parametrize("name", ["forecaster", "smoothing"])
@pytest.mark.parametrize(
    "values", [[1e300, -1e300] * 10, [5e-324, 0] * 10, [None] * 19 + [1], [1, 2] + [None] * 9, [3, 3, 3], [1, 2, 4]]
)
def test_extreme_and_short_series_give_finite_forecasts(
    name: str, values: list[float | None], request: pytest.FixtureRequest
) -> None:
    predictor: GlobalForecaster = request.getfixturevalue(name)
    items = [predictor.parse(values, 60, seasonality=season) for season in (None, 1, 4, 168)]
    for forecast in predictor.predict(items):
        assert np.isfinite(forecast.quantiles).all()
        assert np.isfinite(forecast.mean).all()
        assert (np.diff(forecast.quantiles, axis=1) >= 0).all()


def test_only_the_last_values_of_a_long_series_are_read(forecaster: GlobalForecaster) -> None:
    recent = series(0, MAX_READ).tolist()
    expected = forecaster.parse(recent, 3)
    item = forecaster.parse([1e9, *recent[:100], *recent], 3)
    assert np.array_equal(item.values, expected.values, equal_nan=True)
    assert (item.season, item.horizon, item.gap) == (expected.season, 3, 0)
    missing = forecaster.parse([1.0, 2.0, 3.0] + [None] * MAX_READ, 3)  # earlier values are read
    assert missing.values[-3:].tolist() == [1, 2, 3]


def test_a_season_longer_than_the_series_or_the_context_is_ignored(forecaster: GlobalForecaster) -> None:
    lengths = ((20, 24), (25, 24), (60, 24), (60, 25))
    seasons = [forecaster.parse(series(0, count).tolist(), 1, seasonality=season).season for count, season in lengths]
    assert seasons == [1, 24, 24, 1]


@pytest.mark.parametrize("season", SEASONS)
def test_a_season_is_detected_in_noise_and_on_a_trend(season: int) -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        profile = random.normal(size=season)
        time = np.arange(5 * season + 40)
        values = profile[time % season] + 0.4 * random.normal(size=len(time)) + 0.02 * time
        assert detect_season(1e6 + values) == season
        assert detect_season(-1e-9 * values) == season


@pytest.mark.parametrize(
    ("season", "cycles", "phase"), [(23, 6, 0), (50, 6, 0), (163, 6, 0), (100, 4, 0), (120, 4, 2), (150, 4, 1)]
)
def test_the_season_of_some_smooth_cycles_is_exact(season: int, cycles: int, phase: int) -> None:
    """Some of these seasons are close to a usual one."""
    angle = 2 * np.pi * np.arange(cycles * season) / season
    assert detect_season(np.sin(angle + phase) + 0.4 * np.cos(2 * angle + 1)) == season


@pytest.mark.parametrize("season", [2, 5, 10, 36, 96, 130])
def test_an_unusual_season_is_detected_instead_of_a_usual_one_close_to_it(season: int) -> None:
    time = np.arange(6 * season + 40)
    wave = np.sin(2 * np.pi * time / season + 0.3) if season > 2 else time % 2 * 1.0
    assert detect_season(wave) == season
    for seed in range(5):
        random = np.random.default_rng(seed)
        detected = detect_season(wave + 0.2 * random.normal(size=len(time)) + 0.01 * time)
        assert abs(detected - season) <= season // 24


def test_missing_values_at_the_end_are_forecast_first(shipped_forecaster: GlobalForecaster) -> None:
    past = series(0, 100).tolist()
    items = [
        shipped_forecaster.parse(values, horizon, seasonality=7)
        for values, horizon in ((past, 30), (past + [None] * 10, 20), (past + [None] * 90_000, 24))
    ]
    complete, late, after_gap = shipped_forecaster.predict(items)
    assert np.allclose(late.quantiles, complete.quantiles[10:], rtol=1e-6)
    lower, upper = after_gap.interval(95)
    assert (upper - lower > 3 * np.std(np.diff(past))).all()
    assert lower[0] < past[100 - 7 + 90_000 % 7] < upper[0]


def test_an_extreme_outlier_counts_as_missing(shipped_forecaster: GlobalForecaster) -> None:
    clean = (10 + np.random.default_rng(0).normal(size=200)).tolist()
    (forecast,) = shipped_forecaster.predict([shipped_forecaster.parse([*clean[:100], -1e300, *clean[101:]], 24)])
    lower, upper = forecast.interval(95)
    assert np.abs(forecast.median - 10).max() < 2
    assert (upper - lower).max() < 20
    (stepped,) = shipped_forecaster.predict([shipped_forecaster.parse([*clean[:-3], 1e6, 1e6 + 1, 1e6], 5)])
    assert stepped.median[0] > 1e5  # a new level


def test_no_season_is_detected_in_series_without_one() -> None:
    seasons = []
    for seed in range(20):
        noise, slow = np.random.default_rng(seed).normal(size=300), np.sin(np.arange(300) / 50)
        seasons += [detect_season(values) for values in (noise, noise.cumsum(), slow + 0.2 * noise, slow)]
    assert np.mean(np.array(seasons) > 1) < 0.05
    assert [detect_season(np.array(values, float)) for values in ([3] * 50, range(50), [0, 1], [7])] == [1, 1, 1, 1]


def test_missing_values_are_interpolated_with_the_season() -> None:
    time = np.arange(96)
    daily = 5 * np.sin(2 * np.pi * time / 24) + 0.1 * time
    gaps = np.where((time >= 40) & (time < 52), np.nan, daily)
    assert np.abs(fill_missing(gaps, 24) - daily).max() < 1.0
    line = fill_missing(gaps, 1)
    assert line[39:53] == pytest.approx(np.linspace(daily[39], daily[52], 14))
    assert np.isfinite(fill_missing(np.array([np.nan] * 10 + [1.0]), 4)).all()


@pytest.mark.parametrize("season", [7, 60])
def test_seasonal_medians_equal_the_median_of_each_position(season: int) -> None:
    values = series(season, 100)
    values[np.random.default_rng(season).random(100) < 0.5] = np.nan
    values[3::season] = np.nan
    each = [values[position::season][~np.isnan(values[position::season])] for position in range(season)]
    assert seasonal_medians(values, season).tolist() == [
        float(np.median(observed)) if len(observed) else 0.0 for observed in each
    ]


def test_intervals_of_any_level_are_interpolated_or_extrapolated() -> None:
    normal = (3 + 2 * SCORES)[None].repeat(4, axis=0)
    forecast = QuantileForecast(normal[:, MEDIAN], normal[:, MEDIAN], SCORES, normal)
    for level in (0.001, 30, 60, 80, 87.3, 95, 99.9, 99.99999999999999):
        lower, upper = forecast.interval(level)
        assert upper == pytest.approx(3 - 2 * NORMAL.inv_cdf(0.5 - level / 200))
        assert (lower + upper) / 2 == pytest.approx(3)
    assert MEAN_WEIGHTS.sum() == pytest.approx(1)
    assert normal @ MEAN_WEIGHTS == pytest.approx(3)


def with_traits(forecaster: GlobalForecaster, **traits: Any) -> GlobalForecaster:
    card = forecaster.card.model_copy(update={"series": store.SeriesTraits(**traits)})
    version = Version(Path(), card, dict(forecaster.network.state_dict()))
    return GlobalForecaster(version, torch.device("cpu"))


def test_the_season_of_the_card_is_used_unless_the_request_has_one(forecaster: GlobalForecaster) -> None:
    weekly = with_traits(forecaster, season=7)
    values = np.sin(np.arange(48) * np.pi / 6).tolist()
    assert [each.parse(values, 3).season for each in (forecaster, weekly)] == [12, 7]
    assert with_traits(forecaster, season=None).parse(values, 3).season == 12
    assert weekly.parse(values, 3, seasonality=12).season == 12


@pytest.mark.parametrize("level", [30, 80, 99.9])
def test_bounds_of_counts_are_clipped_and_rounded_after_they_are_computed(
    forecaster: GlobalForecaster, level: float
) -> None:
    """This applies only to series that are themselves not negative, and integers."""
    values = [*[0.0, 0.0, 0.0, 3.0] * 6, 0.0]
    each = [
        with_traits(forecaster, season=4, non_negative=non_negative, integer=integer)
        for non_negative, integer in ((False, False), (True, False), (True, True))
    ]
    plain, clipped, counts = (predictor.predict([predictor.parse(values, 12)])[0] for predictor in each)
    bounds = np.stack(plain.interval(level))
    assert bounds.min() < 0
    assert np.stack(clipped.interval(level)) == pytest.approx(np.maximum(bounds, 0), abs=1e-5)
    for forecast in (counts, clipped.rounded()):
        assert np.stack(forecast.interval(level)).tolist() == np.round(np.maximum(bounds, 0)).tolist()
        assert all((result % 1 == 0).all() for result in (forecast.mean, forecast.median))
    (signed,) = each[2].predict([each[2].parse([-1.5, *values], 12)])
    assert np.stack(signed.interval(level)).min() < 0
    assert (np.stack(signed.interval(level)) % 1 != 0).any()


def test_the_yearly_pattern_of_the_card_is_removed_and_added_again(forecaster: GlobalForecaster) -> None:
    yearly = with_traits(forecaster, season=1, year=40.0)
    wave = 100 * np.sin(2 * np.pi * np.arange(140) / 40)
    noise = np.random.default_rng(0).normal(size=140)
    values = [*(wave + noise)[:100], None, None]
    item, plain = yearly.parse(values, 38), forecaster.parse(values, 38, seasonality=1)
    assert np.nanstd(item.values) < 2 < 30 < np.nanstd(plain.values)
    assert item.added == pytest.approx(wave[102:140], abs=2)
    flat = dataclasses.replace(item, added=None)
    with_pattern, without = (each.median for each in yearly.predict([item, flat]))
    assert with_pattern - without == pytest.approx(item.added)
    assert yearly.parse(values[:79], 5).added is None  # less than two years


@pytest.mark.parametrize("name", ["context", "horizon", "smoothings"])
def test_large_sizes_are_rejected_before_memory_is_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 1200000000; the maximum is 100"):
        Forecaster(dataclasses.replace(SIZES, **{name: 1_200_000_000}))
