"""Helpers that the tests share: tiny networks, services, clients and checks."""
