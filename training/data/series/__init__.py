"""Training series for forecasters."""
