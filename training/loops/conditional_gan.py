"""The conditional GAN: its game, and what its samples are worth beyond their distance to the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.networks.gan import ConditionalDiscriminator, ConditionalGenerator, ConditionalSizes
from training.configs import ConditionalGanConfig
from training.loops import distributed
from training.run import set_learning_rate

SETTLING = 100  # batches from which the norms' statistics are taken


@contextmanager
def rounding() -> Iterator[None]:
    """Convolutions that round their inputs to bfloat16 inside, where the processor and this PyTorch can (2.9)."""
    convolutions: Any = getattr(torch.backends.mkldnn, "conv", None)
    before = getattr(convolutions, "fp32_precision", None)
    if before is None:
        yield
        return
    convolutions.fp32_precision = "bf16"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def penalty_on(discriminator: ConditionalDiscriminator, real: Tensor, labels: Tensor) -> Tensor:
    """Half the squared slope of the discriminator at real images of their classes, averaged over them."""
    real = real.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(real, labels)[0].sum(), real, create_graph=True)
    return 0.5 * slope.flatten(1).pow(2).sum(dim=1).mean()


class Telling(nn.Module):
    """The discriminator's loss, a mean over the images."""

    def __init__(self, discriminator: ConditionalDiscriminator, config: ConditionalGanConfig) -> None:
        super().__init__()
        self.discriminator, self.config = discriminator, config

    def forward(self, real: Tensor, fake: Tensor, labels: Tensor, steep: bool) -> tuple[Tensor, Tensor]:
        """Values of real and fake images of labels [N] -> the loss, and what of it is without penalty and reading.

        ``steep``: whether steep slopes are paid for in this step.
        """
        fitting, classes = self.discriminator(torch.cat([real, fake]), labels.repeat(2))
        told_real, told_fake = fitting.chunk(2)
        told = F.softplus(-told_real).mean() + F.softplus(told_fake).mean()  # cross-entropy: real is 1, fake is 0
        loss = told + self.config.reading * F.cross_entropy(classes[: len(real)], labels)
        if self.config.penalty and steep:
            loss = loss + self.config.penalty * self.config.penalty_every * penalty_on(self.discriminator, real, labels)
        return loss, told


class Game:
    """The two networks, their optimisers, and the generator's average, which is what is published."""

    def __init__(self, config: ConditionalGanConfig, device: str, sizes: ConditionalSizes | None = None) -> None:
        self.config = config
        self.device = device
        sizes = sizes or ConditionalSizes(config.latent)
        self.generator = ConditionalGenerator(sizes).to(device)
        self.discriminator = ConditionalDiscriminator(sizes.classes, channels=sizes.channels).to(device)
        self.average: Any = AveragedModel(self.generator, multi_avg_fn=get_ema_multi_avg_fn(config.average))
        betas = (config.beta1, 0.99)
        self.generating = torch.optim.Adam(self.generator.parameters(), betas=betas, fused=True)
        self.telling = torch.optim.Adam(self.discriminator.parameters(), betas=betas, fused=True)
        # after the average, whose norms are its own: only the first process looks at what it draws
        self.drawing = distributed.together(self.generator)
        self.lesson = distributed.together(Telling(self.discriminator, config))

    def update(self, real: Tensor, labels: Tensor, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """One step of each on the whole batch, real values [N, channels, side, side] and labels [N]; both losses.

        The generator draws the labels of the real images, so each is told from one of its own class.
        """
        set_learning_rate(self.generating, rate)
        set_learning_rate(self.telling, rate)
        latents = torch.randn(len(real), self.config.latent).to(self.device)
        real, labels, latents = (distributed.share(whole) for whole in (real, labels, latents))
        with rounding():
            fake = self.drawing(latents, labels)
            loss, told = self.lesson(real, fake.detach(), labels, step % self.config.penalty_every == 0)
            self.telling.zero_grad()
            loss.backward()
            self.telling.step()
            self.discriminator.requires_grad_(False)  # its own gradient is not wanted here
            fitting, classes = self.discriminator(fake, labels)
            fooled = F.softplus(-fitting).mean()  # the generator wants its images told as real
            self.generating.zero_grad()
            (fooled + self.config.legible * F.cross_entropy(classes, labels)).backward()
            self.generating.step()
            self.discriminator.requires_grad_(True)
        self.average.update_parameters(self.generator)
        return told, fooled

    def shown(self) -> np.ndarray:
        """What the average draws now: pixels [10 labels, ...], a row for each label, of the same latents every time."""
        network = settle(self.average.module, max(1, SETTLING // 20))
        latents = torch.from_numpy(np.random.default_rng(0).standard_normal((10, self.config.latent)))
        labels = torch.arange(network.sizes.classes, device=self.device).repeat_interleave(10)
        with torch.inference_mode():
            drawn = network.pixels(latents.float().repeat(network.sizes.classes, 1).to(self.device), labels)
        pixels: np.ndarray = drawn.cpu().numpy()
        return pixels


def settle(network: ConditionalGenerator, batches: int | None = None, size: int = 200) -> ConditionalGenerator:
    """Set the norms' statistics to those of the weights as they are now, and go to evaluation mode.

    Those that were collected in training belong to weights of other steps.
    """
    generator = torch.Generator().manual_seed(0)
    device, norms = network.linear.weight.device, [own for own in network.modules() if isinstance(own, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    network.train()
    with torch.no_grad():
        for _ in range(SETTLING if batches is None else batches):
            latents = torch.randn(size, network.sizes.latent, generator=generator)
            network(latents.to(device), torch.arange(size, device=device) % network.sizes.classes)
    return network.eval()
