"""The backtest report for your own series: a leaderboard and rolling forecasts, as a picture and as an HTML page."""
