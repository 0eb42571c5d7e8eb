"""Measure the validation loss of a network while it is fine-tuned on a user's series."""

from __future__ import annotations

import numpy as np
import torch

from app.networks.forecaster import Forecaster
from app.tasks.forecasting import GlobalForecaster
from training.evaluation import forecast_metrics
from training.evaluation.backtest import Origins


class Validation:
    """Computes the quantile loss of a network on forecast origins."""

    def __init__(self, forecaster: GlobalForecaster, origins: Origins) -> None:
        self.origins = origins
        horizon = origins.actual.shape[1]
        items = [
            forecaster.parse(past.tolist(), horizon, seasonality=origins.season, covariates=known)
            for past, known in zip(origins.past, origins.covariates, strict=True)
        ]
        added = [np.zeros(horizon) if item.added is None else item.added for item in items]
        self.added = np.stack(added)[..., None]  # [N, horizon, 1]
        self.values = torch.from_numpy(np.stack([item.values for item in items])).to(forecaster.device)
        self.seasons = torch.tensor([item.season for item in items], device=forecaster.device)
        # The forecast of a series with missing values at its end begins with these values.
        steps = np.array([item.gap for item in items])[:, None] + np.arange(horizon)  # [N, horizon]
        self.steps, self.horizon = steps[..., None], int(steps.max()) + 1

    @torch.inference_mode()
    def __call__(self, network: Forecaster) -> float:
        """Set the network to evaluation mode; return its quantile loss."""
        network.eval()
        batches = zip(self.values.split(256), self.seasons.split(256), strict=True)
        quantiles = torch.cat([network.forecast(values, seasons, self.horizon) for values, seasons in batches])
        levels = np.take_along_axis(quantiles[..., 1:-1].cpu().numpy(), self.steps, axis=1) + self.added
        return float(forecast_metrics.quantile_loss(self.origins.actual, levels, self.origins.mase_scale).mean())
