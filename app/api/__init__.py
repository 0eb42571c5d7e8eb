"""The HTTP endpoints of all protocols. An inference endpoint parses requests, runs an engine and builds responses."""
