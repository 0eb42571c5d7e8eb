"""Quartet: one HTTP service for four kinds of trained networks."""
