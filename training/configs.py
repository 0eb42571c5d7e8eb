"""Hyperparameters of all training commands: one dataclass per recipe and one table of presets per command.

The first preset of a command is its default. Each number is also a command-line option. The text in the ``Annotated``
type of the number is the help text of the option. The preset "own" trains on the user's data.

Recipes with ``ema_decay`` publish an exponential moving average of the weights. Learning rates follow a cosine
schedule, except in the GANs and in the recipe of airbench95.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

SWITCH = "yes or no"  # marks numbers that are 1 or 0; their options take yes or no
PHOTOGRAPHS = "hyperparameters for photographs"  # marks numbers whose options the help lists under this title


@dataclass(frozen=True)
class CnnConfig:
    """Hyperparameters of small image classifiers that are trained with AdamW."""

    data: str
    kind: str
    epochs: Annotated[int, "passes over the training images"]
    batch: Annotated[int, "images per step"]
    learning_rate: Annotated[float, "peak learning rate. Preset strong: per 1,024 images; own: of the last layer"]
    weight_decay: Annotated[float, "weight decay of the optimizer"]
    label_smoothing: Annotated[float, "label smoothing of the loss"]
    ema_decay: Annotated[float, "decay of the moving average of the weights, per step"]
    shift: Annotated[int, "largest random shift in pixels, in each direction"]
    flip: Annotated[int, "mirror images at random", SWITCH]
    rotate: Annotated[float, "largest random rotation in degrees, in each direction"]
    validation: Annotated[int, "training images held out for validation"]


@dataclass(frozen=True)
class AirbenchConfig:
    """Hyperparameters of airbench95: SGD with Nesterov momentum and look-ahead, and a whitening first layer."""

    data: str
    kind: str
    first_width: Annotated[int, "channels of the first group of convolutions"]
    later_width: Annotated[int, "channels of the second and third group of convolutions"]
    epochs: Annotated[int, "passes over the training images"]
    batch: Annotated[int, "images per step"]
    learning_rate: Annotated[float, "peak learning rate"]  # per 1,024 images
    weight_decay: Annotated[float, "weight decay of the optimizer"]  # per 1,024 images
    label_smoothing: Annotated[float, "label smoothing of the loss"]
    whiten_epochs: Annotated[int, "number of epochs after which the bias of the first layer is no longer trained"]
    shift: Annotated[int, "largest random shift in pixels, in each direction"]
    validation: Annotated[int, "training images held out for validation"]  # the temperatures are fitted on them too


@dataclass(frozen=True)
class CnnFinetuneConfig:
    """Hyperparameters for users' images: a fine-tuned network (``--from NAME``) or a new one (``--from scratch``)."""

    first_width: Annotated[int, "channels of the first group of convolutions"]  # from scratch
    later_width: Annotated[int, "channels of the second and third group of convolutions"]  # from scratch
    epochs: Annotated[int, "passes over the training images"]
    batch: Annotated[int, "images per step"]
    learning_rate: Annotated[float, "peak learning rate"]  # of the last layer only
    pretrained_learning_rate: Annotated[float, "peak learning rate of the pretrained layers"]
    scratch_learning_rate: Annotated[float, "with --from scratch: peak learning rate of all layers but the last"]
    head_only_share: Annotated[float, "share of the steps at the start in which only the last layer is trained"]
    weight_decay: Annotated[float, "weight decay of the optimizer"]
    label_smoothing: Annotated[float, "label smoothing of the loss"]
    shift: Annotated[int, "largest random shift in pixels, in each direction"]
    flip: Annotated[int, "mirror images at random", SWITCH]
    bfloat16: Annotated[int, "compute in bfloat16 where that is faster", SWITCH]
    tail_epochs: Annotated[int, "epochs of fine-tuning the last blocks; 0: train only the last layer", PHOTOGRAPHS]
    tail_batch: Annotated[int, "images per fine-tuning step", PHOTOGRAPHS]
    tail_learning_rate: Annotated[float, "peak learning rate of fine-tuning", PHOTOGRAPHS]


