"""Train an image generator.

    quartet train gan                         # preset workshop: mnist-gan, the workshop's GAN on MNIST
    quartet train gan --preset conditional    # mnist-cgan, which generates a requested digit
    quartet train gan --images DIR --name shapes   # preset own: your images, one sub-folder per label

The name of each sub-folder is a label. The images of a folder without sub-folders have a single label, the name of the
model. The Frechet distance of your images is not measured, because there is no reference classifier for them. The
metrics show whether samples are copies of training images. With several labels, they also show whether a classifier
that was trained on the real images recognises the requested labels.

The classifier mnist-judge evaluates the networks of the presets workshop and conditional. If the store has no
mnist-judge, train it first: quartet train cnn --preset digits. docs/measurements.md and the model cards contain
the measured results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from app import store
from app.networks.gan import ConditionalSizes
from app.tasks.image_generation import ImageSampler
from training import cards
from training.configs.classifiers import SAMPLE_CLASSIFIER
from training.configs.generators import GAN_PRESETS, ConditionalGanConfig, GanConfig
from training.configs.numbers import Described
from training.data import datasets, image_folders
from training.data.datasets import DataError
from training.data.image_dataset import ImageDataset, keep_trainable, print_summary
from training.evaluation import generation
from training.evaluation.calibration import accuracy_of
from training.evaluation.generation import CLASSIFIER_WIDTHS, class_rows, label_classifier, nearest_distances
from training.limits import limits
from training.loops.gan import GanRecipe, save_grid, train
from training.options import Options, Part, flags, parse_options
from training.run import Run, metric, run_command


class GanOptions(Described):
    """The options for the user's images."""

    images: Path | None = None
    """folder of images with one sub-folder per label, or CSV file with the columns path,label"""
    size: Annotated[int, Field(multiple_of=4, ge=28, le=32)] = 32
    """side length of the generated images in pixels: 28 or 32"""


MIN_IMAGES = 64  # smallest number of different images of the user
SAMPLES = 1000  # number of generated images that are compared with the user's images
MAX_HELD_OUT = 2000  # largest number of real images that are evaluated
NAMES = {"workshop": "mnist-gan", "conditional": "mnist-cgan"}
TITLES = {
    "gan-generator": "The workshop's GAN: a generator of linear layers for handwritten digits",
    "conditional-generator": "A convolutional generator for handwritten digits, with labels",
}


def arguments(argv: Sequence[str] | None) -> tuple[Options, GanConfig]:
    """Parse the command line; return the options, and the preset's config with all overrides."""
    return parse_options("training.gan", __doc__ or "", GAN_PRESETS, NAMES, argv, flags(GanOptions))


def main(argv: Sequence[str] | None = None) -> None:
    options, config = arguments(argv)
    if options.preset == "own":
        assert isinstance(config, ConditionalGanConfig)
        train_own(options, config, argv)
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
    network, kind = recipe.averaged_generator(), "conditional-generator" if conditional else "gan-generator"
    card = {
        **cards.fields(kind, network, labels=images.labels if conditional else None),
        "title": TITLES[kind],
        "data": {
            images.name: images.sha256,
            f"{generation.REFERENCE_CLASSIFIER}@{classifier.card.version}": classifier.card.weights_sha256,
        },
        "notes": "The generator's weights are an average over steps. The classifier was used for evaluation only.",
    }
    publish(run, card, network, lambda sampler, part: generation.evaluate(sampler, classifier, part))


def publish(
    run: Run, card: dict[str, Any], network: Any, evaluate: Callable[[ImageSampler, Part], dict[str, Any]]
) -> None:
    """Evaluate the generator with the serving code, draw samples, and publish it."""
    card, sampler = run.measure(card, network, evaluate)
    drawing = class_rows(sampler) if card["labels"] else sampler.parse(64, None, 0)
    columns = 10 if card["labels"] else None
    run.finish(card, network, save_grid(run.folder / "samples.png", sampler.predict([drawing])[0], columns))


# --- the user's images


