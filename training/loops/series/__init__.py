"""Fine-tuning of forecasters on own series."""
