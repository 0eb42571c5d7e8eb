"""Benchmarks of speed and reliability. Each module is a program that prints Markdown tables and a line of JSON."""
