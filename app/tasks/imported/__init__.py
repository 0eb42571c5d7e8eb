"""Predictors for imported networks: one for requests of tensors, and one for each task that they can serve."""

from app.tasks.imported.classification import ImportedClassifier
from app.tasks.imported.forecasting import ImportedForecaster
from app.tasks.imported.image_generation import ImportedSampler
from app.tasks.imported.tensors import TaskPredictor, TensorPredictor, TensorRows
from app.tasks.imported.text_generation import ImportedTextGenerator

__all__ = [
    "ImportedClassifier",
    "ImportedForecaster",
    "ImportedSampler",
    "ImportedTextGenerator",
    "TaskPredictor",
    "TensorPredictor",
    "TensorRows",
]
