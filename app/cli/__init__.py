"""Command line tools: ``quartet models`` and ``quartet keys``."""
