"""Your own tables: CSV, Excel and Parquet files are read into evenly spaced series.

The modules are steps: ``files`` (cells), ``header``, ``layout`` (time across the columns), ``time_column``, ``columns``
(values and groups) and ``frequency`` (the grid of time steps); ``read`` runs them.
"""
