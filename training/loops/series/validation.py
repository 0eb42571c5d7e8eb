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

    @torch.inference_mode()
    def __call__(self, network: Forecaster) -> float:
        """Set the network to evaluation mode; return its quantile loss."""
        network.eval()
        horizon = self.origins.actual.shape[1]
        batches = zip(self.values.split(256), self.seasons.split(256), strict=True)
        quantiles = torch.cat([network.forecast(values, seasons, horizon) for values, seasons in batches])
        levels = quantiles[..., 1:-1].cpu().numpy() + self.added
        return forecast_metrics.quantile_loss(self.origins.actual, levels, self.origins.mase_scale)
