"""From what a caller sent to what a network reads, and back: one predictor per stem.

``parse`` turns a caller's input into an item and refuses what cannot be used; ``predict`` (or, for text, ``step``)
turns many items into answers and runs on the compute thread. ``PREDICTORS`` says which one serves which task.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from app.networks import KINDS
from app.networks.forecaster import Forecaster
from app.store import Task, Version
from app.tasks.classification import ImageClassifier
from app.tasks.forecasting import GlobalForecaster
from app.tasks.image_generation import ImageSampler
from app.tasks.text_generation import TextGenerator
from app.tasks.window_forecasting import WindowForecaster

AnyForecaster = WindowForecaster | GlobalForecaster
Predictor = ImageClassifier | TextGenerator | AnyForecaster | ImageSampler


def forecaster_of(version: Version, device: torch.device) -> AnyForecaster:
    """The predictor of a series network: one for any series, or the workshop's for its own."""
    network = KINDS.get(version.card.kind, (None,))[0]
    return (GlobalForecaster if network is Forecaster else WindowForecaster)(version, device)


PREDICTORS: dict[Task, Callable[[Version, torch.device], Predictor]] = {
    "classify": ImageClassifier,
    "continue": TextGenerator,
    "forecast": forecaster_of,
    "sample": ImageSampler,
}
