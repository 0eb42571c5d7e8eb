"""Train an image generator.

    quartet train gan                         # preset workshop: mnist-gan, the workshop's GAN on MNIST
    quartet train gan --preset conditional    # mnist-cgan, which generates a requested digit
    quartet train gan --images DIR --name shapes   # preset own: your images, one sub-folder per label

The classifier mnist-judge evaluates the networks of the presets workshop and conditional. If the store has no
mnist-judge, train it first: quartet train cnn --preset digits. docs/measurements.md and the model cards contain
the measured results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.networks.gan import ConditionalSizes
from app.tasks.classification import ImageClassifier
from app.tasks.image_generation import ImageSampler
from training import cards
from training.configs.generators import GAN_PRESETS, ConditionalGanConfig, GanConfig
from training.data import datasets
from training.evaluation import generation
from training.limits import limits
from training.loops import gan_finetune
from training.loops.gan import GanRecipe, save_grid, train
from training.options import Options, parse_options
from training.run import Run, run_command

OPTIONS: dict[str, dict[str, Any]] = {
    "--images": {
        "metavar": "PATH",
        "type": Path,
        "help": "folder of images with one sub-folder per label, or CSV file with the columns path,label",
    },
    "--size": {
        "type": int,
        "choices": (28, 32),
        "default": 32,
        "help": "side length of the generated images in pixels",
    },
}
NAMES = {"workshop": "mnist-gan", "conditional": "mnist-cgan"}
TITLES = {
    "gan-generator": "The workshop's GAN: a generator of linear layers for handwritten digits",
    "conditional-generator": "A convolutional generator for handwritten digits, with labels",
}


def arguments(argv: Sequence[str] | None) -> tuple[Options, GanConfig]:
    """Parse the command line; return the options, and the preset's config with all overrides."""
    return parse_options("training.gan", __doc__ or "", GAN_PRESETS, NAMES, argv, OPTIONS)


def main(argv: Sequence[str] | None = None) -> None:
    options, config = arguments(argv)
    if options.preset == "own":
        assert isinstance(config, ConditionalGanConfig)
        gan_finetune.train(options, config, argv)
        return
    images = datasets.mnist()
    real_images, real_labels = images.train_images, images.train_labels
    if options.part == "validation":  # the samples are compared with the other training images
        used, _ = images.split_validation(limits().unseen_images)
        real_images, real_labels = real_images[used], real_labels[used]
    if config.batch > len(real_labels):
        sys.exit(f"batch is {config.batch:,}, but there are only {len(real_labels):,} training images")
    run = Run(options, config, argv)
    real_images, real_labels = real_images.to(options.device), real_labels.to(options.device)
    # The classifier is loaded before the training, so that the command fails early if the classifier is missing.
    classifier = generation.load_reference_classifier(options.store, options.device)

    conditional = isinstance(config, ConditionalGanConfig)
    sizes = ConditionalSizes(config.latent) if conditional else None
    recipe = GanRecipe(run, config, real_images, real_labels if conditional else None, sizes)
    train(run, recipe)
    publish(run, images, recipe.averaged_generator(), classifier)


def publish(run: Run, images: datasets.Images, network: Any, classifier: ImageClassifier) -> None:
    """Evaluate the generator with the serving code, write its model card, and publish it."""
    labelled = isinstance(network.sizes, ConditionalSizes)
    kind = "conditional-generator" if labelled else "gan-generator"
    card = {
        **cards.generator(kind, network, images.labels if labelled else None),
        "title": TITLES[kind],
        "data": {
            images.name: images.sha256,
            f"{generation.REFERENCE_CLASSIFIER}@{classifier.card.version}": classifier.card.weights_sha256,
        },
        "notes": "The generator's weights are an average over steps. The classifier was used for evaluation only.",
    }
    sampler = run.predictor(ImageSampler, card, network)
    card = run.measure(card, lambda part: generation.evaluate(sampler, classifier, part))
    drawing = generation.class_rows(sampler) if labelled else sampler.parse(64, None, 0)
    samples = save_grid(run.folder / "samples.png", sampler.predict([drawing])[0])
    run.finish(card, network, samples)


if __name__ == "__main__":
    run_command(main)