def read(path: Path, side: int, name: str) -> ImageDataset:
    """Read the images, as grey images if all are grey.

    Raises DataError if there are not enough different images, or if images have several labels.
    """
    dataset = image_folders.read(path, side, name=name)
    if dataset.multi_label:
        raise DataError(f"{path} has several labels for an image, but image generators need one: a column label")
    dataset = keep_trainable(dataset, path, 1)
    if len(dataset.labels) < MIN_IMAGES:
        raise DataError(f"{path} holds {dataset.describe_classes()}: at least {MIN_IMAGES} different images are needed")
    if bool((dataset.images == dataset.images[:, :1]).all()):
        return replace(dataset, images=dataset.images[:, :1].contiguous())
    return dataset


def measure(sampler: ImageSampler, dataset: ImageDataset, part: Part = "test") -> dict[str, Any]:
    """Return the metrics of a published generator, relative to images that are held out from its training.

    If ``part`` is "validation", the images of the test part are not used.
    """
    train, validation, test = dataset.split()
    held_out = torch.cat([validation, test]) if part == "test" else validation
    held_out = held_out[:: max(1, -(-len(held_out) // MAX_HELD_OUT))]
    latents = sampler.parse(SAMPLES, None, 0)
    samples = torch.from_numpy(sampler.predict([latents])[0])
    real, others = dataset.images[train], dataset.images[held_out]
    ratio = nearest_distances(samples, real).median() / nearest_distances(others, real).median()
    split = (
        f"median pixel distance to the nearest of {len(train):,} training images: {SAMPLES:,} samples over "
        f"{len(held_out):,} others"
    )
    metrics = {"nearest_neighbour_ratio": metric(ratio.item(), split, 3)}
    if len(dataset.classes) == 1:
        return metrics
    steps = limits().label_classifier_steps
    by = (
        f"classified by a {SAMPLE_CLASSIFIER.kind} {CLASSIFIER_WIDTHS} trained for {steps:,} steps on {len(train):,} "
        "real images"
    )
    classifier = label_classifier(real, dataset.labels[train], len(dataset.classes), steps)
    accuracy = accuracy_of(classifier, samples, torch.as_tensor(latents.classes))
    real_accuracy = accuracy_of(classifier, others, dataset.labels[held_out])
    return metrics | {
        "label_accuracy": metric(accuracy, f"{SAMPLES:,} samples of seed 0, {by}", 2),
        "label_accuracy_of_real": metric(real_accuracy, f"{len(held_out):,} other real images, {by}", 2),
    }


evaluate, measure_own = generation.evaluate, measure


def read_own(options: Options, config: GanConfig, card: store.Card) -> ImageDataset:
    """Read the images of the user that a generator was trained on."""
    return read(options.images, options.size, options.name)


def train_own(options: Options, config: ConditionalGanConfig, argv: Sequence[str] | None) -> None:
    """Train a generator on the user's images, evaluate it and publish it."""
    dataset = read(options.images, options.size, options.name)
    print_summary(dataset)
    print(f"the images are {'grey' if dataset.images.shape[1] == 1 else 'coloured'}")
    if options.preview:
        return
    run = Run(options, config, argv, dataset.sha256)
    run.write_lines("skipped.txt", dataset.skipped)
    train_indices = dataset.split()[0]
    images, labels = (part[train_indices].to(options.device) for part in (dataset.images, dataset.labels))
    config = config.model_copy(update={"batch": min(config.batch, len(images))})
    sizes = ConditionalSizes(config.latent, len(dataset.classes), channels=images.shape[1], image=images.shape[-1])
    recipe = GanRecipe(run, config, images, labels, sizes, short=True)
    train(run, recipe)
    network = recipe.averaged_generator(labels)
    card = {
        **cards.fields("conditional-generator", network, labels=dataset.classes),
        "title": f"Generates images of {', '.join(dataset.classes)}"[:200],
        "data": dataset.data,
        "notes": (
            f"{dataset.describe_classes()}; trained on {len(images):,} of these images. The generator's weights "
            f"are an average over steps. {len(dataset.skipped):,} files were skipped."
        ),
    }
    publish(run, card, network, lambda sampler, part: measure(sampler, dataset, part))


if __name__ == "__main__":
    run_command(main)
