"""The HTTP endpoints of all protocols. For inference, they parse requests, run an engine and build responses."""
