"""Read CSV, Excel and Parquet files of users into evenly spaced series.

``read`` runs the steps, one in each module: ``files`` reads the cells, ``header`` finds the column names, ``layout``
turns time across the columns into rows, ``time_column`` finds the time stamps, ``columns`` finds values and groups, and
``frequency`` finds the time step.
"""
