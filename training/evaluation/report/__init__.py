"""The backtest report for your own series: rolling forecasts of several methods, as a picture and as an HTML page.

``results`` computes forecasts and errors, ``ets`` fits exponential smoothing, ``figures`` draws the plots, and ``page``
writes the HTML page.
"""
