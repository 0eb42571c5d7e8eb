"""Train a network that draws images.

    python -m training.gan                         # the workshop's GAN on MNIST: mnist-gan
    python -m training.gan --preset conditional    # draws the digit that is asked for: mnist-cgan
    python -m training.gan --images DIR --name shapes   # your own: a sub-folder for each label

The presets are measured with the judge of ``python -m training.cnn --preset digits``, which must be in the store.
Measured results stand in the README's table and on each card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.networks.gan import ConditionalSizes, Discriminator, Generator, GeneratorSizes
from app.tasks.classification import ImageClassifier
from app.tasks.image_generation import ImageSampler
from training.configs import GAN_PRESETS, ConditionalGanConfig, GanConfig
from training.data import datasets
from training.evaluation import generation
from training.loops import conditional_gan
from training.loops import gan_finetune as drawn
from training.loops.gan import play, save_sheet
from training.options import Options, options
from training.run import Run, set_learning_rate

OPTIONS: dict[str, dict[str, Any]] = {
    "--images": {"metavar": "PATH", "type": Path, "help": "a sub-folder for each label, or a CSV of path,label"},
    "--size": {"type": int, "choices": (28, 32), "default": 32, "help": "pixels of a side that are drawn"},
    "--colour": {"choices": ("auto", "grey", "rgb"), "default": "auto", "help": "auto: grey where all images are"},
}
NAMES = {"workshop": "mnist-gan", "conditional": "mnist-cgan"}
TITLES = {
    "gan-generator": "The workshop's GAN: a generator of linear layers that draws handwritten digits",
    "conditional-generator": "A generator of convolutions that draws the handwritten digit it is asked for",
}


def penalty_on(discriminator: Discriminator, real: Tensor) -> Tensor:
    """Half the squared slope of the discriminator at real images, averaged over them."""
    real = real.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return 0.5 * slope.flatten(1).pow(2).sum(dim=1).mean()


class Game:
    """The two networks, their optimisers, and the generator's average, which is what is published."""

    def __init__(self, config: GanConfig, device: str) -> None:
        self.config = config
        self.device = device
        self.generator = Generator(GeneratorSizes(config.latent)).to(device)
        self.discriminator = Discriminator().to(device)
        self.average: Any = AveragedModel(self.generator, multi_avg_fn=get_ema_multi_avg_fn(config.average))
        betas = (config.beta1, 0.999)
        self.generating = torch.optim.Adam(self.generator.parameters(), betas=betas, fused=True)
        self.telling = torch.optim.Adam(self.discriminator.parameters(), betas=betas, fused=True)

    def update(self, real: Tensor, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """One step of each on real grey values [N, 1, 28, 28]; gives the losses of discriminator and generator."""
        set_learning_rate(self.generating, rate)
        set_learning_rate(self.telling, rate)
        fake = self.generator(torch.randn(len(real), self.config.latent).to(self.device))

        told_real, told_fake = self.discriminator(torch.cat([real, fake.detach()])).chunk(2)
        told = F.softplus(-told_real).mean() + F.softplus(told_fake).mean()  # cross-entropy: real is 1, fake is 0
        loss = told
        if self.config.penalty and step % self.config.penalty_every == 0:
            loss = told + self.config.penalty * self.config.penalty_every * penalty_on(self.discriminator, real)
        self.telling.zero_grad()
        loss.backward()
        self.telling.step()

        self.discriminator.requires_grad_(False)  # its own gradient is not wanted here
        fooled = F.softplus(-self.discriminator(fake)).mean()  # the generator wants its images told as 1
        self.generating.zero_grad()
        fooled.backward()
        self.generating.step()
        self.discriminator.requires_grad_(True)
        self.average.update_parameters(self.generator)
        return told, fooled

    def shown(self) -> np.ndarray:
        """What the average draws now: pixels [64, 1, 28, 28], of the same latents every time."""
        latents = torch.from_numpy(np.random.default_rng(0).standard_normal((64, self.config.latent)))
        with torch.inference_mode():
            pixels: np.ndarray = self.average.module.pixels(latents.float().to(self.device)).cpu().numpy()
        return pixels


def arguments(argv: Sequence[str] | None) -> tuple[Options, GanConfig]:
    """What a command line says."""
    return options("training.gan", __doc__ or "", GAN_PRESETS, NAMES, argv, OPTIONS)


def main(argv: Sequence[str] | None = None) -> None:
    chosen, config = arguments(argv)
    if chosen.preset == "own":
        assert isinstance(config, ConditionalGanConfig)
        drawn.train(chosen, config, argv)
        return
    run = Run(chosen, config, argv)

    images = datasets.mnist()
    real_images, real_labels = images.train_images.to(chosen.device), images.train_labels.to(chosen.device)
    judge = generation.load_judge(chosen.store, chosen.device)  # before the training, not after it

    labelled = isinstance(config, ConditionalGanConfig)
    kind: Any = conditional_gan.Game if labelled else Game
    game = kind(config, chosen.device)
    play(run, game, real_images, real_labels if labelled else None, config, config.epochs)
    publish(run, images, conditional_gan.settle(game.average.module) if labelled else game.average.module, judge)


def publish(run: Run, images: datasets.Images, network: Any, judge: ImageClassifier) -> None:
    """Read the test part once, with the code that serves, and write the card."""
    sizes = network.sizes
    labelled = isinstance(sizes, ConditionalSizes)
    latents = {"name": "latents", "dtype": "float64", "shape": [-1, sizes.latent]}
    kind = "conditional-generator" if labelled else "gan-generator"
    card = {
        "task": "sample",
        "title": TITLES[kind],
        "kind": kind,
        "sizes": asdict(sizes),
        "inputs": [latents, {"name": "classes", "dtype": "int64", "shape": [-1]}] if labelled else [latents],
        "outputs": [{"name": "images", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "labels": images.labels if labelled else None,
        "data": {images.name: images.sha256, f"{generation.JUDGE}@{judge.card.version}": judge.card.weights_sha256},
        "notes": "The generator's weights are the average over steps; the judge took no part in the training.",
    }
    sampler = run.predictor(ImageSampler, card, network)
    card["metrics"] = generation.evaluate(sampler, judge)
    drawing = generation.rows(sampler, 10) if labelled else sampler.parse(64, None, 0)
    samples = save_sheet(run.folder / "samples.png", sampler.predict([drawing])[0])
    run.finish(card, network, {"curves.png": run.curves(), "samples.png": samples})


if __name__ == "__main__":
    main()
