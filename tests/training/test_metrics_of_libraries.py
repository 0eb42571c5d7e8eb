"""The metrics of this project equal the metrics of utilsforecast and torchmetrics.

Two definitions differ by a factor. sMAPE is from 0 to 200 as in M4, and from 0 to 1 in utilsforecast. Quantile losses
are twice the pinball loss as in GluonTS, so that they equal the absolute error if all quantiles are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from training.evaluation import calibration, forecast_metrics, generation, image_classifier

SERIES, HORIZON, SEASON, PAST = 5, 12, 4, 40
LEVELS = np.array(forecast_metrics.LEVELS)
QUANTILES = [f"y-{level}" for level in LEVELS]


@dataclass(frozen=True)
class Forecasts:
    """Actual values [N, horizon], quantiles [N, horizon, levels], MASE scales [N], and frames for utilsforecast."""

    actual: np.ndarray
    quantiles: np.ndarray
    scale: np.ndarray
    frame: pd.DataFrame
    train: pd.DataFrame


# The tests import the libraries, not this file, because the imports take 3 s.


@pytest.fixture(scope="module")
def losses() -> Any:
    return pytest.importorskip("utilsforecast.losses", reason="utilsforecast is not installed")


@pytest.fixture(scope="module")
def classification() -> Any:
    return pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")


@pytest.fixture(scope="module")
def forecasts() -> Forecasts:
    random = np.random.default_rng(0)
    level = random.uniform(5, 500, (SERIES, 1))
    past, actual = (level * (1 + 0.2 * random.normal(size=(SERIES, count))) for count in (PAST, HORIZON))
    quantiles = level[..., None] * (1 + 0.6 * (LEVELS - 0.5)) + random.normal(size=(SERIES, HORIZON, 1))
    names = [f"series {number}" for number in range(SERIES)]
    frame = pd.DataFrame({"unique_id": np.repeat(names, HORIZON), "ds": np.tile(np.arange(HORIZON) + PAST, SERIES)})
    frame["y"] = actual.ravel()
    frame[QUANTILES] = quantiles.reshape(-1, len(LEVELS))
    frame["m-lo-80"], frame["m-hi-80"] = quantiles[..., 0].ravel(), quantiles[..., -1].ravel()
    train = pd.DataFrame({"unique_id": np.repeat(names, PAST), "ds": np.tile(np.arange(PAST), SERIES)})
    train["y"] = past.ravel()
    scale = np.array([forecast_metrics.mase_scale(values, SEASON) for values in past])
    return Forecasts(actual, quantiles, scale, frame, train)


def test_point_forecasts(losses: Any, forecasts: Forecasts) -> None:
    median = forecasts.quantiles[..., 4]
    expected = losses.mase(forecasts.frame, ["y-0.5"], SEASON, forecasts.train)["y-0.5"].to_numpy()
    assert forecast_metrics.mase(forecasts.actual, median, forecasts.scale) == pytest.approx(expected)
    expected = 200 * losses.smape(forecasts.frame, ["y-0.5"])["y-0.5"].mean()
    assert forecast_metrics.smape(forecasts.actual, median).mean() == pytest.approx(expected)


def test_quantile_losses(losses: Any, forecasts: Forecasts) -> None:
    models = {"m": QUANTILES}
    scaled = losses.scaled_mqloss(forecasts.frame, models, LEVELS, SEASON, forecasts.train)["m"].to_numpy()
    own = forecast_metrics.quantile_loss(forecasts.actual, forecasts.quantiles, forecasts.scale)
    assert own == pytest.approx(2 * scaled)
    pinball = losses.mqloss(forecasts.frame, models, LEVELS)["m"].mean()
    own = forecast_metrics.wql(forecasts.actual, forecasts.quantiles)
    assert own == pytest.approx(2 * pinball / np.abs(forecasts.actual).mean())
    unknown = np.full((SERIES, 1), np.nan)
    quantiles = np.hstack([forecasts.quantiles, forecasts.quantiles[:, :1]])
    padded = forecast_metrics.wql(np.hstack([forecasts.actual, unknown]), quantiles)
    assert padded == pytest.approx(own)


def test_intervals(losses: Any, forecasts: Forecasts) -> None:
    lower, upper = forecasts.quantiles[..., 0], forecasts.quantiles[..., -1]
    expected = losses.coverage(forecasts.frame, ["m"], 80)["m"].mean()
    assert 0.5 < expected < 1
    assert forecast_metrics.coverage(forecasts.actual, lower, upper) == pytest.approx(expected)
    frame = forecasts.frame.rename(columns={"m-lo-80": "m-lo-95", "m-hi-80": "m-hi-95"})
    expected = (losses.winkler_score(frame, ["m"], 95)["m"].to_numpy() / forecasts.scale).mean()
    assert forecast_metrics.msis(forecasts.actual, lower, upper, forecasts.scale) == pytest.approx(expected)


def test_the_metrics_of_m4_combine_those_of_a_forecast_and_of_naive2() -> None:
    smape, mase = forecast_metrics.NAIVE2["m4_hourly"]
    assert forecast_metrics.owa("m4_hourly", smape, mase) == 1
    assert forecast_metrics.owa("m4_hourly", smape / 2, mase / 4) == pytest.approx(0.375)


def test_accuracy_and_calibration_of_classes(classification: Any) -> None:
    torch.manual_seed(0)
    probability = (3 * torch.randn(500, 6)).softmax(dim=1)
    labels = torch.where(torch.rand(500) < 0.6, probability.argmax(dim=1), torch.randint(6, (500,)))
    own = {name: entry["value"] for name, entry in calibration.classification_metrics(probability, labels, "").items()}
    accuracy = classification.multiclass_accuracy(probability, labels, num_classes=6, average="micro")
    assert own["accuracy"] == pytest.approx(accuracy.item(), abs=0.005)
    error = classification.multiclass_calibration_error(probability, labels, num_classes=6, n_bins=15, norm="l1")
    assert own["calibration_error"] == pytest.approx(error.item(), abs=1e-4)


def test_precision_and_f1_of_several_labels(classification: Any) -> None:
    torch.manual_seed(0)
    labels = torch.rand(300, 5) < torch.tensor([0.1, 0.2, 0.3, 0.5, 0.8])
    probability = (2 * torch.randn(300, 5) + 2 * labels - 1).sigmoid()
    own = image_classifier.multi_label_metrics(probability, labels, torch.full((5,), 0.4), "")
    precision = classification.multilabel_average_precision(probability, labels.int(), num_labels=5, average="macro")
    assert own["mean_average_precision"]["value"] == pytest.approx(precision.item(), abs=1e-4)
    f1 = classification.multilabel_f1_score(probability, labels.int(), num_labels=5, threshold=0.4, average="micro")
    assert own["f1"]["value"] == pytest.approx(f1.item(), abs=1e-4)


class Pixels(nn.Module):
    """A network whose features are the pixels of images [N, 1, 2, 3]. It replaces the Inception network."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def test_frechet_distance() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    torch.manual_seed(0)
    real, fake = (torch.randint(0, high, (400, 1, 2, 3), dtype=torch.uint8) for high in (256, 200))
    distance = fid.FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64)
    distance.update(real, real=True)
    distance.update(fake, real=False)
    own = generation.frechet_distance(real.flatten(1).float(), fake.flatten(1).float())
    assert own == pytest.approx(distance.compute().item(), rel=1e-6)
