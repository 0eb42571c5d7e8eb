"""The native endpoints, and those for models, health, administration and the web page."""
