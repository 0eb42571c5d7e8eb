"""The tuned constants of trainings that tests change, in one place.

``QUARTET_TRAINING_LIMITS``, a JSON object, replaces values. Results that are published need the values below.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Constants of trainings and evaluations."""

    check_digests: bool = True  # whether the public data sets must have the expected SHA-256
    checkpoint_seconds: float = 20  # time between two checkpoints
    signal: int = 0  # number of a signal that the process sends to itself after ``signal_steps`` steps; 0: none
    signal_steps: int = 0
    image_bytes: int = 2**30  # photographs with more decoded pixels in all are decoded whenever they are used
    feature_bytes: int = 2**32  # size of the folder of cached features, except for those of the current training
    drift_window: int = 100  # requests that are compared with the validation data, which has at least as many examples
    speed_seconds: float = 0.5  # the measurement of the speed of a network takes at least this long
    generated_samples: int = 10_000  # generated images, and real images that they are compared with
    classifier_samples: int = 60_000  # generated images on which a classifier is trained
    unseen_images: int = 5000  # MNIST's training images that the reference classifier has not seen
    label_classifier_steps: int = 800  # of the classifier for the user's own images, with small batches
    min_tuned_images: int = 1000  # with fewer training photographs, only the last layer is fitted
    min_calibration_images: int = 200  # with fewer validation photographs, only the last layer is fitted


def limits() -> Limits:
    """Return the constants, with the changes in ``QUARTET_TRAINING_LIMITS``."""
    return Limits(**json.loads(os.environ.get("QUARTET_TRAINING_LIMITS") or "{}"))
