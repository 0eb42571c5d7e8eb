"""Series for the training of forecasters."""
