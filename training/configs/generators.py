"""Hyperparameters of the image generators."""

from __future__ import annotations

from training.configs.numbers import Amount, BelowOne, Count, Described


class GanConfig(Described):
    """Hyperparameters of a GAN whose generator and discriminator are trained with Adam."""

    latent: Count = 100
    """size of the latent vector"""
    epochs: Count = 160
    """passes over the training images"""
    batch: Count = 128
    """images per step"""
    learning_rate: Amount = 2e-4
    """peak learning rate"""
    beta1: BelowOne = 0.0
    """beta1 of Adam"""
    ema_decay: BelowOne = 0.999
    """decay of the moving average of the generator's weights, per step"""
    r1_penalty: Amount = 5.0  # Mescheder et al. 2018
    """weight of the R1 gradient penalty"""
    r1_interval: Count = 8
    """steps between two gradient penalties"""


class ConditionalGanConfig(GanConfig):
    """Hyperparameters of a GAN with labels, whose discriminator also classifies images."""

    real_class_loss_weight: Amount = 1.0
    """weight of the discriminator's loss on the classes of real images"""
    # This weight is small, so that the generator does not draw only the clearest images.
    class_loss_weight: Amount = 0.1
    """weight of the generator's loss on the classes of its images"""
    recalibration_batches: Count = 100
    """batches that give the final statistics of the batch norms"""


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
    "own": GAN_CONDITIONAL.model_copy(update={"epochs": 200, "batch": 64}),
}
