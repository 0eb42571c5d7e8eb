"""Read users' CSV, Excel and Parquet files into one tidy frame of evenly spaced series.

This package needs the extra ``tables``: pandas and openpyxl; Parquet files need pyarrow, which the extra ``train`` has.
The service must not import it at start-up.
``read`` runs all steps: ``files`` reads the cells, ``header`` finds the column names, ``layout`` melts wide tables,
``columns`` finds time stamps, values and groups, ``grid`` finds the time step, and ``tidy`` fills the steps.
``numbers`` and ``times`` parse cells. ``messages`` and ``options`` need no pandas.
"""
