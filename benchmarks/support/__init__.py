"""Load generators, server processes, request mixes and reports that the benchmarks share."""
