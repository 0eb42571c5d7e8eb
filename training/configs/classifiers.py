"""Hyperparameters of the image classifiers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from training.configs.numbers import Amount, BelowOne, Count, Share, Whole


@dataclass(frozen=True)
class CnnConfig:
    """Hyperparameters of small image classifiers that are trained with AdamW."""

    data: str = "cifar10"
    kind: str = "lenet"
    epochs: Annotated[Count, "passes over the training images"] = 150
    batch: Annotated[Count, "images per step"] = 512
    learning_rate: Annotated[
        Amount, "peak learning rate. Presets strong and accurate: per 1,024 images; own: of the last layer"
    ] = 4e-3
    weight_decay: Annotated[Amount, "weight decay of the optimizer"] = 5e-4
    label_smoothing: Annotated[Share, "label smoothing of the loss"] = 0.0
    ema_decay: Annotated[BelowOne, "decay of the moving average of the weights, per step"] = 0.995
    shift: Annotated[int, Field(ge=0, le=16), "largest random shift in pixels, in each direction"] = 2
    flip: Annotated[bool, "mirror images at random"] = True
    rotate: Annotated[Amount, "largest random rotation in degrees, in each direction"] = 0.0
    validation: Annotated[int, Field(ge=1, le=49_000), "training images held out, also for the calibration"] = 5000


@dataclass(frozen=True)
class AirbenchConfig:
    """Hyperparameters of airbench95 and 96: SGD with Nesterov momentum, look-ahead, and a whitening first layer."""

    data: str = "cifar10"
    kind: str = "whitened-net"
    first_width: Annotated[Count, "channels of the first group of convolutions"] = 96
    second_width: Annotated[Count, "channels of the second group of convolutions"] = 320
    third_width: Annotated[Count, "channels of the third group of convolutions"] = 320
    depth: Annotated[int, Field(ge=2, le=3), "convolutions per group: 2, or 3 with a residual connection"] = 2
    epochs: Annotated[Count, "passes over the training images"] = 22
    batch: Annotated[Count, "images per step"] = 1000
    selected: Annotated[Whole, "train on this many images of each batch, those with the largest loss; 0: on all"] = 0
    learning_rate: Annotated[Amount, "peak learning rate"] = 10.0  # per 1,024 images
    warm_up: Annotated[Share, "share of the steps in which the learning rate rises"] = 0.23
    final_rate: Annotated[Share, "learning rate after the last step, as a share of the peak learning rate"] = 0.07
    weight_decay: Annotated[Amount, "weight decay of the optimizer"] = 0.0153  # per 1,024 images
    label_smoothing: Annotated[Share, "label smoothing of the loss"] = 0.2
    whiten_epochs: Annotated[Count, "number of epochs after which the bias of the first layer is no longer trained"] = 3
    shift: Annotated[int, Field(ge=0, le=16), "largest random shift in pixels, in each direction"] = 2
    cutout: Annotated[int, Field(ge=0, le=32), "side of the masked square in pixels; 0: no mask"] = 0
    corrupted: Annotated[Share, "share of the images that get noise, blur or JPEG artefacts"] = 0.0
    float16: Annotated[bool, "store the weights of the wide convolutions in float16"] = False
    validation: Annotated[int, Field(ge=1, le=49_000), "training images held out, also for the calibration"] = 5000


@dataclass(frozen=True)
class CnnFinetuneConfig:
    """Hyperparameters for users' images: a fine-tuned network (``--from NAME``) or a new one (``--from scratch``)."""

    first_width: Annotated[Count, "channels of the first group of convolutions"] = 64  # from scratch
    later_width: Annotated[Count, "channels of the second and third group of convolutions"] = 256  # from scratch
    epochs: Annotated[Count, "passes over the training images"] = 20
    batch: Annotated[Count, "images per step"] = 64
    learning_rate: Annotated[Amount, "peak learning rate"] = 1e-2  # of the last layer only
    pretrained_learning_rate: Annotated[Amount, "peak learning rate of the pretrained layers"] = 5e-4
    scratch_learning_rate: Annotated[Amount, "from scratch: peak learning rate of all layers but the last"] = 2e-3
    head_only_share: Annotated[Share, "share of the steps at the start in which only the last layer is trained"] = 0.15
    weight_decay: Annotated[Amount, "weight decay of the optimizer"] = 0.05
    label_smoothing: Annotated[Share, "label smoothing of the loss"] = 0.1
    shift: Annotated[int, Field(ge=0, le=16), "largest random shift in pixels, in each direction"] = 2
    flip: Annotated[bool, "mirror images at random"] = True
    finetune_epochs: Annotated[Whole, "epochs of fine-tuning the last blocks; 0: train only the last layer"] = 5
    finetune_batch: Annotated[Count, "images per fine-tuning step"] = 32
    finetune_learning_rate: Annotated[Amount, "peak learning rate of fine-tuning"] = 2e-4


CNN_DIGITS = CnnConfig(
    data="mnist",
    kind="digit-net",
    epochs=8,
    batch=128,
    learning_rate=2e-3,
    weight_decay=1e-3,
    ema_decay=0.998,
    flip=False,
    rotate=10.0,
)
# airbench96 with 384 instead of 512 channels, 70 instead of 45 epochs, and corrupted images. The momentum of all batch
# norms is 0.4 as in airbench95, while it is 0.1 in airbench96.
CNN_ACCURATE = AirbenchConfig(
    first_width=128,
    second_width=384,
    third_width=384,
    depth=3,
    epochs=70,
    batch=1024,
    selected=512,
    learning_rate=9.0,
    weight_decay=0.012,
    warm_up=0.1,
    final_rate=0.0,
    shift=4,
    cutout=12,
    corrupted=0.07,
    float16=True,
    validation=1000,
)
CNN_PRESETS: dict[str, CnnConfig | AirbenchConfig | CnnFinetuneConfig] = {
    "workshop": CnnConfig(),
    "digits": CNN_DIGITS,
    "strong": AirbenchConfig(),
    "accurate": CNN_ACCURATE,
    "own": CnnFinetuneConfig(),
}
# Classifiers with these hyperparameters evaluate generators. They are trained on generated or on real images.
SAMPLE_CLASSIFIER = replace(CNN_DIGITS, epochs=3, rotate=0.0, validation=0)
