"""Metrics, benchmarks of quality, and the check of published versions against their cards."""
