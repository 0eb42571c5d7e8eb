"""Hyperparameters of the image classifiers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from training.configs.markers import PHOTOGRAPHS, SWITCH


@dataclass(frozen=True)
class CnnConfig:
    """Hyperparameters of small image classifiers that are trained with AdamW."""

    data: str
    kind: str
    epochs: Annotated[int, "passes over the training images"]
    batch: Annotated[int, "images per step"]
    learning_rate: Annotated[
        float, "peak learning rate. Presets strong and accurate: per 1,024 images; own: of the last layer"
    ]
    weight_decay: Annotated[float, "weight decay of the optimizer"]
    label_smoothing: Annotated[float, "label smoothing of the loss"]
    ema_decay: Annotated[float, "decay of the moving average of the weights, per step"]
    shift: Annotated[int, "largest random shift in pixels, in each direction"]
    flip: Annotated[int, "mirror images at random", SWITCH]
    rotate: Annotated[float, "largest random rotation in degrees, in each direction"]
    validation: Annotated[int, "training images held out for validation"]


@dataclass(frozen=True)
class AirbenchConfig:
    """Hyperparameters of airbench95 and 96: SGD with Nesterov momentum, look-ahead, and a whitening first layer."""

    data: str
    kind: str
    first_width: Annotated[int, "channels of the first group of convolutions"]
    second_width: Annotated[int, "channels of the second group of convolutions"]
    third_width: Annotated[int, "channels of the third group of convolutions"]
    depth: Annotated[int, "convolutions per group: 2, or 3 with a residual connection"]
    epochs: Annotated[int, "passes over the training images"]
    batch: Annotated[int, "images per step"]
    selected: Annotated[int, "train on this many images of each batch, those with the largest loss; 0: on all"]
    learning_rate: Annotated[float, "peak learning rate"]  # per 1,024 images
    warm_up: Annotated[float, "share of the steps in which the learning rate rises"]
    final_rate: Annotated[float, "learning rate after the last step, as a share of the peak learning rate"]
    weight_decay: Annotated[float, "weight decay of the optimizer"]  # per 1,024 images
    label_smoothing: Annotated[float, "label smoothing of the loss"]
    whiten_epochs: Annotated[int, "number of epochs after which the bias of the first layer is no longer trained"]
    shift: Annotated[int, "largest random shift in pixels, in each direction"]
    cutout: Annotated[int, "side of the masked square in pixels; 0: no mask"]
    corrupted: Annotated[float, "share of the images that get noise, blur or JPEG artefacts"]
    float16: Annotated[int, "store the weights of the wide convolutions in float16", SWITCH]
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
    finetune_epochs: Annotated[int, "epochs of fine-tuning the last blocks; 0: train only the last layer", PHOTOGRAPHS]
    finetune_batch: Annotated[int, "images per fine-tuning step", PHOTOGRAPHS]
    finetune_learning_rate: Annotated[float, "peak learning rate of fine-tuning", PHOTOGRAPHS]


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
    second_width=320,
    third_width=320,
    depth=2,
    epochs=22,
    batch=1000,
    selected=0,
    learning_rate=10.0,
    warm_up=0.23,
    final_rate=0.07,
    weight_decay=0.0153,
    label_smoothing=0.2,
    whiten_epochs=3,
    shift=2,
    cutout=0,
    corrupted=0.0,
    float16=0,
    validation=5000,
)
# airbench96 with 384 instead of 512 channels, 70 instead of 45 epochs, and corrupted images. The momentum of all batch
# norms is 0.4 as in airbench95, while it is 0.1 in airbench96.
CNN_ACCURATE = replace(
    CNN_STRONG,
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
    float16=1,
    validation=1000,
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
    finetune_epochs=5,
    finetune_batch=32,
    finetune_learning_rate=2e-4,
)
CNN_PRESETS: dict[str, CnnConfig | AirbenchConfig | CnnFinetuneConfig] = {
    "workshop": CNN_WORKSHOP,
    "digits": CNN_DIGITS,
    "strong": CNN_STRONG,
    "accurate": CNN_ACCURATE,
    "own": CNN_OWN,
}
# Classifiers with these hyperparameters evaluate generators. They are trained on generated or on real images.
SAMPLE_CLASSIFIER = replace(CNN_DIGITS, epochs=3, rotate=0.0, validation=0)
