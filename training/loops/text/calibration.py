"""Temperature scaling of a text network (Guo et al. 2017, arXiv 1706.04599).

A network that was trained for many epochs on a short text is too sure of its predictions. Its logits are divided by the
temperature that gives the lowest loss on a held-out text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.evaluation.calibration import divide_logits, fit_temperature
from training.evaluation.language_model import window_logits, windows

MAX_LOGITS = 2**24  # largest number of logits that are used, so that they take at most 128 MiB in float64


def calibrate(network: Any, parts: Sequence[Tensor], window: int) -> float:
    """Divide the logits of a network by the temperature with the lowest loss on held-out text. Return the temperature.

    Each part has character indices [N]. ``window`` is the length of an evaluation window in characters.
    """
    held_out = windows(parts, window)
    step = -(-len(held_out) * window * network.sizes.vocabulary // MAX_LOGITS)
    held_out = held_out[::step]
    logits = torch.cat([logits.flatten(0, 1) for logits, _ in window_logits(network, held_out)])
    temperature = fit_temperature(logits, held_out[:, 1:].flatten())
    divide_logits(network, temperature)
    return temperature
