"""Fine-tuning of forecasters on the series of users."""
