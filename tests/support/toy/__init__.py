"""A toy architecture for a test. It has the two files that a new architecture adds to app/networks and training."""
