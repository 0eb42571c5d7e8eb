"""Train generative adversarial networks (GANs), with or without labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.gan import (
    ConditionalDiscriminator,
    ConditionalGenerator,
    ConditionalSizes,
    Discriminator,
    Generator,
    GeneratorSizes,
)
from app.tasks.image_codecs import image_grid
from training.loops.fit import Batches, averaged, descend
from training.run import Run, permutation, set_learning_rate

PREVIEWS = 10  # number of previews (grids of samples) that a run saves
RECALIBRATION_SIZE = 200  # images of each batch that gives statistics of the batch norms
PREVIEW_BATCHES = 5  # number of these batches for a preview


@contextmanager
def bfloat16_convolutions() -> Iterator[None]:
    """Round the inputs of convolutions to bfloat16 in a ``with`` block, if the processor supports bfloat16."""
    convolutions: Any = torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "bf16"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def score(discriminator: nn.Module, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Any]:
    """Return the logits [N] with which the discriminator rates images as real, and its class logits [N, classes].

    Without labels [N], the class logits are None.
    """
    return (discriminator(images), None) if labels is None else discriminator(images, labels)


def gradient_penalty(discriminator: nn.Module, real: Tensor, labels: Tensor | None) -> Tensor:
    """Return the R1 penalty (Mescheder et al. 2018).

    It is half of the mean squared norm of the discriminator's gradient with respect to real images.
    """
    real = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(score(discriminator, real, labels)[0].sum(), real, create_graph=True)
    return 0.5 * gradient.flatten(1).pow(2).sum(dim=1).mean()


class GanRecipe:
    """The recipe of a generator and a discriminator; see ``training.loops.fit.Recipe``.

    The moving average of the generator's weights is published.

    Args:
        run: the run, whose folder gets the previews.
        config: the hyperparameters.
        images: uint8 [N, C, S, S].
        labels: the labels [N] of the images, or None for the workshop's networks.
        sizes: the sizes of a generator with labels, which has convolutions.
        short: see ``averaged``.
    """

    def __init__(
        self,
        run: Run,
        config: Any,
        images: Tensor,
        labels: Tensor | None,
        sizes: ConditionalSizes | None = None,
        short: bool = False,
    ) -> None:
        self.config, self.images, self.labels, self.folder = config, images, labels, run.folder
        self.device = run.options.device
        self.batches = Batches(torch.arange(len(images)), config.batch, run.options.seed)
        generator = ConditionalGenerator(sizes) if sizes else Generator(GeneratorSizes(config.latent))
        discriminator = ConditionalDiscriminator(sizes.classes, sizes.channels) if sizes else Discriminator()
        self.generator, self.discriminator = generator.to(self.device), discriminator.to(self.device)
        self.average: Any = averaged(self.generator, config.ema_decay, short)
        self.generator_optimizer, self.discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), betas=(config.beta1, 0.99 if sizes else 0.999), fused=True)
            for network in (self.generator, self.discriminator)
        )

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train both networks for one step.

        The generator makes images with the labels of the real images, so real and fake images of the same classes are
        compared.
        """
        config, batch = self.config, self.batches(step)
        real = self.images[batch].to(torch.get_default_dtype()) / 127.5 - 1
        labels = None if self.labels is None else self.labels[batch]
        rate = config.learning_rate * min(1.0, (1 - done) / 0.3)  # falls to 0 over the last 30 %
        set_learning_rate(self.generator_optimizer, rate)
        set_learning_rate(self.discriminator_optimizer, rate)
        latents = torch.randn(len(real), config.latent).to(self.device)
        with bfloat16_convolutions():
            fake = self.generator(latents) if labels is None else self.generator(latents, labels)
            d_loss = self._train_discriminator(real, fake.detach(), labels, step % config.r1_interval == 0)
            g_loss = self._train_generator(fake, labels)
        self.average.update_parameters(self.generator)
        return {"discriminator_loss": d_loss, "generator_loss": g_loss}

    def _train_discriminator(self, real: Tensor, fake: Tensor, labels: Tensor | None, penalize: bool) -> Tensor:
        """Train the discriminator; return d_loss, the part of its loss that separates real from fake images.

        Real and fake images are [N, C, S, S] from -1 to 1, and have the same labels [N]. If ``penalize`` is true, the
        loss includes the gradient penalty.
        """
        config = self.config
        twice = None if labels is None else labels.repeat(2)
        logits, class_logits = score(self.discriminator, torch.cat([real, fake]), twice)
        real_logits, fake_logits = logits.chunk(2)
        d_loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()  # cross-entropy: real is 1, fake is 0
        loss = d_loss
        if labels is not None:
            loss = loss + config.real_class_loss_weight * F.cross_entropy(class_logits[: len(real)], labels)
        if config.r1_penalty and penalize:
            penalty = gradient_penalty(self.discriminator, real, labels)
            loss = loss + config.r1_penalty * config.r1_interval * penalty
        descend(self.discriminator_optimizer, loss)
        return d_loss

    def _train_generator(self, fake: Tensor, labels: Tensor | None) -> Tensor:
        """Train the generator so that the discriminator classifies its images as real; return g_loss."""
        self.discriminator.requires_grad_(False)  # this step needs no gradients of the discriminator's weights
        logits, class_logits = score(self.discriminator, fake, labels)
        loss = g_loss = F.softplus(-logits).mean()
        if labels is not None:
            loss = g_loss + self.config.class_loss_weight * F.cross_entropy(class_logits, labels)
        descend(self.generator_optimizer, loss)
        self.discriminator.requires_grad_(True)
        return g_loss

    def averaged_generator(self, labels: Tensor | None = None, batches: int | None = None) -> Any:
        """Return the moving average of the generator. If it takes labels, recalibrate its batch norms.

        ``batches``: number of batches for the recalibration, by default that of the config. ``labels``: see
        ``recalibrate_batchnorm``.
        """
        network = self.average.module
        if self.labels is None:
            return network
        return recalibrate_batchnorm(network, batches or self.config.recalibration_batches, labels)

    def validate(self, steps: int) -> dict[str, float]:
        """Save a grid of samples from fixed latents: 64 images or, with labels, ten for each class. No metrics."""
        network = self.averaged_generator(self.labels, PREVIEW_BATCHES)
        classes = 0 if self.labels is None else network.sizes.classes
        rows = np.random.default_rng(0).standard_normal((10 if classes else 64, self.config.latent))
        latents = torch.from_numpy(rows).to(torch.get_default_dtype()).repeat(classes or 1, 1).to(self.device)
        labels = [torch.arange(classes, device=self.device).repeat_interleave(10)] if classes else []
        with torch.inference_mode():
            images = network.pixels(latents, *labels).cpu().numpy()
        save_grid(self.folder / f"step-{steps:06}.png", images, 10 if classes else None)
        return {}


