"""The HTTP endpoints of all protocols. Each one parses a request, submits it to an engine and builds the response."""
