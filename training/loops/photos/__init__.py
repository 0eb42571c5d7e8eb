"""Classifiers for photographs of users: a pretrained network with a new last layer."""
