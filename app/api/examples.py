"""The example of each body in the documentation: it succeeds as it stands."""

from __future__ import annotations

import base64
import math
import random
from pathlib import Path

# A test image of CIFAR-10: a horse, 32 x 32 pixels.
IMAGES = {"images": [base64.b64encode(Path(__file__).with_name("example.jpg").read_bytes()).decode()]}

PROMPT = {"prompt": "ROMEO:", "max_characters": 200, "temperature": 0.8, "seed": 1}

# Eighty values of the workshop's series: a sine over [0, 20] at 1,000 points, and Gaussian noise of 0.2.
_noise = random.Random(0)
_values = [round(math.sin(20 / 999 * i) + _noise.gauss(0, 0.2), 3) for i in range(200, 280)]
HISTORY = {"values": _values, "horizon": 12, "levels": [80, 95]}

TENSORS = {
    "parameters": {"horizon": 3, "levels": "80,95"},
    "inputs": [{"name": "values", "datatype": "FP64", "shape": [1, 80], "data": _values}],
    "outputs": [{"name": "mean"}],
}

GENERATE = {"text_input": "ROMEO:", "parameters": {"max_characters": 200, "temperature": 0.8, "seed": 1}}

DRAW = {"count": 4, "seed": 1}

COMPLETION = {"model": "shakespeare-rnn", "prompt": "ROMEO:", "max_tokens": 100, "temperature": 0.8, "seed": 1}

GENERATION = {"prompt": "digits", "n": 4, "response_format": "b64_json", "seed": 1}

SERIES = {
    "model": "sine-lstm",
    "inputs": [{"type": "univariate_time_series", "name": "sine", "series": _values, "frequency": "hour"}],
    "options": {"horizon": 12, "quantiles": [0.1, 0.5, 0.9]},
}
