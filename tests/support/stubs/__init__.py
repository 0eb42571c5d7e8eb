"""Stubs for parts of the service."""
