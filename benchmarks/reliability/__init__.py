"""Long runs, faults, overload and determinism."""
