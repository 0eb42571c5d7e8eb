"""ASGI middleware: API keys, body limits, CORS, and the fast path to the busiest routes."""
