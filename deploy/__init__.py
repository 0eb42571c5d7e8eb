"""More than one machine, and what operators look at: Ray Serve, Kubernetes, nginx, Prometheus, Grafana."""
