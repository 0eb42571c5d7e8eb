"""Training data: the public data sets, and users' own images, texts and tables."""
