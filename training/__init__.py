"""Offline training: each script writes a run folder and publishes a version to ``models_store/``."""
