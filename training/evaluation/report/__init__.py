"""The backtest report of own series: rolling forecasts of several methods, as a picture and as an HTML page.

``results`` computes forecasts and errors, ``ets`` fits exponential smoothing, ``figures`` draws, ``page`` writes HTML.
"""
