"""The forecaster for a single series, sine-lstm: the network and its predictor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import publish_tiny

from app.networks.lstm import SeriesLSTM, SeriesLSTMSizes
from app.tasks.forecasting import WindowForecaster


def test_free_running_equals_feeding_back_each_forecast() -> None:
    torch.manual_seed(0)
    network = SeriesLSTM(SeriesLSTMSizes(7, 5)).double()
    windows = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def simple() -> torch.Tensor:
        outputs, state = network.steps(windows)
        forecasts = [outputs[:, -1:]]
        for _ in range(11):
            output, state = network.steps(forecasts[-1], state)
            forecasts.append(output)
        return torch.cat(forecasts, dim=1)

    for weight in (network.lstm.weight_hh_l0, network.head.bias, network.head.weight, windows):
        (expected,) = torch.autograd.grad(simple().square().sum(), weight)
        (gradient,) = torch.autograd.grad(network(windows, 12).square().sum(), weight)
        assert torch.allclose(expected, gradient, atol=1e-12)
    assert torch.allclose(simple(), network(windows, 12), atol=1e-12)


@pytest.fixture
def forecaster(tmp_path: Path) -> WindowForecaster:
    return WindowForecaster(publish_tiny(tmp_path, "tiny-lstm"), torch.device("cpu"))


def test_a_network_recognises_series_like_its_training_series() -> None:
    network: Any = SeriesLSTM(SeriesLSTMSizes(10, 4))
    training = torch.sin(torch.arange(300) / 20) + 0.1 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    network.store_statistics(training)
    description, peak = network.training_series(), training[25:40].double().numpy()
    expected = [float(each) for each in (training.mean(), training.std(), training.diff().std())]
    assert description == pytest.approx(expected)
    assert description.resembles(peak)
    for other in (peak * 100, peak + 50, peak / 100, peak + 1e308, peak * 1e308, np.array([0.0, 1e-9])):
        assert not description.resembles(other)


@pytest.mark.parametrize(("shift", "factor"), [(0.0, 1e-5), (1e5, 3.0), (1e5, 1e6)])
def test_shift_and_scale_of_an_unknown_series_shift_and_scale_its_forecast(
    forecaster: WindowForecaster, shift: float, factor: float
) -> None:
    values = 1e3 * np.random.default_rng(1).normal(size=30)
    (plain,) = forecaster.predict([forecaster.parse(values.tolist(), 5)])
    (moved,) = forecaster.predict([forecaster.parse((values * factor + shift).tolist(), 5)])
    assert (moved.mean - shift) / factor == pytest.approx(plain.mean, rel=1e-4)


def test_intervals_never_narrow_and_grow_beyond_the_measured_steps(forecaster: WindowForecaster) -> None:
    item = forecaster.parse([0.0, 1.0] * 10, 12)
    (forecast,) = forecaster.predict([item])
    widths, nearly_all = (forecast.interval(level)[1] - forecast.mean for level in (95, 99.99999999999999))
    assert widths[:3] == pytest.approx(1.96 * np.array([0.1, 0.2, 0.3]) * item.scale, rel=1e-3)
    assert widths[11] == pytest.approx(widths[2] * 2)
    assert (np.diff(widths) >= 0).all()
    assert np.isfinite(nearly_all).all()
    assert (nearly_all > widths).all()
