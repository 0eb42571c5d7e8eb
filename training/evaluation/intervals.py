"""95 % confidence intervals of measured figures, and the decimals that a number of samples supports."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

SCORE = NormalDist().inv_cdf(0.975)
RESAMPLES = 2000  # of a bootstrap


def wilson(correct: np.ndarray) -> list[float]:
    """Return the Wilson interval of the share of booleans [N] that are true (Wilson 1927)."""
    from scipy.stats import binomtest  # imported here, because it takes 0.5 s

    bounds = binomtest(int(correct.sum()), len(correct)).proportion_ci(method="wilson")
    return [round(float(bound), 4) for bound in bounds]


def bootstrap(values: np.ndarray) -> list[float] | None:
    """Return the percentile interval of the mean of values [N]. With one value, there is none."""
    if len(values) < 2:
        return None
    random = np.random.default_rng(0)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    return [round(float(bound), 4) for bound in np.quantile(means, [0.025, 0.975])]


def normal(value: float, error: float) -> list[float]:
    """Return the interval of a figure with a normal distribution and this standard error."""
    return [round(value + sign * SCORE * error, 4) for sign in (-1, 1)]


def decimals(count: int) -> int:
    """Return the number of decimals of a share of ``count`` samples: 2 for fewer than 1,000, 4 for 10,000."""
    return min(max(2, int(math.log10(count))), 4)
