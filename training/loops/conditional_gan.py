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

from app.networks import build
from app.networks.gan import ConditionalDiscriminator, ConditionalGenerator, ConditionalSizes
from app.tasks.image_generation import ImageSampler, LatentBatch
from training.configs import SAMPLE_CLASSIFIER, ConditionalGanConfig
from training.data import datasets
from training.data.image_batches import accuracy_of
from training.loops import classifier, distributed
from training.run import metric, permutation, schedule, set_learning_rate

SETTLING = 100  # batches from which the norms' statistics are taken
LEARNT = 60_000  # samples that a classifier learns from
WIDTHS = (16, 32)
NEIGHBOURS = 5


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


def rows(sampler: ImageSampler, each: int) -> LatentBatch:
    """A row for each label, all rows of the same latents."""
    drawn = [sampler.parse(each, label, 0) for label in sampler.labels]
    classes = np.arange(len(drawn)).repeat(each)
    return LatentBatch(np.concatenate([drawing.latents for drawing in drawn]), classes)


def accuracies(labels: Tensor, guesses: Tensor, classes: int) -> Tensor:
    """The share [classes] of the images of each label that are read as such."""
    right = (labels == guesses).double()
    return torch.stack([right[labels == label].mean() for label in range(classes)])


def density_and_coverage(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """In how many real images' neighbourhoods a fake one lies, over k; the share of these that have a fake one in them.

    Of features [N, D], k = 5 (Naeem et al. 2020).
    """
    reach = torch.cat(
        [torch.cdist(part, real).kthvalue(NEIGHBOURS + 1, dim=1).values for part in real.split(1000)]
    )  # to the fifth neighbour that is not itself
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for part in fake.split(1000):
        within = torch.cdist(part, real) < reach  # [1000, N]
        inside += int(within.sum())
        covered |= within.any(dim=0)
    return inside / NEIGHBOURS / len(fake), covered.double().mean().item()


def samples_only(sampler: ImageSampler, images: datasets.Images) -> dict[str, Any]:
    """The accuracy on the test part of a classifier that learnt from samples only (Ravuri and Vinyals 2019)."""
    drawing = sampler.parse(LEARNT, None, 1)
    accuracy = learnt_from(torch.from_numpy(sampler.predict([drawing])[0]), torch.as_tensor(drawing.classes), images)
    config = SAMPLE_CLASSIFIER
    told = (
        f"{images.name} test part, read by a classifier that learnt from {LEARNT:,} samples of seed 1 only: "
        f"{config.kind} {WIDTHS}, {config.epochs} epochs of {config.batch}, shifts of up to {config.shift}, seed 0"
    )
    return metric(accuracy, told, 3)


def learnt_from(learn: Tensor, labels: Tensor, images: datasets.Images) -> float:
    """The accuracy on the test part of SAMPLE_CLASSIFIER after images [N, 1, 28, 28] and labels [N]."""
    config = SAMPLE_CLASSIFIER
    torch.manual_seed(0)
    network = build(config.kind, {"conv": WIDTHS})
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, fused=True)
    network.train()
    per_epoch = len(learn) // config.batch
    for step in range(config.epochs * per_epoch):
        epoch, place = divmod(step, per_epoch)
        batch = permutation(len(learn), 0, "samples", epoch)[place * config.batch : (place + 1) * config.batch]
        rate = config.learning_rate * schedule(step, config.epochs * per_epoch)
        classifier.update(network, average, optimizer, learn[batch], labels[batch], config, rate)
    return accuracy_of(average, images.test_images, images.test_labels)


def figures(
    sampler: ImageSampler,
    images: datasets.Images,
    labels: Tensor,
    guesses: Tensor,
    features: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Any]:
    """What a card tells besides distances.

    ``labels`` and the judge's ``guesses`` are those of the judged samples; ``features`` of samples, test images, and
    training images.
    """
    fake, real, train = features
    right = accuracies(labels, guesses, len(sampler.labels))
    judged = f"{len(labels):,} samples of seed 0, with as many of each label as in the training part"
    near = f"in the judge's features, {NEIGHBOURS} neighbours, against the {images.name} test part"
    density, coverage = density_and_coverage(real, fake)
    real_density, real_coverage = density_and_coverage(real, train)
    return {
        "conditional_accuracy": metric(right.mean().item(), f"{judged}: read as their label, mean over the labels"),
        "worst_class_accuracy": metric(right.min().item(), f"{judged}: label {sampler.labels[int(right.argmin())]}"),
        "samples_only_accuracy": samples_only(sampler, images),
        "density": metric(density, f"{judged}, {near}", 3),
        "density_of_real": metric(real_density, f"{len(train):,} training images, {near}", 3),
        "coverage": metric(coverage, f"{judged}, {near}", 3),
        "coverage_of_real": metric(real_coverage, f"{len(train):,} training images, {near}", 3),
    }
