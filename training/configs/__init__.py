"""Hyperparameters of all training commands: one dataclass per recipe and one table of presets per command.

The first preset of a command is its default. Each number is also a command-line option. The text in the ``Annotated``
type of the number is the help text of the option. The preset "own" trains on the user's data.

Recipes with ``ema_decay`` publish an exponential moving average of the weights. Learning rates follow a cosine
schedule, except in the GANs and in the recipes of airbench95 and 96.
"""

from training.configs.classifiers import (
    CNN_ACCURATE,
    CNN_DIGITS,
    CNN_OWN,
    CNN_PRESETS,
    CNN_STRONG,
    CNN_WORKSHOP,
    SAMPLE_CLASSIFIER,
    AirbenchConfig,
    CnnConfig,
    CnnFinetuneConfig,
)
from training.configs.generators import (
    GAN_CONDITIONAL,
    GAN_OWN,
    GAN_PRESETS,
    GAN_WORKSHOP,
    ConditionalGanConfig,
    GanConfig,
)
from training.configs.markers import PHOTOGRAPHS, SWITCH
from training.configs.series import (
    LSTM_OWN,
    LSTM_PRESETS,
    LSTM_STRONG,
    LSTM_WORKSHOP,
    ForecasterConfig,
    ForecasterFinetuneConfig,
    LstmConfig,
)
from training.configs.text import RNN_GATED, RNN_OWN, RNN_PRESETS, RNN_WORKSHOP, RnnConfig

__all__ = [
    "CNN_ACCURATE",
    "CNN_DIGITS",
    "CNN_OWN",
    "CNN_PRESETS",
    "CNN_STRONG",
    "CNN_WORKSHOP",
    "GAN_CONDITIONAL",
    "GAN_OWN",
    "GAN_PRESETS",
    "GAN_WORKSHOP",
    "LSTM_OWN",
    "LSTM_PRESETS",
    "LSTM_STRONG",
    "LSTM_WORKSHOP",
    "PHOTOGRAPHS",
    "RNN_GATED",
    "RNN_OWN",
    "RNN_PRESETS",
    "RNN_WORKSHOP",
    "SAMPLE_CLASSIFIER",
    "SWITCH",
    "AirbenchConfig",
    "CnnConfig",
    "CnnFinetuneConfig",
    "ConditionalGanConfig",
    "ForecasterConfig",
    "ForecasterFinetuneConfig",
    "GanConfig",
    "LstmConfig",
    "RnnConfig",
]
