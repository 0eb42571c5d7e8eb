"""Hyperparameters of the forecasters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from training.configs.markers import SWITCH


@dataclass(frozen=True)
class LstmConfig:
    """Hyperparameters of a network for a single series that is trained with AdamW."""

    hidden: Annotated[int, "hidden units per layer"]
    window: Annotated[int, "number of values that the network reads before the first forecast"]
    horizon: Annotated[int, "forecast steps. Preset own: 0 means one season or, without a season, 12 steps"]
    steps: Annotated[int, "training steps"]
    batch: Annotated[int, "windows per step"]
    learning_rate: Annotated[float, "peak learning rate"]
    weight_decay: Annotated[float, "weight decay of the optimizer"]
    input_noise: Annotated[float, "standard deviation of the noise that is added to the input to reduce overfitting"]
    clip: Annotated[float, "largest norm of the gradient"]
    ema_decay: Annotated[float, "decay of the moving average of the weights, per step"]
    validation: Annotated[int, "number of values held out for validation, at the end of the training part"]


@dataclass(frozen=True)
class ForecasterConfig:
    """Hyperparameters of a forecaster for any series: an ensemble that is trained on M4 and on synthetic series."""

    hidden: Annotated[int, "hidden units per layer"]
    layers: Annotated[int, "recurrent layers"]
    members: Annotated[int, "number of networks in the ensemble"]
    smoothings: Annotated[int, "number of exponential smoothing forecasts that the network combines; 0: none"]
    steps: Annotated[int, "training steps"]
    batch: Annotated[int, "windows per step"]  # of each member
    learning_rate: Annotated[float, "peak learning rate"]
    weight_decay: Annotated[float, "weight decay of the optimizer"]
    dropout: Annotated[float, "dropout probability, after the encoder"]
    mixup: Annotated[float, "share of windows that are mixed with another window"]
    hourly_share: Annotated[
        float, "share of windows from M4's hourly series. The share of the weekly series is 1 minus all shares"
    ]
    summed_share: Annotated[float, "share of windows with values of M4 series that are summed to longer steps"]
    structural_share: Annotated[float, "share of windows from simulated exponential smoothing models"]
    structural_series: Annotated[int, "number of simulated series for each season length"]
    synthetic_share: Annotated[float, "share of windows from random sums of trends, seasons, waves and noise"]
    synthetic_series: Annotated[int, "number of random sums for each season length"]
    clip: Annotated[float, "largest norm of the gradient"]  # of each member
    ema_decay: Annotated[float, "decay of the moving average of the weights, per step"]
    held_out_share: Annotated[
        float, "share of the steps, at the start, that do not use the last horizon of each series"
    ]


@dataclass(frozen=True)
class ForecasterFinetuneConfig:
    """Hyperparameters for fine-tuning a published forecaster on users' series."""

    horizon: Annotated[int, "forecast steps in training and testing; 0: one season or, without a season, 12 steps"]
    epochs: Annotated[int, "passes over the series"]
    batch: Annotated[int, "windows per step"]  # of each member
    learning_rate: Annotated[float, "peak learning rate"]
    weight_decay: Annotated[float, "weight decay of the optimizer"]
    dropout: Annotated[float, "dropout probability, after the encoder"]
    mixup: Annotated[float, "share of windows that are mixed with another window"]
    clip: Annotated[float, "largest norm of the gradient"]  # of all members
    ema_decay: Annotated[float, "decay of the moving average of the weights, per step"]
    bfloat16: Annotated[int, "compute in bfloat16 where that is faster", SWITCH]


LSTM_WORKSHOP = LstmConfig(
    hidden=64,
    window=50,
    horizon=50,
    steps=6000,
    batch=32,
    learning_rate=3e-3,
    weight_decay=1e-2,
    input_noise=0.3,
    clip=1.0,
    ema_decay=0.995,
    validation=160,
)
LSTM_STRONG = ForecasterConfig(
    hidden=128,
    layers=1,
    members=3,
    smoothings=6,
    steps=8000,
    batch=256,
    learning_rate=4e-3,
    weight_decay=0.01,
    dropout=0.1,
    mixup=0.3,
    hourly_share=0.28,
    summed_share=0.2,
    structural_share=0.25,
    structural_series=3000,
    synthetic_share=0.1,
    synthetic_series=400,
    clip=1.0,
    ema_decay=0.999,
    held_out_share=0.75,
)
LSTM_OWN = ForecasterFinetuneConfig(
    horizon=0,
    epochs=30,
    batch=64,
    learning_rate=5e-4,
    weight_decay=0.01,
    dropout=0.1,
    mixup=0.3,
    clip=1.0,
    ema_decay=0.98,
    bfloat16=1,
)
LSTM_PRESETS: dict[str, LstmConfig | ForecasterConfig | ForecasterFinetuneConfig] = {
    "workshop": LSTM_WORKSHOP,
    "strong": LSTM_STRONG,
    "own": LSTM_OWN,
}
