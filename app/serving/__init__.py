"""Model versions in memory: loading, caching, and which version serves a request."""
