"""The neural networks, which are PyTorch modules. This package imports no other part of the service.

``KINDS`` maps the ``kind`` on a model card (``card.json``) to the class of the network, the dataclass of its sizes, and
its task. Each new architecture needs one more line in this table. Four networks come from the workshop, which is the
lecture from which this project started.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from app.networks.cnn import DigitNet, DigitNetSizes, LeNet, LeNetSizes, WhitenedNet, WhitenedNetSizes
from app.networks.efficientnet import EfficientNetLite, EfficientNetSizes
from app.networks.forecaster import Forecaster
from app.networks.gan import ConditionalGenerator, ConditionalSizes, Generator, GeneratorSizes
from app.networks.gated_rnn import GatedRNN, GatedRNNSizes
from app.networks.imported import ImportedSizes
from app.networks.imported.onnx_runner import OnnxRunner
from app.networks.lstm import SeriesLSTM, SeriesLSTMSizes
from app.networks.rnn import CharacterRNN, CharacterRNNSizes
from app.networks.series_reader import ForecasterSizes


class Kind(NamedTuple):
    """One network architecture. The fields of the dataclass ``sizes`` are the keys of ``sizes`` on its model cards.

    ``task`` is None for imported networks (ONNX models), because they classify images or only take tensors. An imported
    network is built from the tensors that are stored with its version, not from its sizes.
    """

    network: type[Any]
    sizes: type[Any]
    task: str | None


KINDS: dict[str, Kind] = {
    "lenet": Kind(LeNet, LeNetSizes, "classify"),
    "digit-net": Kind(DigitNet, DigitNetSizes, "classify"),
    "whitened-net": Kind(WhitenedNet, WhitenedNetSizes, "classify"),
    "efficientnet-lite": Kind(EfficientNetLite, EfficientNetSizes, "classify"),
    "character-rnn": Kind(CharacterRNN, CharacterRNNSizes, "continue"),
    "gated-rnn": Kind(GatedRNN, GatedRNNSizes, "continue"),
    "series-lstm": Kind(SeriesLSTM, SeriesLSTMSizes, "forecast"),
    "forecaster": Kind(Forecaster, ForecasterSizes, "forecast"),
    "gan-generator": Kind(Generator, GeneratorSizes, "sample"),
    "conditional-generator": Kind(ConditionalGenerator, ConditionalSizes, "sample"),
    "onnx": Kind(OnnxRunner, ImportedSizes, None),
}


def build(kind: str, sizes: dict[str, Any]) -> Any:
    """Return a network with new weights. Raises KeyError for an unknown kind, and TypeError for unknown sizes."""
    network, dataclass, _ = KINDS[kind]
    return network(dataclass(**sizes))


def is_imported(kind: str) -> bool:
    """Return whether ``kind`` means an imported network, which was trained outside this project."""
    return kind in KINDS and KINDS[kind].task is None
