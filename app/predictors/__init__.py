"""From what a caller sent to what a network reads, and back: one predictor per stem.

``parse`` turns a caller's input into an item and refuses what cannot be used; ``predict`` (or, for text, ``step``)
turns many items into answers and runs on the compute thread. ``PREDICTORS`` says which one serves which task.
"""

from __future__ import annotations

from app.predictors.cnn import ImageClassifier
from app.predictors.gan import ImageSampler
from app.predictors.lstm import SeriesForecaster
from app.predictors.rnn import TextContinuer
from app.store import Task

Predictor = ImageClassifier | TextContinuer | SeriesForecaster | ImageSampler

PREDICTORS: dict[Task, type[Predictor]] = {
    "classify": ImageClassifier,
    "continue": TextContinuer,
    "forecast": SeriesForecaster,
    "sample": ImageSampler,
}
