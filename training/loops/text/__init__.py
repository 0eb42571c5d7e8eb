"""Training of networks that continue texts."""
