"""Deployment and monitoring: Ray Serve, Kubernetes, nginx, Prometheus and Grafana."""
