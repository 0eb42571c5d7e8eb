"""Command line tools: ``python -m app.models`` and ``python -m app.keys``."""
