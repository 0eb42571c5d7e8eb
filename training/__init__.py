"""Training scripts. Each script writes logs and checkpoints to a run folder, and publishes to ``models_store/``."""
