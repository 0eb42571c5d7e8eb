"""Benchmarks of reliability: long runs, faults, overload and determinism."""
