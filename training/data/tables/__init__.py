"""Read users' CSV, Excel and Parquet files into evenly spaced series.

``read`` runs all steps. Each step has its own module: ``files`` reads the cells, ``header`` finds the column names,
``unpivot`` turns one column per point in time into one row per value, ``time_column`` finds the time stamps,
``columns`` finds values and groups, ``resampling`` combines rows, and ``frequency`` finds the time step. ``numbers``
and ``timestamps`` parse cells, and ``table`` holds the result.
"""
