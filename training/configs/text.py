"""Hyperparameters of the text networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from training.configs.numbers import Amount, BelowOne, Count, Share, Whole


@dataclass(frozen=True)
class RnnConfig:
    """Hyperparameters of text networks, trained with AdamW and truncated backpropagation through time."""

    kind: str = "character-rnn"
    hidden: Annotated[Count, "hidden units per layer"] = 128
    layers: Annotated[Count, "recurrent layers"] = 1
    epochs: Annotated[Whole, "passes over the text"] = 40
    batch: Annotated[Count, "parts of the text that are read in parallel, each with its own state"] = 64
    bptt: Annotated[Count, "characters that are read per step; gradients flow back through all of them"] = 64
    learning_rate: Annotated[Amount, "peak learning rate"] = 4e-3
    weight_decay: Annotated[Amount, "weight decay of the optimizer"] = 1e-4
    clip: Annotated[Amount, "largest norm of the gradient"] = 1.0
    ema_decay: Annotated[BelowOne, "decay of the moving average of the weights, per step"] = 0.999
    dropout: Annotated[BelowOne, "dropout probability"] = 0.05
    reset_state: Annotated[Share, "share of the parts whose state is set to zero at each step"] = 0.05
    unknown_share: Annotated[Share, "share of characters that are replaced by <unk>"] = 0.002
    validation: Annotated[BelowOne, "share of the training text held out for validation"] = 0.0
    renamed_share: Annotated[Share, "share of a play's speakers that get a new invented name in each epoch"] = 0.0
    distillation_weight: Annotated[
        Share, "weight of the loss for the predictions of the teachers; the loss for the actual characters has the rest"
    ] = 0.7
    validation_parts: Annotated[
        Count, "number of held-out parts, spread evenly over the text; 1: one part in the middle"
    ] = 10


RNN_GATED = RnnConfig(
    kind="gated-rnn",
    hidden=272,
    layers=3,
    epochs=18,
    batch=32,
    bptt=256,
    learning_rate=2e-3,
    weight_decay=0.1,
    ema_decay=0.99,
    dropout=0.3,
    reset_state=0.3,
    validation=0.02,
    renamed_share=0.6,
)
RNN_OWN = replace(
    RNN_GATED,
    hidden=160,
    layers=2,
    epochs=20,
    bptt=64,
    learning_rate=6e-3,
    dropout=0.1,
    validation=0.05,
    renamed_share=0.0,
)
RNN_PRESETS = {"workshop": RnnConfig(), "gated": RNN_GATED, "own": RNN_OWN}
