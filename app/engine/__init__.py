"""Scheduling of computations: admission control, queues, batching and threads.

The package imports neither torch nor HTTP code.
"""
