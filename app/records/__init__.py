"""Capture of requests and answers, and feedback on them: which answers turned out to be right.

Nothing is captured unless ``QUARTET_CAPTURE`` names a model. Keys and addresses are never stored.
"""
