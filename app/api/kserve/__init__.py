"""KServe's time series endpoint."""
