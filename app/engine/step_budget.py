"""How long one round of a text engine may last.

A round is one job on the executor: a step for all running texts, and further steps until its budget is used. Several
short steps in one round save event-loop iterations. All functions here are pure.
"""

from __future__ import annotations

STEP_BUDGET = 0.001  # seconds a round lasts by default
STEP_BUDGET_REJECTING = 0.012  # minimum while requests are rejected: rejecting after each step costs more
LONG_GAP = 0.006  # seconds; after a longer gap between two rounds, the next round lasts as long as the gap
MAX_STEP_BUDGET = 0.05  # seconds a round lasts after the longest gap


def is_long(gap: float) -> bool:
    """Return whether other work took long between two rounds; ``gap`` is in seconds."""
    return gap > LONG_GAP


def step_budget(normal_budget: float, gap: float, rejecting: bool) -> float:
    """Return the seconds after which a round takes no further step.

    ``gap`` is the time in seconds that other models and the event loop have used since the last round. After a long gap
    the round lasts as long as the gap, up to ``MAX_STEP_BUDGET``: texts then get half of the computing time, instead of
    a hundredth beside long batches of other models. ``rejecting`` tells whether requests were rejected since the last
    round.
    """
    budget = min(gap, MAX_STEP_BUDGET) if is_long(gap) else normal_budget
    return max(budget, STEP_BUDGET_REJECTING) if rejecting else budget


def expected_seconds(step_seconds: float, gap: float) -> float:
    """Return the expected duration of a round in seconds, from that of one step. Short rounds run on the event loop."""
    return MAX_STEP_BUDGET if is_long(gap) else step_seconds
