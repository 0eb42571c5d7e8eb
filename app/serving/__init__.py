"""Load model versions, keep them in memory, and choose the version that serves a request."""
