"""Benchmarks of accuracy on public data, in addition to the metrics on the model cards."""
