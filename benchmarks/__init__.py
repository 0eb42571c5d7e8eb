"""Benchmarks of accuracy, speed and reliability. Most modules are programs that print Markdown tables and JSON."""
