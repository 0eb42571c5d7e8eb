"""Recorded answers: several hundred requests to all endpoints, and the answers that the service gives to them."""
