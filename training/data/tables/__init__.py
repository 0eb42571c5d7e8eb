"""Your own tables: CSV, Excel and Parquet files are read into evenly spaced series.

The modules are steps: ``files`` (cells), ``header``, ``layout`` (time across the columns), ``time_column``, ``columns``
(values and groups) and ``frequency`` (the grid of time steps); ``read`` runs them.
"""

from training.data.tables.read import AGGREGATES, ReadOptions, read
from training.data.tables.table import Series, Table, look, summary, to_json_lines, without_gaps

__all__ = ["AGGREGATES", "ReadOptions", "Series", "Table", "look", "read", "summary", "to_json_lines", "without_gaps"]
