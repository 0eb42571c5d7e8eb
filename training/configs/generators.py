"""Hyperparameters of the image generators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from training.configs.numbers import Amount, BelowOne, Count


@dataclass(frozen=True)
class GanConfig:
    """Hyperparameters of a GAN whose generator and discriminator are trained with Adam."""

    latent: Annotated[Count, "size of the latent vector"] = 100
    epochs: Annotated[Count, "passes over the training images"] = 160
    batch: Annotated[Count, "images per step"] = 128
    learning_rate: Annotated[Amount, "peak learning rate"] = 2e-4
    beta1: Annotated[BelowOne, "beta1 of Adam"] = 0.0
    ema_decay: Annotated[BelowOne, "decay of the moving average of the generator's weights, per step"] = 0.999
    r1_penalty: Annotated[Amount, "weight of the R1 gradient penalty"] = 5.0  # Mescheder et al. 2018
    r1_interval: Annotated[Count, "steps between two gradient penalties"] = 8


@dataclass(frozen=True)
class ConditionalGanConfig(GanConfig):
    """Hyperparameters of a GAN with labels, whose discriminator also classifies images."""

    real_class_loss_weight: Annotated[Amount, "weight of the discriminator's loss on the classes of real images"] = 1.0
    # This weight is small, so that the generator does not draw only the clearest images.
    class_loss_weight: Annotated[Amount, "weight of the generator's loss on the classes of its images"] = 0.1
    recalibration_batches: Annotated[Count, "batches that give the final statistics of the batch norms"] = 100


GAN_CONDITIONAL = ConditionalGanConfig(
    latent=64,
    epochs=28,
    batch=48,
    learning_rate=5e-4,
    r1_penalty=0.2,
)
GAN_PRESETS: dict[str, GanConfig] = {
    "workshop": GanConfig(),
    "conditional": GAN_CONDITIONAL,
    "own": replace(GAN_CONDITIONAL, epochs=200, batch=64),
}
