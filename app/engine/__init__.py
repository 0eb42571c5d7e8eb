"""Scheduling of computations: admission, queues, batching, threads. The engine imports neither torch nor HTTP code."""
