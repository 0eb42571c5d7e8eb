"""What a forecaster says of a series: its middle, and intervals of any level around it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist()


@dataclass(frozen=True)
class QuantileForecast:
    """The coming values of a series, in its units.

    ``quantiles`` [horizon, Q] belong to ``scores`` [Q], ascending: how many standard deviations from the middle each
    would lie if errors were normal. One of the scores is 0: the median.
    """

    mean: np.ndarray
    median: np.ndarray
    scores: np.ndarray
    quantiles: np.ndarray
    seasonality: int | None = None

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """The lower and upper bounds [horizon] that hold ``level`` per cent."""
        score = -NORMAL.inv_cdf(0.5 - level / 200)
        return self._at(-score), self._at(score)

    def _at(self, score: float) -> np.ndarray:
        """On the line between the scores that there are; beyond them as far in proportion, as normal errors are."""
        scores, quantiles = self.scores, self.quantiles
        if not scores[0] < score < scores[-1]:
            outermost = -1 if score > 0 else 0
            return self.median + (quantiles[:, outermost] - self.median) * (score / scores[outermost])
        above = int(np.searchsorted(scores, score, "right"))
        share = (score - scores[above - 1]) / (scores[above] - scores[above - 1])
        return quantiles[:, above - 1] + share * (quantiles[:, above] - quantiles[:, above - 1])
