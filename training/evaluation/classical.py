"""Classical forecast methods of the package statsforecast, which networks are compared with.

From version 2.1, statsforecast needs pandas below 3, so pip installs version 2.0.3. Only its models are used, which
take arrays.
"""

from __future__ import annotations

import contextlib
import warnings
from functools import partial
from typing import Any

import numpy as np

from app.tasks.forecasting import SCORES, QuantileForecast
from training.evaluation.backtest import Method, Origins, without_gap

LEVELS = (95, 80, 60, 40, 20)  # per cent; the bounds of these intervals are the quantiles of a QuantileForecast
MAX_ETS_SEASON = 24  # AutoETS supports no longer seasons; it then uses none
# Before an origin, at most this number of values or this number of seasons is used, whichever is longer.
MAX_VALUES, MAX_SEASONS = 400, 10


def forecast(name: str, origins: Origins) -> list[QuantileForecast]:
    """Return forecasts of the model with the class ``name`` of statsforecast.

    Its parameters are fitted once for each series, to the values before the first origin. Later origins only add
    values. The seasonal naive forecast replaces a model that cannot be fitted.
    """
    from statsforecast import models

    result: list[QuantileForecast] = []
    model: Any = None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for at, past in enumerate(origins.past):
            values, gap = without_gap(past)
            values = values[-max(MAX_VALUES, MAX_SEASONS * origins.season) :]
            season = origins.season if origins.season < len(values) else 1  # as in the service
            naive = models.SeasonalNaive(season_length=season)
            if not at or origins.places[at][0] != origins.places[at - 1][0]:
                length = 1 if name == "AutoETS" and season > MAX_ETS_SEASON else season
                model = naive
                with contextlib.suppress(Exception):  # statsforecast raises plain exceptions for short series
                    model = getattr(models, name)(season_length=length).fit(values)
            try:
                result.append(_forecast(model, values, gap, origins.horizon))
            except Exception:
                result.append(_forecast(naive, values, gap, origins.horizon))
    return result


def _forecast(model: Any, values: np.ndarray, gap: int, horizon: int) -> QuantileForecast:
    """Return a forecast that begins ``gap`` steps after the values [T]."""
    forecast = model.forward(values, gap + horizon, level=list(LEVELS))
    median = forecast["mean"][gap:]
    bounds = [forecast[f"lo-{level}"] for level in LEVELS], [forecast[f"hi-{level}"] for level in reversed(LEVELS)]
    quantiles = np.stack([*bounds[0], forecast["mean"], *bounds[1]], axis=1)[gap:]
    if not np.isfinite(quantiles).all():
        raise ValueError("the forecast is not finite")
    return QuantileForecast(median, median, SCORES, quantiles)


NAIVE, ETS, THETA = CLASSICAL = [
    Method(
        "seasonal naive",
        "naive_",
        "the last season, repeated; without a season, the last value",
        partial(forecast, "SeasonalNaive"),
    ),
    Method(
        "AutoETS",
        "autoets_",
        "exponential smoothing; AICc chooses the kinds of error, trend and season",
        partial(forecast, "AutoETS"),
    ),
    Method("AutoTheta", "autotheta_", "the best of four Theta models", partial(forecast, "AutoTheta")),
]
