"""The step budget: how long a round of a text engine may last."""

from __future__ import annotations

import pytest

from app.engine.step_budget import LONG_GAP, expected_seconds, is_long, step_budget


@pytest.mark.parametrize(
    ("normal_budget", "gap", "rejecting", "budget"),
    [
        (0.001, 0.0, False, 0.001),  # the normal budget
        (0.001, 0.006, False, 0.001),  # the longest gap that does not count as long
        (0.001, 0.007, False, 0.007),  # the budget is as long as the gap
        (0.001, 0.05, False, 0.05),
        (0.001, 0.3, False, 0.05),  # at most 50 ms
        (0.02, 0.007, False, 0.007),  # also if the normal budget is longer than the gap
        (0.001, 0.0, True, 0.012),  # at least 12 ms while requests are rejected
        (0.001, 0.007, True, 0.012),
        (0.001, 0.02, True, 0.02),
        (0.02, 0.0, True, 0.02),
        (0.0, 0.0, False, 0.0),  # one step a round
    ],
)
def test_the_budget_of_a_round_depends_on_gap_and_rejections(
    normal_budget: float, gap: float, rejecting: bool, budget: float
) -> None:
    assert step_budget(normal_budget, gap, rejecting) == budget


@pytest.mark.parametrize(
    ("step_seconds", "gap", "seconds"), [(0.0002, 0.0, 0.0002), (0.0002, 0.006, 0.0002), (0.0002, 0.007, 0.05)]
)
def test_the_expected_duration_of_a_round_depends_on_the_gap(step_seconds: float, gap: float, seconds: float) -> None:
    assert expected_seconds(step_seconds, gap) == seconds


def test_a_gap_is_long_from_6_ms_on() -> None:
    assert LONG_GAP == 0.006
    assert [is_long(gap) for gap in (0.0059, 0.006, 0.0061)] == [False, False, True]
