"""Hyperparameters of the image classifiers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from training.configs.numbers import Amount, BelowOne, Count, Described, Share, Whole

Shift = Annotated[int, Field(ge=0, le=16)]
HeldOut = Annotated[int, Field(ge=1, le=49_000)]


class CnnConfig(Described):
    """Hyperparameters of small image classifiers that are trained with AdamW."""

    data: str = "cifar10"
    kind: str = "lenet"
    epochs: Count = 150
    """passes over the training images"""
    batch: Count = 512
    """images per step"""
    learning_rate: Amount = 4e-3
    """peak learning rate. Presets strong and accurate: per 1,024 images; own: of the last layer"""
    weight_decay: Amount = 5e-4
    """weight decay of the optimizer"""
    label_smoothing: Share = 0.0
    """label smoothing of the loss"""
    ema_decay: BelowOne = 0.995
    """decay of the moving average of the weights, per step"""
    shift: Shift = 2
    """largest random shift in pixels, in each direction"""
    flip: bool = True
    """mirror images at random"""
    rotate: Amount = 0.0
    """largest random rotation in degrees, in each direction"""
    validation: HeldOut = 5000
    """training images held out, also for the calibration"""


class AirbenchConfig(Described):
    """Hyperparameters of airbench95 and 96: SGD with Nesterov momentum, look-ahead, and a whitening first layer."""

    data: str = "cifar10"
    kind: str = "whitened-net"
    first_width: Count = 96
    """channels of the first group of convolutions"""
    second_width: Count = 320
    """channels of the second group of convolutions"""
    third_width: Count = 320
    """channels of the third group of convolutions"""
    depth: Annotated[int, Field(ge=2, le=3)] = 2
    """convolutions per group: 2, or 3 with a residual connection"""
    epochs: Count = 22
    """passes over the training images"""
    batch: Count = 1000
    """images per step"""
    selected: Whole = 0
    """train on this many images of each batch, those with the largest loss; 0: on all"""
    learning_rate: Amount = 10.0  # per 1,024 images
    """peak learning rate"""
    warm_up: Share = 0.23
    """share of the steps in which the learning rate rises"""
    final_rate: Share = 0.07
    """learning rate after the last step, as a share of the peak learning rate"""
    weight_decay: Amount = 0.0153  # per 1,024 images
    """weight decay of the optimizer"""
    label_smoothing: Share = 0.2
    """label smoothing of the loss"""
    whiten_epochs: Count = 3
    """number of epochs after which the bias of the first layer is no longer trained"""
    shift: Shift = 2
    """largest random shift in pixels, in each direction"""
    cutout: Annotated[int, Field(ge=0, le=32)] = 0
    """side of the masked square in pixels; 0: no mask"""
    corrupted: Share = 0.0
    """share of the images that get noise, blur or JPEG artefacts"""
    float16: bool = False
    """store the weights of the wide convolutions in float16"""
    validation: HeldOut = 5000
    """training images held out, also for the calibration"""


class CnnFinetuneConfig(Described):
    """Hyperparameters for users' images: a fine-tuned network (``--from NAME``) or a new one (``--from scratch``)."""

    first_width: Count = 64  # from scratch
    """channels of the first group of convolutions"""
    later_width: Count = 256  # from scratch
    """channels of the second and third group of convolutions"""
    epochs: Count = 20
    """passes over the training images"""
    batch: Count = 64
    """images per step"""
    learning_rate: Amount = 1e-2  # of the last layer only
    """peak learning rate"""
    pretrained_learning_rate: Amount = 5e-4
    """peak learning rate of the pretrained layers"""
    scratch_learning_rate: Amount = 2e-3
    """from scratch: peak learning rate of all layers but the last"""
    head_only_share: Share = 0.15
    """share of the steps at the start in which only the last layer is trained"""
    weight_decay: Amount = 0.05
    """weight decay of the optimizer"""
    label_smoothing: Share = 0.1
    """label smoothing of the loss"""
    shift: Shift = 2
    """largest random shift in pixels, in each direction"""
    flip: bool = True
    """mirror images at random"""
    finetune_epochs: Whole = 5
    """epochs of fine-tuning the last blocks; 0: train only the last layer"""
    finetune_batch: Count = 32
    """images per fine-tuning step"""
    finetune_learning_rate: Amount = 2e-4
    """peak learning rate of fine-tuning"""


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
SAMPLE_CLASSIFIER = CNN_DIGITS.model_copy(update={"epochs": 3, "rotate": 0.0, "validation": 0})
