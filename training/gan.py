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

from app.networks.gan import ConditionalSizes
from app.tasks.classification import ImageClassifier
from app.tasks.image_generation import ImageSampler
from training.configs import GAN_PRESETS, ConditionalGanConfig, GanConfig
from training.data import datasets
from training.evaluation import generation
from training.loops import gan_finetune
from training.loops.gan import conditional_trainer, fit, save_sheet, workshop_trainer
from training.options import Options, parse_options
from training.run import Run

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


def arguments(argv: Sequence[str] | None) -> tuple[Options, GanConfig]:
    """What a command line says."""
    return parse_options("training.gan", __doc__ or "", GAN_PRESETS, NAMES, argv, OPTIONS)


def main(argv: Sequence[str] | None = None) -> None:
    chosen, config = arguments(argv)
    if chosen.preset == "own":
        assert isinstance(config, ConditionalGanConfig)
        gan_finetune.train(chosen, config, argv)
        return
    run = Run(chosen, config, argv)

    images = datasets.mnist()
    real_images, real_labels = images.train_images.to(chosen.device), images.train_labels.to(chosen.device)
    judge = generation.load_reference_classifier(chosen.store, chosen.device)  # before the training, not after it

    if isinstance(config, ConditionalGanConfig):
        trainer = conditional_trainer(config, chosen.device)
        fit(run, trainer, real_images, real_labels, config.epochs)
    else:
        trainer = workshop_trainer(config, chosen.device)
        fit(run, trainer, real_images, None, config.epochs)
    publish(run, images, trainer.averaged_generator(), judge)


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
        "data": {
            images.name: images.sha256,
            f"{generation.REFERENCE_CLASSIFIER}@{judge.card.version}": judge.card.weights_sha256,
        },
        "notes": "The generator's weights are the average over steps; the judge took no part in the training.",
    }
    sampler = run.predictor(ImageSampler, card, network)
    card["metrics"] = generation.evaluate(sampler, judge)
    drawing = generation.class_rows(sampler, 10) if labelled else sampler.parse(64, None, 0)
    samples = save_sheet(run.folder / "samples.png", sampler.predict([drawing])[0])
    run.finish(card, network, {"curves.png": run.plot_curves(), "samples.png": samples})


if __name__ == "__main__":
    main()
