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
from collections.abc import Sequence
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
from training.loops.fit import fit
from training.loops.gan import PREVIEWS, GanRecipe, save_grid
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
    """Train a generator on MNIST or on the user's images, evaluate it and publish it."""
    options, config = arguments(argv)
    is_own, conditional = options.preset == "own", isinstance(config, ConditionalGanConfig)
    data: Any = read_own(options, config) if is_own else datasets.mnist()
    if is_own:
        print_summary(data)
        print(f"the images are {'grey' if data.images.shape[1] == 1 else 'coloured'}")
        if options.preview:
            return
        used, classes = data.split()[0], data.classes
        images, labels = data.images[used], data.labels[used]
    else:
        images, labels, classes = data.train_images, data.train_labels, data.labels
        if options.part == "validation":  # the samples are compared with the other training images
            used, _ = data.split_validation(limits().unseen_images)
            images, labels = images[used], labels[used]
        if config.batch > len(labels):
            sys.exit(f"batch is {config.batch:,}, but there are only {len(labels):,} training images")
    run = Run(options, config, argv, data.sha256 if is_own else None)
    images, labels = images.to(options.device), labels.to(options.device)
    kind = "conditional-generator" if conditional else "gan-generator"
    title, notes = TITLES[kind], "The generator's weights are an average over steps"
    if is_own:
        run.write_lines("skipped.txt", data.skipped)
        title, digests = f"Generates images of {', '.join(classes)}"[:200], data.data
        notes = f"{data.describe_classes()}; trained on {len(images):,} of these images. {notes}"
        notes = f"{notes}. {len(data.skipped):,} files were skipped."

        def evaluate(sampler: ImageSampler, part: Part) -> dict[str, Any]:
            return measure(sampler, data, part)
    else:
        # The classifier is loaded before the training, so that the command fails early if the classifier is missing.
        classifier = generation.load_reference_classifier(options.store, options.device)
        label = f"{generation.REFERENCE_CLASSIFIER}@{classifier.card.version}"
        digests = {data.name: data.sha256, label: classifier.card.weights_sha256}
        notes = f"{notes}. The classifier was used for evaluation only."

        def evaluate(sampler: ImageSampler, part: Part) -> dict[str, Any]:
            return generation.evaluate(sampler, classifier, part)

    sizes = ConditionalSizes(config.latent, len(classes), channels=images.shape[1], image=images.shape[-1])
    recipe = GanRecipe(
        run, config, images, labels if conditional else None, sizes if conditional else None, short=is_own
    )
    fit(run, recipe, run.budget(config.epochs * recipe.batches.per_epoch), PREVIEWS)
    network = recipe.averaged_generator(labels if is_own else None)
    fields = cards.fields(kind, network, labels=classes if conditional else None)
    card = {**fields, "title": title, "data": digests, "notes": notes}
    card, sampler = run.measure(card, network, evaluate)
    drawing = class_rows(sampler) if conditional else sampler.parse(64, None, 0)
    pixels = sampler.predict([drawing])[0]
    run.finish(card, network, save_grid(run.folder / "samples.png", pixels, 10 if conditional else None))


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


def read_own(options: Options, config: GanConfig, card: store.Card | None = None) -> ImageDataset:
    """Read the images of the user that a generator was trained on."""
    return read(options.images, options.size, options.name)


if __name__ == "__main__":
    run_command(main)
