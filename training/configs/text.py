"""Hyperparameters of the text networks."""

from __future__ import annotations

from training.configs.numbers import Amount, BelowOne, Count, Described, Share, Whole


class RnnConfig(Described):
    """Hyperparameters of text networks, trained with AdamW and truncated backpropagation through time."""

    kind: str = "character-rnn"
    hidden: Count = 128
    """hidden units per layer"""
    layers: Count = 1
    """recurrent layers"""
    epochs: Whole = 40
    """passes over the text"""
    batch: Count = 64
    """parts of the text that are read in parallel, each with its own state"""
    bptt: Count = 64
    """characters that are read per step; gradients flow back through all of them"""
    learning_rate: Amount = 4e-3
    """peak learning rate"""
    weight_decay: Amount = 1e-4
    """weight decay of the optimizer"""
    clip: Amount = 1.0
    """largest norm of the gradient"""
    ema_decay: BelowOne = 0.999
    """decay of the moving average of the weights, per step"""
    dropout: BelowOne = 0.05
    """dropout probability"""
    reset_state: Share = 0.05
    """share of the parts whose state is set to zero at each step"""
    unknown_share: Share = 0.002
    """share of characters that are replaced by <unk>"""
    validation: BelowOne = 0.0
    """share of the training text held out for validation"""
    renamed_share: Share = 0.0
    """share of a play's speakers that get a new invented name in each epoch"""
    distillation_weight: Share = 0.7
    """weight of the loss for the predictions of the teachers; the loss for the actual characters has the rest"""
    validation_parts: Count = 10
    """number of held-out parts, spread evenly over the text; 1: one part in the middle"""


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
RNN_OWN = RNN_GATED.model_copy(
    update={
        "hidden": 160,
        "layers": 2,
        "epochs": 20,
        "bptt": 64,
        "learning_rate": 6e-3,
        "dropout": 0.1,
        "validation": 0.05,
        "renamed_share": 0.0,
    }
)
RNN_PRESETS = {"workshop": RnnConfig(), "gated": RNN_GATED, "own": RNN_OWN}
