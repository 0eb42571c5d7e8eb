"""ASGI middleware: host names, CORS, API keys, memory limits, and the fast path to the busiest routes."""