@dataclass(frozen=True)
class GanConfig:
    """Hyperparameters of a GAN whose generator and discriminator are trained with Adam."""

    latent: Annotated[int, "size of the latent vector"]
    epochs: Annotated[int, "passes over the training images"]
    batch: Annotated[int, "images per step"]
    learning_rate: Annotated[float, "peak learning rate"]
    beta1: Annotated[float, "beta1 of Adam"]
    ema_decay: Annotated[float, "decay of the moving average of the generator's weights, per step"]
    r1_penalty: Annotated[float, "weight of the R1 gradient penalty"]  # Mescheder et al. 2018
    r1_interval: Annotated[int, "steps between two gradient penalties"]
    bfloat16: Annotated[int, "compute convolutions in bfloat16 where the processor supports it", SWITCH]


@dataclass(frozen=True)
class ConditionalGanConfig(GanConfig):
    """Hyperparameters of a GAN with labels, whose discriminator also classifies images."""

    real_class_loss_weight: Annotated[float, "weight of the discriminator's loss on the classes of real images"]
    # This weight is small, so that the generator does not draw only the clearest images.
    class_loss_weight: Annotated[float, "weight of the generator's loss on the classes of its images"]


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
    dropout: Annotated[float, "dropout probability"]  # see training/loops/text/elman_recurrence.py
    reset_state: Annotated[float, "share of streams whose state is set to zero at each step, as at the start of a text"]
    unknown: Annotated[float, "share of characters replaced by <unk>, so that the network learns to read <unk>"]
    validation: Annotated[float, "share of the training text held out for validation"]
    bfloat16: Annotated[int, "compute in bfloat16 where that is faster", SWITCH]  # not for character-rnn
    rename: Annotated[float, "share of a play's speakers that get a new invented name in each epoch"] = 0.0
    distill: Annotated[float, "weight of the teachers' predictions in the loss; actual characters have the rest"] = 0.7
    places: Annotated[int, "number of held-out parts, spread evenly over the text; 1: one part in the middle"] = 10


@dataclass(frozen=True)
class LstmConfig:
    """Hyperparameters of a network for a single series that is trained with AdamW."""

    hidden: Annotated[int, "hidden units per layer"]
    window: Annotated[int, "number of values that the network reads before the first forecast"]
    horizon: Annotated[int, "forecast steps. Preset own: 0 means one season or, without a season, 12 steps"]
    updates: Annotated[int, "training steps"]
    batch: Annotated[int, "windows per step"]
    learning_rate: Annotated[float, "peak learning rate"]
    weight_decay: Annotated[float, "weight decay of the optimizer"]
    jitter: Annotated[float, "standard deviation of the noise that is added to the input to reduce overfitting"]
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
    updates: Annotated[int, "training steps"]
    batch: Annotated[int, "windows per step"]  # of each member
    learning_rate: Annotated[float, "peak learning rate"]
    weight_decay: Annotated[float, "weight decay of the optimizer"]
    dropout: Annotated[float, "dropout probability, after the encoder"]
    mixup: Annotated[float, "share of windows that are mixed with another window"]
    hourly_share: Annotated[float, "share of windows from M4's hourly series; its weekly series get the rest"]
    summed_share: Annotated[float, "share of windows with values of M4 series that are summed to longer steps"]
    structural_share: Annotated[float, "share of windows from simulated exponential smoothing models"]
    structural: Annotated[int, "number of simulated series for each season length"]
    synthetic_share: Annotated[float, "share of windows from random sums of trends, seasons, waves and noise"]
    series: Annotated[int, "number of these random sums for each season length"]
    clip: Annotated[float, "largest norm of the gradient"]  # of each member
    ema_decay: Annotated[float, "decay of the moving average of the weights, per step"]
    held_out: Annotated[float, "share of updates, at the start, that leave out the last horizon of each series"]


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


