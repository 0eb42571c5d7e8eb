"""Metrics of trained networks, comparisons with other methods, and a check of published metrics."""
