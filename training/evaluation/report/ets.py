"""Exponential smoothing (ETS; Hyndman et al. 2008) with statsmodels, as a reference method for forecasts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from app.tasks.forecasting import SCORES, QuantileForecast
from training.evaluation import backtest
from training.evaluation.backtest import Origins

LEVELS = (95, 80, 60, 40, 20)  # per cent; the bounds of these intervals are the quantiles of a QuantileForecast
MIN_SEASONS = 2  # smallest number of seasons in a series for which seasonal models are fitted
MAX_ITERATIONS, SIMULATIONS = 200, 1000
# Before an origin, at most this number of values or this number of seasons is used, whichever is longer.
MAX_VALUES, MAX_SEASONS = 400, 10
NON_SEASONAL: tuple[dict[str, Any], ...] = ({}, {"trend": "add"}, {"trend": "add", "damped_trend": True})
SEASONAL: tuple[dict[str, Any], ...] = ({"seasonal": "add"}, {"trend": "add", "damped_trend": True, "seasonal": "add"})
MULTIPLICATIVE = (
    {"error": "mul", "seasonal": "mul"},
    {"error": "mul", "trend": "add", "damped_trend": True, "seasonal": "mul"},
)  # models for series of positive values only


def forecasts(
    origins: Origins, names: Sequence[str], seconds: float, clock: Callable[[], float] = time.monotonic
) -> tuple[list[QuantileForecast], int, list[str]]:
    """Return forecasts from all origins, the number of series that ETS did not forecast, and remarks on these series.

    For each series, the model with the lowest AICc on the values before the first origin is chosen. The model is fitted
    again at every origin. If ETS fails for a series, or if ``seconds`` have passed, seasonal naive forecasts are
    returned instead. ``names`` are the names of the series, in the order of the splits.
    """
    end, horizon = clock() + seconds, origins.actual.shape[1]
    pasts, gaps = zip(*map(backtest.without_gap, origins.past), strict=True)
    pasts = [past[-max(MAX_VALUES, MAX_SEASONS * origins.season) :] for past in pasts]
    result = backtest.seasonal_naive(origins.past, origins.season, horizon)
    problems: dict[str, list[str]] = {}

    def check(*_: object) -> None:
        if clock() >= end:
            raise TimeoutError

    for number, name in enumerate(names):
        own = [at for at, (other, _) in enumerate(origins.places) if other == number]
        if not own:
            continue
        try:
            model, parameters = _chosen(pasts[own[0]], origins.season, check)
            smoothed = []
            for at in own:
                parameters, forecast = _forecast(pasts[at], model, parameters, gaps[at], horizon, check)
                smoothed.append(forecast)
            for at, forecast in zip(own, smoothed, strict=True):
                result[at] = forecast
        except TimeoutError:
            problems.setdefault(f"it took longer than {seconds:.0f} s", []).append(name)
        except Exception as error:  # statsmodels raises errors of many classes for unusual series
            problems.setdefault(f"it failed ({type(error).__name__}: {str(error)[:100]})", []).append(name)
    remarks = [
        f"ETS: seasonal naive replaces it for {_listed(names)}, because {reason}" for reason, names in problems.items()
    ]
    return result, sum(map(len, problems.values())), remarks


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more series" if len(names) > 5 else "")


def _chosen(past: np.ndarray, season: int, check: Callable[..., None]) -> tuple[dict[str, Any], np.ndarray]:
    """Return the options and parameters of the model with the lowest AICc for a series [T]."""
    fewest = max(MIN_SEASONS * season + 1, 10 + 2 * (season // 2))  # the second is statsmodels' limit for start values
    seasonal = season > 1 and len(past) >= fewest
    models = (*NON_SEASONAL, *(SEASONAL if seasonal else ()), *(MULTIPLICATIVE if seasonal and past.min() > 0 else ()))
    best: tuple[float, dict[str, Any], np.ndarray] | None = None
    for model in models:
        options = {**model, "seasonal_periods": season} if "seasonal" in model else model
        result = _fit(past, options, None, check)
        score = float(result.aicc)
        if np.isfinite(score) and (best is None or score < best[0]):
            best = score, options, np.asarray(result.params)
    if best is None:
        raise ValueError("no model fits")
    return best[1:]


def _forecast(
    past: np.ndarray, model: dict[str, Any], parameters: np.ndarray, gap: int, horizon: int, check: Callable[..., None]
) -> tuple[np.ndarray, QuantileForecast]:
    """Fit a model, starting with the given parameters; return the new parameters and the forecast.

    The forecast begins ``gap`` steps after the past.
    """
    result = _fit(past, model, parameters, check)
    steps = gap + horizon
    errors = np.random.default_rng(0).standard_normal((steps, SIMULATIONS)) * np.sqrt(result.mse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prediction = result.get_prediction(  # intervals of additive models are exact; all others are simulated
            len(past), len(past) + steps - 1, simulate_repetitions=SIMULATIONS, random_errors=errors
        )
        intervals = [np.asarray(prediction.pred_int(alpha=1 - level / 100)) for level in LEVELS]
    median = np.asarray(prediction.predicted_mean)
    lower, upper = ([interval[:, side] for interval in intervals] for side in (0, 1))
    quantiles = np.stack([*lower, median, *reversed(upper)], axis=1)[gap:]
    median = median[gap:]
    if not np.isfinite(quantiles).all():
        raise ValueError("its forecasts are not finite")
    return np.asarray(result.params), QuantileForecast(median, median, SCORES, quantiles)


def _fit(past: np.ndarray, model: dict[str, Any], start: np.ndarray | None, check: Callable[..., None]) -> Any:
    """Fit a model to a series [T], from the parameters ``start`` if given.

    ``check`` is called at each iteration. It raises TimeoutError if the time limit is reached.
    """
    import pandas as pd
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that does not converge has a high AICc, so it needs no warning
        fitted = ETSModel(pd.Series(past), initialization_method="heuristic", **model)
        return fitted.fit(start_params=start, disp=False, maxiter=MAX_ITERATIONS, callback=check)
