"""A toy architecture: the two files that a new architecture adds to ``app/networks`` and ``training``."""
