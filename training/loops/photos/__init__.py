"""Classifiers for own photographs: a pretrained network with a new last layer."""
