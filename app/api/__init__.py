"""The protocols: each endpoint parses, submits and shapes the answer."""
