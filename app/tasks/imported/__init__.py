"""Predictors for imported networks: one for requests of tensors, and one for the classification of images."""

from app.tasks.imported.classification import ImportedClassifier
from app.tasks.imported.tensors import TensorPredictor, TensorRows

__all__ = ["ImportedClassifier", "TensorPredictor", "TensorRows"]
