"""Predictors for imported networks: one for requests of tensors, and one for the classification of images."""
