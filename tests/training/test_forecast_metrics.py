"""Forecast metrics, training windows, and the scaling of intervals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from app.networks.forecaster import QUANTILES
from app.networks.series_reader import ForecasterSizes, Reader
from app.tasks.forecasting import SCORES, QuantileForecast
from app.tasks.seasonality import SEASONS
from benchmarks import forecasters
from training.configs.series import ForecasterConfig
from training.data import datasets
from training.data.series.sources import training_sources
from training.data.series.synthetic import synthetic
from training.data.series.windows import Batch, Source, WindowSampler
from training.evaluation import forecast_metrics
from training.evaluation.classical import NAIVE
from training.evaluation.forecast_metrics import Errors
from training.loops import forecaster

SIZES = ForecasterSizes(context=24, patch=12, horizon=6, hidden=8, lags=2, members=1)


@pytest.mark.slow  # needs the M4 series, which `make data` downloads
@pytest.mark.parametrize(
    ("load", "smape", "mase"), [(datasets.m4_hourly, 13.912, 1.193), (datasets.m4_weekly, 9.161, 2.777)]
)
def test_the_seasonal_naive_forecast_of_m4_has_the_published_scores(load: Any, smape: float, mase: float) -> None:
    collection = load()
    past, actual, season = [series.numpy() for series in collection.past], collection.future.numpy(), collection.season
    parts = [[pair] for pair in zip(past, actual, strict=True)]
    origins = forecasters.origins_of(parts, season)
    naive = NAIVE.forecast(origins)
    assert origins.errors(naive).smape.mean() == pytest.approx(smape, abs=5e-4)
    assert origins.errors(naive).mase == pytest.approx(mase, abs=5e-4)


def test_a_comparison_pools_all_parts_and_splits_series_at_their_origins() -> None:
    values = np.arange(20.0) % 4
    origins = forecasters.origins_of([forecasters.windows(values, 12, 4, 2)], 4)
    assert [len(past) for past in origins.past] == [12, 14, 16]
    assert origins.actual.tolist() == [[0, 1, 2, 3], [2, 3, 0, 1], [0, 1, 2, 3]]
    past = np.array([0.0, 1, 2, 3, 2, 3, 4, 5])
    other = forecasters.origins_of([[(past, np.full(4, 5.0))]] * 3, 4)
    forecasts = NAIVE.forecast(other)  # 2, 3, 4 and 5; the MASE scale is 2
    own = other.errors(forecasts).scaled
    row = forecasters.row("four", other, NAIVE, forecasts, 2 * own)
    change = "-50.0% (90 % interval -50.0% to -50.0%)"
    assert row[:4] == ["four, 3 forecasts of 4 steps, 3 series", "seasonal naive", 0.75, change]
    assert row[4:] == pytest.approx([0.2371, 3.9, 0.75, 1.0], rel=0.01)


def test_steps_without_an_actual_value_do_not_count() -> None:
    actual, scale = np.array([[1.0, np.nan, 3], [4, 4, 8]]), np.array([2.0, 4])
    forecast = QuantileForecast(np.full(3, 2.0), np.full(3, 2.0), SCORES, np.full((3, len(SCORES)), 2.0))
    errors = Errors(actual, scale, [forecast] * 2)  # the absolute errors are 1, none, 1, 2, 2 and 6
    assert errors.scaled == pytest.approx([1 / 2, 10 / 3 / 4])
    assert errors.losses == pytest.approx(errors.scaled)  # because all quantiles are equal
    assert errors.smape == pytest.approx([200 * (1 / 3 + 1 / 5) / 2, 200 * (2 / 6 + 2 / 6 + 6 / 10) / 3])
    assert errors.by_step == pytest.approx([0.5, 0.5, 1])
    assert errors.msis == pytest.approx(2 / 0.05 * errors.mase)  # all values are outside intervals of width 0
    assert errors.wql == pytest.approx(12 / 20)
    spread = dataclasses.replace(forecast, quantiles=2 + np.tile(np.linspace(-2, 2, len(SCORES)), (3, 1)))
    spread = Errors(actual, scale, [spread] * 2)
    assert (spread.coverage(80), spread.coverage(95)) == (0.4, 0.8)
    assert np.isnan(Errors(0 * actual, scale, [forecast] * 2).wql)


def test_the_metric_of_m4_combines_those_of_a_forecast_and_of_naive2() -> None:
    smape, mase = forecast_metrics.NAIVE2["m4_hourly"]
    assert forecast_metrics.owa("m4_hourly", smape, mase) == 1
    assert forecast_metrics.owa("m4_hourly", smape / 2, mase / 4) == pytest.approx(0.375)


def sample_windows(held_out: bool, mixup: float = 0.0, hidden_season_share: float = 0.0) -> tuple[Batch, WindowSampler]:
    """Sample windows from two sources. The values of series n (from 1) are 1000 n, 1000 n + 1, and so on."""
    series = [1000.0 * (i + 1) + torch.arange(40 + 10 * i, dtype=torch.float64) for i in range(4)]
    sampler = WindowSampler(
        [Source(series[:2], 3, 4, 0.5, 0.5), Source(series[2:], 1, 2, 0.5, 0.5)], 24, 6, hidden_season_share
    )
    return sampler.sample(2000, mixup, held_out, torch.Generator().manual_seed(0)), sampler


@pytest.mark.parametrize("held_out", [False, True])
def test_windows_are_parts_of_one_series_and_never_contain_held_out_values(held_out: bool) -> None:
    batch, sampler = sample_windows(held_out)
    windows = torch.cat([batch.values, batch.future], dim=1)
    observed = ~windows.isnan()
    assert observed[:, 21:25].all()
    assert observed[:, :24].sum(1).unique().tolist() == list(range(3, 25))
    series = (windows.nan_to_num(0).amax(1) // 1000).long() - 1
    assert (windows.diff(dim=1).nan_to_num(1.0) == 1).all()
    horizons = torch.tensor([4, 4, 2, 2])[series]
    lengths = torch.tensor([40, 50, 60, 70])[series]
    latest = windows.nan_to_num(0).amax(1) % 1000
    assert (latest < lengths - horizons * held_out).all()
    assert (latest == lengths - horizons * held_out - 1).any()
    assert torch.equal(batch.seasons, torch.where((series < 2) & (observed[:, :24].sum(1) > 3), 3, 1))
    assert torch.equal((batch.weights == 1).sum(1), horizons)
    assert series.bincount().min() > 400
    last_batch = sampler.last_horizons(0)
    assert last_batch.values[1, -1] == 2000 + 50 - 4 - 1
    assert last_batch.future[1, :4].tolist() == [2046, 2047, 2048, 2049]


def test_mixed_windows_have_one_season_and_no_gaps() -> None:
    batch, _ = sample_windows(True, mixup=0.5)
    assert (batch.values[:1000, -1] == 0).all()  # mixed windows are relative to their last value
    assert (batch.values[1000:, -1] >= 1000).all()
    assert not batch.values[:, -3:].isnan().any()
    assert not batch.future[:, 0].isnan().any()
    assert (batch.seasons < (~batch.values.isnan()).sum(1)).all()


def test_a_share_of_the_windows_has_no_season() -> None:
    batch, _ = sample_windows(False, hidden_season_share=0.5)
    long, (without, _) = (~batch.values.isnan()).sum(1) > 3, sample_windows(False)
    seasonal = long & (without.seasons == 3)
    assert 0.45 < (batch.seasons[seasonal] == 1).double().mean() < 0.55


def test_the_loss_is_the_pinball_loss_in_units_of_the_mase_scale() -> None:
    values = torch.tensor([[0.0, 2.0] * 12], dtype=torch.float64)
    reading = Reader(SIZES)(values, torch.tensor([1]))  # MASE scale 2, naive forecast 2
    future = torch.tensor([[6.0, 2.0, *[torch.nan] * 4]], dtype=torch.float64)
    batch = Batch(values, torch.tensor([1]), future, torch.tensor([[1.0, 0.5, 1, 1, 1, 1]]))
    outputs = torch.zeros(1, 6, len(QUANTILES))
    loss = forecaster.pinball_loss(outputs, reading, batch).item()
    assert loss == pytest.approx(np.mean([2 * level for level in QUANTILES]) * 1 / 1.5)


def test_synthetic_series_are_finite_differ_and_repeat_themselves() -> None:
    for season in (1, *SEASONS):
        batch = synthetic(season, 60, 400, seed=season)
        assert batch.shape == (60, 400)
        assert batch.isfinite().all()
        assert torch.equal(batch, synthetic(season, 60, 400, seed=season))
        assert len({round(float(series[7]), 9) for series in batch}) > 40
        if 1 < season < 100:
            lag_season = (batch[:, season:] - batch[:, :-season]).abs().mean(1)
            lag_half_season = (batch[:, season // 2 :] - batch[:, : -(season // 2)]).abs().mean(1)
            assert (lag_season < lag_half_season).double().mean() > 0.6


@pytest.mark.parametrize("shares", [{"hourly_share": 0.6}, {"summed_share": -0.1}])
def test_shares_that_leave_no_windows_for_weekly_series_are_rejected(shares: dict[str, float]) -> None:
    with pytest.raises(SystemExit, match=str(next(iter(shares.values())))):
        training_sources(ForecasterConfig().model_copy(update=shares), seed=0)
