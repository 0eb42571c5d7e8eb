"""Hyperparameters of the text networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from training.configs.markers import SWITCH


@dataclass(frozen=True)
class RnnConfig:
    """Hyperparameters of text networks, trained with AdamW and truncated backpropagation through time."""

    kind: str
    hidden: Annotated[int, "hidden units per layer"]
    layers: Annotated[int, "recurrent layers"]
    epochs: Annotated[int, "passes over the text"]
    batch: Annotated[int, "number of streams: parts of the text that are read in parallel, each with its own state"]
    bptt: Annotated[int, "characters that each stream reads per step; gradients flow back through all of them"]
    learning_rate: Annotated[float, "peak learning rate"]
    weight_decay: Annotated[float, "weight decay of the optimizer"]
    clip: Annotated[float, "largest norm of the gradient"]
    ema_decay: Annotated[float, "decay of the moving average of the weights, per step"]
    dropout: Annotated[float, "dropout probability"]
    reset_state: Annotated[float, "share of streams whose state is set to zero at each step, as at the start of a text"]
    unknown_share: Annotated[float, "share of characters replaced by <unk>, so that the network learns to read <unk>"]
    validation: Annotated[float, "share of the training text held out for validation"]
    bfloat16: Annotated[int, "compute in bfloat16 where that is faster", SWITCH]  # not for character-rnn
    renamed_share: Annotated[float, "share of a play's speakers that get a new invented name in each epoch"] = 0.0
    distillation_weight: Annotated[
        float, "weight of the loss for the predictions of the teachers; the loss for the actual characters has the rest"
    ] = 0.7
    validation_parts: Annotated[
        int, "number of held-out parts, spread evenly over the text; 1: one part in the middle"
    ] = 10


RNN_WORKSHOP = RnnConfig(
    kind="character-rnn",
    hidden=128,
    layers=1,
    epochs=40,
    batch=64,
    bptt=64,
    learning_rate=4e-3,
    weight_decay=1e-4,
    clip=1.0,
    ema_decay=0.999,
    dropout=0.05,
    reset_state=0.05,
    unknown_share=0.002,
    validation=0.0,
    bfloat16=0,
)
RNN_GATED = RnnConfig(
    kind="gated-rnn",
    hidden=272,
    layers=3,
    epochs=18,
    batch=32,
    bptt=256,
    learning_rate=2e-3,
    weight_decay=0.1,
    clip=1.0,
    ema_decay=0.99,
    dropout=0.3,
    reset_state=0.3,
    unknown_share=0.002,
    validation=0.02,
    bfloat16=1,
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
RNN_PRESETS = {"workshop": RNN_WORKSHOP, "gated": RNN_GATED, "own": RNN_OWN}
