"""Settings of Hypothesis for the property-based tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

QUICK_PROFILE = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
