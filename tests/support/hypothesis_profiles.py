"""Settings of Hypothesis for the property-based tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Each run has a new seed. A failure prints its example, and a decorator that repeats it.
FUZZ = settings(max_examples=80, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
