"""A toy architecture for a test. It has the same two files as a new architecture in app/networks and in training."""