CNN_WORKSHOP = CnnConfig(
    data="cifar10",
    kind="lenet",
    epochs=150,
    batch=512,
    learning_rate=4e-3,
    weight_decay=5e-4,
    label_smoothing=0.0,
    ema_decay=0.995,
    shift=2,
    flip=1,
    rotate=0.0,
    validation=5000,
)
CNN_DIGITS = CnnConfig(
    data="mnist",
    kind="digit-net",
    epochs=8,
    batch=128,
    learning_rate=2e-3,
    weight_decay=1e-3,
    label_smoothing=0.0,
    ema_decay=0.998,
    shift=2,
    flip=0,
    rotate=10.0,
    validation=5000,
)
CNN_STRONG = AirbenchConfig(
    data="cifar10",
    kind="whitened-net",
    first_width=96,
    later_width=320,
    epochs=22,
    batch=1000,
    learning_rate=10.0,
    weight_decay=0.0153,
    label_smoothing=0.2,
    whiten_epochs=3,
    shift=2,
    validation=5000,
)
CNN_OWN = CnnFinetuneConfig(
    first_width=64,
    later_width=256,
    epochs=20,
    batch=64,
    learning_rate=1e-2,
    pretrained_learning_rate=5e-4,
    scratch_learning_rate=2e-3,
    head_only_share=0.15,
    weight_decay=0.05,
    label_smoothing=0.1,
    shift=2,
    flip=1,
    bfloat16=1,
    tail_epochs=5,
    tail_batch=32,
    tail_learning_rate=2e-4,
)
CNN_PRESETS: dict[str, CnnConfig | AirbenchConfig | CnnFinetuneConfig] = {
    "workshop": CNN_WORKSHOP,
    "digits": CNN_DIGITS,
    "strong": CNN_STRONG,
    "own": CNN_OWN,
}
# Classifiers with these hyperparameters evaluate generators. They are trained on generated or on real images.
SAMPLE_CLASSIFIER = replace(CNN_DIGITS, epochs=3, rotate=0.0, validation=0)

GAN_WORKSHOP = GanConfig(
    latent=100,
    epochs=160,
    batch=128,
    learning_rate=2e-4,
    beta1=0.0,
    ema_decay=0.999,
    r1_penalty=5.0,
    r1_interval=8,
    bfloat16=1,
)
GAN_CONDITIONAL = ConditionalGanConfig(
    latent=64,
    epochs=28,
    batch=48,
    learning_rate=5e-4,
    beta1=0.0,
    ema_decay=0.999,
    r1_penalty=0.2,
    r1_interval=8,
    bfloat16=1,
    real_class_loss_weight=1.0,
    class_loss_weight=0.1,
)
GAN_OWN = replace(GAN_CONDITIONAL, epochs=200, batch=64)
GAN_PRESETS: dict[str, GanConfig] = {"workshop": GAN_WORKSHOP, "conditional": GAN_CONDITIONAL, "own": GAN_OWN}

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
    unknown=0.002,
    validation=0.0,
    bfloat16=0,
)
RNN_STRONG = RnnConfig(
    kind="stacked-rnn",
    hidden=640,
    layers=3,
    epochs=40,
    batch=64,
    bptt=128,
    learning_rate=1.6e-3,
    weight_decay=0.1,
    clip=1.0,
    ema_decay=0.999,
    dropout=0.38,
    reset_state=0.03,
    unknown=0.002,
    validation=0.02,
    bfloat16=1,
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
    unknown=0.002,
    validation=0.02,
    bfloat16=1,
    rename=0.6,
)
RNN_OWN = RnnConfig(
    kind="stacked-rnn",
    hidden=256,
    layers=2,
    epochs=20,
    batch=64,
    bptt=64,
    learning_rate=2e-3,
    weight_decay=0.1,
    clip=1.0,
    ema_decay=0.999,
    dropout=0.2,
    reset_state=0.03,
    unknown=0.002,
    validation=0.05,
    bfloat16=1,
)
RNN_PRESETS = {"workshop": RNN_WORKSHOP, "strong": RNN_STRONG, "gated": RNN_GATED, "own": RNN_OWN}

LSTM_WORKSHOP = LstmConfig(
    hidden=64,
    window=50,
    horizon=50,
    updates=6000,
    batch=32,
    learning_rate=3e-3,
    weight_decay=1e-2,
    jitter=0.3,
    clip=1.0,
    ema_decay=0.995,
    validation=160,
)
LSTM_STRONG = ForecasterConfig(
    hidden=128,
    layers=1,
    members=3,
    smoothings=6,
    updates=8000,
    batch=256,
    learning_rate=4e-3,
    weight_decay=0.01,
    dropout=0.1,
    mixup=0.3,
    hourly_share=0.28,
    summed_share=0.2,
    structural_share=0.25,
    structural=3000,
    synthetic_share=0.1,
    series=400,
    clip=1.0,
    ema_decay=0.999,
    held_out=0.75,
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
