"""Hyperparameters of the image generators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from training.configs.markers import SWITCH


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
    recalibration_batches: Annotated[int, "batches that give the final statistics of the batch norms"] = 100


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
