"""Fine-tuning of forecasters on users' series."""