def recalibrate_batchnorm(
    network: ConditionalGenerator, batches: int, labels: Tensor | None = None
) -> ConditionalGenerator:
    """Recompute the statistics of the batch norms from generated images, and switch to evaluation mode.

    The statistics collected during training belong to the weights of single steps, not to the averaged weights.
    ``labels`` [N] are the labels of the training images. The generated images have these labels in random order,
    because the statistics depend on the shares of the classes. Without ``labels``, all classes are equally frequent.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(network.sizes.classes) if labels is None else permutation(len(labels), 0, "recalibration")
    in_order = order if labels is None else labels.cpu()[order]
    device, norms = network.linear.weight.device, [own for own in network.modules() if isinstance(own, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # makes the statistics a mean over all batches
    network.train()
    with torch.no_grad():
        for batch in range(batches):
            latents = torch.randn(RECALIBRATION_SIZE, network.sizes.latent, generator=generator)
            positions = torch.arange(RECALIBRATION_SIZE) + batch * RECALIBRATION_SIZE
            network(latents.to(device), in_order[positions % len(in_order)].to(device))
    return network.eval()


def save_grid(path: Path, images: np.ndarray, columns: int | None = None) -> Path:
    """Save a picture with all uint8 images [N, channels, side, side] at twice their size; return its path.

    Without ``columns``, the numbers of rows and columns are about equal.
    """
    pixels = image_grid(images, columns=columns)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)
    return path
