"""The files from which a training run is resumed: its folder with the config and the log, and its checkpoints."""
