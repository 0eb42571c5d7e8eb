"""The training series of series-lstm: series of M4, sums of consecutive values of these series, synthetic series."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from app.networks.series_reader import ForecasterSizes
from app.tasks.seasonality import SEASONS
from training.configs.series import ForecasterConfig
from training.data import datasets
from training.data.series.synthetic import structural, synthetic
from training.data.series.windows import Source
from training.run import derive_seed

TRUNCATED_SHARE = 0.4  # share of the windows whose past is cut to a random length, except for M4's own series
M4_TRUNCATED_SHARE = 0.1
SHARE_OPTIONS = "hourly_share, summed_share, structural_share and synthetic_share"
SYNTHETIC_LENGTH = 700  # number of values of a synthetic series
MISLABELLED_EVERY = 5  # every fifth synthetic series without a season is also used with each of the wrong seasons
WEEKS_PER_YEAR = 365.25 / 7
# Sums of values of M4's series: (values in a sum, season of the sums, horizon of the sums, weight among all sums)
SUMS_OF_HOURS = ((2, 12, 24, 1.0), (3, 8, 16, 0.7), (4, 6, 12, 0.7), (6, 4, 8, 0.7), (24, 7, 14, 1.0))
SUMS_OF_WEEKS = ((WEEKS_PER_YEAR / 12, 12, 18, 4.0), (WEEKS_PER_YEAR / 4, 4, 8, 3.0), (WEEKS_PER_YEAR, 1, 6, 1.5))
# Structural series: (season, length, horizon, weight among all structural series)
STRUCTURAL = (
    (1, 60, 6, 3.0),
    (1, 400, 48, 1.0),
    (4, 120, 8, 3.0),
    (6, 200, 12, 0.5),
    (7, 300, 28, 1.0),
    (12, 300, 18, 3.0),
    (24, 500, 48, 1.0),
    (52, 400, 26, 1.0),
)


def training_sources(config: ForecasterConfig, seed: int) -> list[Source]:
    """Return the sources of all training series: series of M4, sums of their values, and synthetic series.

    A sum adds consecutive values of one of M4's hourly or weekly series. The synthetic series come from ``structural``
    and from ``synthetic``. Windows of M4's weekly series get the rest of the shares.

    Raises:
        SystemExit: a share is negative, or the shares are too large.
    """
    shares = config.hourly_share, config.summed_share, config.structural_share, config.synthetic_share
    weekly_share = 1 - sum(shares)
    if min(shares) < 0 or weekly_share < -1e-9:
        raise SystemExit(f"{SHARE_OPTIONS} are {shares}; each should be at least 0, and their sum at most 1")
    hourly, weekly = datasets.m4_hourly(), datasets.m4_weekly()
    sources = [
        Source(collection.past, collection.season, collection.future.shape[1], share, M4_TRUNCATED_SHARE)
        for collection, share in ((hourly, config.hourly_share), (weekly, max(weekly_share, 0.0)))
    ]
    sources += _summed(hourly.past, SUMS_OF_HOURS, config.summed_share)
    sources += _summed(weekly.past, SUMS_OF_WEEKS, config.summed_share)
    total = sum(weight for *_, weight in STRUCTURAL)
    for season, length, horizon, weight in STRUCTURAL:
        series = structural(season, config.structural_series, length, derive_seed(seed, "structural", season, length))
        share = config.structural_share * weight / total
        sources.append(Source(list(series), season, horizon, share, TRUNCATED_SHARE))
    return sources + _synthetic(config, seed)


def _summed(past: Sequence[Tensor], sums: Sequence[tuple[float, int, int, float]], share: float) -> list[Source]:
    total = sum(weight for *_, weight in (*SUMS_OF_HOURS, *SUMS_OF_WEEKS))
    sources = []
    for count, season, horizon, weight in sums:
        series = [sums_of(values, count) for values in past]
        long_enough = [values for values in series if len(values) >= horizon + 4]
        sources.append(Source(long_enough, season, horizon, share * weight / total, TRUNCATED_SHARE))
    return sources


def sums_of(values: Tensor, count: float) -> Tensor:
    """Return the sums [T // count] of ``count`` consecutive values [T] each. The last sum ends at the last value.

    If ``count`` is not a whole number, a value between two sums is divided between them.
    """
    ends = len(values) - count * np.arange(int(len(values) / count), -1, -1)
    total = np.concatenate([[0.0], values.numpy().cumsum()])
    return torch.from_numpy(np.diff(np.interp(ends, np.arange(len(total)), total)))


def _synthetic(config: ForecasterConfig, seed: int) -> list[Source]:
    """Return synthetic series for each season length. Some series without a season are also used with wrong seasons."""
    horizon, share = ForecasterSizes().horizon, config.synthetic_share / (len(SEASONS) + 2)
    seasonless = synthetic(1, 2 * config.synthetic_series, SYNTHETIC_LENGTH, derive_seed(seed, "synthetic", 1))
    sources = [Source(list(seasonless), 1, horizon, 2 * share, TRUNCATED_SHARE)]
    for season in SEASONS:
        seasonal = synthetic(season, config.synthetic_series, SYNTHETIC_LENGTH, derive_seed(seed, "synthetic", season))
        series = [*seasonal, *seasonless[::MISLABELLED_EVERY]]
        sources.append(Source(series, season, horizon, share, TRUNCATED_SHARE))
    return sources
