"""Hyperparameters of the forecasters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from training.configs.numbers import Amount, BelowOne, Count, Share, Whole


@dataclass(frozen=True)
class LstmConfig:
    """Hyperparameters of a network for a single series that is trained with AdamW."""

    hidden: Annotated[Count, "hidden units per layer"] = 64
    window: Annotated[int, Field(ge=1, le=300), "values that the network reads before the first forecast"] = 50
    horizon: Annotated[int, Field(ge=2, le=300), "forecast steps"] = 50
    steps: Annotated[Count, "training steps"] = 6000
    batch: Annotated[Count, "windows per step"] = 32
    learning_rate: Annotated[Amount, "peak learning rate"] = 3e-3
    weight_decay: Annotated[Amount, "weight decay of the optimizer"] = 1e-2
    input_noise: Annotated[Amount, "standard deviation of the noise that is added to the input"] = 0.3
    clip: Annotated[Amount, "largest norm of the gradient"] = 1.0
    ema_decay: Annotated[BelowOne, "decay of the moving average of the weights, per step"] = 0.995
    validation: Annotated[int, Field(ge=50, le=285), "values held out for validation"] = 160


@dataclass(frozen=True)
class ForecasterConfig:
    """Hyperparameters of a forecaster for any series: an ensemble that is trained on M4 and on synthetic series."""

    hidden: Annotated[Count, "hidden units per layer"] = 128
    layers: Annotated[Count, "recurrent layers"] = 1
    members: Annotated[Count, "number of networks in the ensemble"] = 3
    smoothings: Annotated[Whole, "number of exponential smoothing forecasts that the network combines; 0: none"] = 6
    steps: Annotated[Count, "training steps"] = 8000
    batch: Annotated[Count, "windows per step"] = 256  # of each member
    learning_rate: Annotated[Amount, "peak learning rate"] = 4e-3
    weight_decay: Annotated[Amount, "weight decay of the optimizer"] = 0.01
    dropout: Annotated[BelowOne, "dropout probability, after the encoder"] = 0.1
    mixup: Annotated[Share, "share of windows that are mixed with another window"] = 0.3
    hourly_share: Annotated[
        Share, "share of windows from M4's hourly series. The share of the weekly series is 1 minus all shares"
    ] = 0.28
    summed_share: Annotated[Share, "share of windows with values of M4 series that are summed to longer steps"] = 0.2
    structural_share: Annotated[Share, "share of windows from simulated exponential smoothing models"] = 0.25
    structural_series: Annotated[Whole, "number of simulated series for each season length"] = 3000
    synthetic_share: Annotated[Share, "share of windows from random sums of trends, seasons, waves and noise"] = 0.1
    synthetic_series: Annotated[Whole, "number of random sums for each season length"] = 400
    clip: Annotated[Amount, "largest norm of the gradient"] = 1.0  # of each member
    ema_decay: Annotated[BelowOne, "decay of the moving average of the weights, per step"] = 0.999
    held_out_share: Annotated[
        Share, "share of the steps, at the start, that do not use the last horizon of each series"
    ] = 0.75


@dataclass(frozen=True)
class ForecasterFinetuneConfig:
    """Hyperparameters for fine-tuning a published forecaster on users' series."""

    horizon: Annotated[Whole, "forecast steps; 0: one season or, without a season, 12 steps"] = 0
    epochs: Annotated[Count, "passes over the series"] = 30
    batch: Annotated[Count, "windows per step"] = 64  # of each member
    learning_rate: Annotated[Amount, "peak learning rate"] = 5e-4
    weight_decay: Annotated[Amount, "weight decay of the optimizer"] = 0.01
    dropout: Annotated[BelowOne, "dropout probability, after the encoder"] = 0.1
    mixup: Annotated[Share, "share of windows that are mixed with another window"] = 0.3
    clip: Annotated[Amount, "largest norm of the gradient"] = 1.0  # of all members
    ema_decay: Annotated[BelowOne, "decay of the moving average of the weights, per step"] = 0.98


LSTM_PRESETS: dict[str, LstmConfig | ForecasterConfig | ForecasterFinetuneConfig] = {
    "workshop": LstmConfig(),
    "strong": ForecasterConfig(),
    "own": ForecasterFinetuneConfig(),
}
