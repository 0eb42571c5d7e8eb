"""The networks: plain modules that take raw units and give raw units. They import torch and nothing of ours.

``KINDS`` is the one table from the kind written on a card to the module, the dataclass of its sizes, and its task.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from app.networks.cnn import DigitNet, DigitNetSizes, LeNet, LeNetSizes, WhitenedNet, WhitenedNetSizes
from app.networks.forecaster import Forecaster, ForecasterSizes
from app.networks.gan import ConditionalGenerator, ConditionalSizes, Generator, GeneratorSizes
from app.networks.lstm import SeriesLSTM, SeriesLSTMSizes
from app.networks.rnn import CharacterRNN, CharacterRNNSizes, StackedRNN, StackedRNNSizes

KINDS: dict[str, tuple[type[nn.Module], type[Any], str]] = {
    "lenet": (LeNet, LeNetSizes, "classify"),
    "digit-net": (DigitNet, DigitNetSizes, "classify"),
    "whitened-net": (WhitenedNet, WhitenedNetSizes, "classify"),
    "character-rnn": (CharacterRNN, CharacterRNNSizes, "continue"),
    "stacked-rnn": (StackedRNN, StackedRNNSizes, "continue"),
    "series-lstm": (SeriesLSTM, SeriesLSTMSizes, "forecast"),
    "forecaster": (Forecaster, ForecasterSizes, "forecast"),
    "gan-generator": (Generator, GeneratorSizes, "sample"),
    "conditional-generator": (ConditionalGenerator, ConditionalSizes, "sample"),
}


def build(kind: str, sizes: dict[str, Any]) -> nn.Module:
    """A network with fresh weights. Raises KeyError for an unknown kind, TypeError for sizes it does not have."""
    network, dataclass, _ = KINDS[kind]
    return network(dataclass(**sizes))
