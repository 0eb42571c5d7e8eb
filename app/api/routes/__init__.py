"""The service's own endpoints: the tasks, the models, health checks, administration and the web page."""
