"""Determine how long one round of a text engine may last.

A round is one job on the executor. The job computes one step of all running texts. Further steps follow until the time
budget of the round is used or a text is finished. Several short steps in one round save event-loop iterations. All
functions here are pure.
"""

from __future__ import annotations

STEP_BUDGET = 0.001  # seconds that a round lasts by default
# Shortest budget in seconds while requests are rejected. Requests are rejected between two rounds. With shorter rounds,
# the rejections would take too large a part of the time.
STEP_BUDGET_REJECTING = 0.012
LONG_GAP = 0.006  # seconds; after a longer gap between two rounds, the next round lasts as long as the gap
MAX_STEP_BUDGET = 0.05  # seconds that a round lasts at most, however long the gap was


def is_long(gap: float) -> bool:
    """Return whether other work took long between two rounds. ``gap`` is the duration of that work in seconds."""
    return gap > LONG_GAP


def step_budget(normal_budget: float, gap: float, rejecting: bool) -> float:
    """Return the time in seconds after which a round of text generation takes no further step.

    ``gap`` is the time in seconds that other models and the event loop have used since the last round. After a long
    gap, the round lasts as long as the gap, up to ``MAX_STEP_BUDGET``. So the generation of texts gets half of the
    computing time. Otherwise, it would get only a hundredth while other models compute long batches.

    ``rejecting`` means that requests were rejected since the last round. The result is then at least
    ``STEP_BUDGET_REJECTING``.
    """
    budget = min(gap, MAX_STEP_BUDGET) if is_long(gap) else normal_budget
    return max(budget, STEP_BUDGET_REJECTING) if rejecting else budget


def expected_seconds(step_seconds: float, gap: float) -> float:
    """Return the expected duration of a round in seconds. The executor runs short rounds on the event loop.

    The expected duration is ``step_seconds``, the duration of one step. After a long gap, it is ``MAX_STEP_BUDGET``.
    ``gap`` is the time in seconds that other models and the event loop have used since the last round.
    """
    return MAX_STEP_BUDGET if is_long(gap) else step_seconds
