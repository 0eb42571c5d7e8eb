"""ASGI middleware, and checks of the router: host names, CORS, API keys and memory limits."""
