"""The service's own endpoints: one for each task, and those for models, health, administration and the web page."""
