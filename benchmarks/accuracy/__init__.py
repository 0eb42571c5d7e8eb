"""Accuracy on public data, beyond the metrics on the model cards."""
