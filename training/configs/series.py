"""Hyperparameters of the forecasters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from training.configs.numbers import Amount, BelowOne, Count, Described, Share, Whole


class LstmConfig(Described):
    """Hyperparameters of a network for a single series that is trained with AdamW."""

    hidden: Count = 64
    """hidden units per layer"""
    window: Annotated[int, Field(ge=1, le=300)] = 50
    """values that the network reads before the first forecast"""
    horizon: Annotated[int, Field(ge=2, le=300)] = 50
    """forecast steps"""
    steps: Count = 6000
    """training steps"""
    batch: Count = 32
    """windows per step"""
    learning_rate: Amount = 3e-3
    """peak learning rate"""
    weight_decay: Amount = 1e-2
    """weight decay of the optimizer"""
    input_noise: Amount = 0.3
    """standard deviation of the noise that is added to the input"""
    clip: Amount = 1.0
    """largest norm of the gradient"""
    ema_decay: BelowOne = 0.995
    """decay of the moving average of the weights, per step"""
    validation: Annotated[int, Field(ge=50, le=285)] = 160
    """values held out for validation"""


class ForecasterConfig(Described):
    """Hyperparameters of a forecaster for any series: an ensemble that is trained on M4 and on synthetic series."""

    hidden: Count = 128
    """hidden units per layer"""
    layers: Count = 1
    """recurrent layers"""
    members: Count = 3
    """number of networks in the ensemble"""
    smoothings: Whole = 6
    """number of exponential smoothing forecasts that the network combines; 0: none"""
    steps: Count = 8000
    """training steps"""
    batch: Count = 256  # of each member
    """windows per step"""
    learning_rate: Amount = 4e-3
    """peak learning rate"""
    weight_decay: Amount = 0.01
    """weight decay of the optimizer"""
    dropout: BelowOne = 0.1
    """dropout probability, after the encoder"""
    mixup: Share = 0.3
    """share of windows that are mixed with another window"""
    hourly_share: Share = 0.28
    """share of windows from M4's hourly series. The share of the weekly series is 1 minus all shares"""
    summed_share: Share = 0.2
    """share of windows with values of M4 series that are summed to longer steps"""
    structural_share: Share = 0.25
    """share of windows from simulated exponential smoothing models"""
    structural_series: Whole = 3000
    """number of simulated series for each season length"""
    synthetic_share: Share = 0.1
    """share of windows from random sums of trends, seasons, waves and noise"""
    synthetic_series: Whole = 400
    """number of random sums for each season length"""
    clip: Amount = 1.0  # of each member
    """largest norm of the gradient"""
    ema_decay: BelowOne = 0.999
    """decay of the moving average of the weights, per step"""
    held_out_share: Share = 0.75
    """share of the steps, at the start, that do not use the last horizon of each series"""


class ForecasterFinetuneConfig(Described):
    """Hyperparameters for fine-tuning a published forecaster on users' series."""

    horizon: Whole = 0
    """forecast steps; 0: one season or, without a season, 12 steps"""
    epochs: Count = 30
    """passes over the series"""
    batch: Count = 64  # of each member
    """windows per step"""
    learning_rate: Amount = 5e-4
    """peak learning rate"""
    weight_decay: Amount = 0.01
    """weight decay of the optimizer"""
    dropout: BelowOne = 0.1
    """dropout probability, after the encoder"""
    mixup: Share = 0.3
    """share of windows that are mixed with another window"""
    clip: Amount = 1.0  # of all members
    """largest norm of the gradient"""
    ema_decay: BelowOne = 0.98
    """decay of the moving average of the weights, per step"""


LSTM_PRESETS: dict[str, LstmConfig | ForecasterConfig | ForecasterFinetuneConfig] = {
    "workshop": LstmConfig(),
    "strong": ForecasterConfig(),
    "own": ForecasterFinetuneConfig(),
}
