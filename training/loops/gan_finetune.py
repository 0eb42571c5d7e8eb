"""Train image generators on your own images: ``quartet train gan --images``.

The name of each sub-folder is a label. The images of a folder without sub-folders have a single label, the name of the
model. The Frechet distance is not measured, because there is no reference classifier for your images. The metrics show
whether samples are copies of training images. With several labels, they also show whether a classifier that was trained
on the real images recognises the requested labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.networks.gan import ConditionalSizes
from app.tasks.image_generation import ImageSampler
from training import cards
from training.configs.classifiers import SAMPLE_CLASSIFIER
from training.configs.generators import ConditionalGanConfig
from training.data import image_folders
from training.data.datasets import DataError
from training.data.image_dataset import ImageDataset, keep_trainable, print_summary
from training.evaluation.calibration import accuracy_of
from training.evaluation.generation import CLASSIFIER_WIDTHS, class_rows, label_classifier, nearest_distances
from training.limits import limits
from training.loops import gan
from training.loops.gan import save_grid
from training.options import Options, Part
from training.run import Run, metric

MIN_IMAGES = 64  # smallest number of different images
SAMPLES = 1000  # number of generated images that are evaluated
MAX_HELD_OUT = 2000  # largest number of real images that are evaluated


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


@dataclass(frozen=True)
class Reference:
    """Real images that samples are compared with. Some of them are held out from the training of the generator.

    Attributes:
        dataset: the images.
        part: "test", or "validation" to leave out the images of the test part.
    """

    dataset: ImageDataset
    part: Part

    @property
    def sha256(self) -> str:
        """Return the digest of the images and their labels."""
        return self.dataset.sha256

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        """Return the training images [N, C, S, S] and their labels [N]."""
        indices = self.dataset.split()[0]
        return self.dataset.images[indices], self.dataset.labels[indices]

    @cached_property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return at most MAX_HELD_OUT images that are not used for training, and their labels."""
        _, validation, test = self.dataset.split()
        indices = at_most(MAX_HELD_OUT, torch.cat([validation, test]) if self.part == "test" else validation)
        return self.dataset.images[indices], self.dataset.labels[indices]

    @cached_property
    def distance(self) -> Tensor:
        """Return the median distance from a held-out image to the nearest training image."""
        return nearest_distances(self.held_out[0], self.train[0]).median()

    @cached_property
    def classifier(self) -> Any:
        """Return a classifier that was trained on the real images."""
        return label_classifier(*self.train, len(self.dataset.classes), limits().label_classifier_steps)

    @cached_property
    def accuracy(self) -> float:
        """Return the accuracy of the classifier on the held-out images."""
        return accuracy_of(self.classifier, *self.held_out)


def at_most(count: int, tensor: Tensor) -> Tensor:
    """Return at most ``count`` entries of the first dimension, evenly spaced."""
    return tensor[:: max(1, -(-len(tensor) // count))]


def measure(sampler: ImageSampler, real: Reference) -> dict[str, Any]:
    """Return the metrics of a published generator, relative to real images that it was not trained on."""
    latents = sampler.parse(SAMPLES, None, 0)
    samples = torch.from_numpy(sampler.predict([latents])[0])
    held_out = len(real.held_out[1])
    ratio = nearest_distances(samples, real.train[0]).median() / real.distance
    split = (
        f"median pixel distance to the nearest of {len(real.train[1]):,} training images: {SAMPLES:,} samples over "
        f"{held_out:,} others"
    )
    metrics = {"nearest_neighbour_ratio": metric(ratio.item(), split, 3)}
    if len(real.dataset.classes) == 1:
        return metrics
    by = (
        f"classified by a {SAMPLE_CLASSIFIER.kind} {CLASSIFIER_WIDTHS} trained for "
        f"{limits().label_classifier_steps:,} steps on {len(real.train[1]):,} real images"
    )
    accuracy = accuracy_of(real.classifier, samples, torch.as_tensor(latents.classes))
    return metrics | {
        "label_accuracy": metric(accuracy, f"{SAMPLES:,} samples of seed 0, {by}", 2),
        "label_accuracy_of_real": metric(real.accuracy, f"{held_out:,} other real images, {by}", 2),
    }


def train(options: Options, config: ConditionalGanConfig, argv: Sequence[str] | None) -> None:
    """Train a generator on your own images, evaluate it and publish it."""
    dataset = read(options.data_options["images"], options.data_options["size"], options.name)
    print_summary(dataset)
    print(f"the images are {'grey' if dataset.images.shape[1] == 1 else 'coloured'}")
    if options.data_options["preview"]:
        return
    run = Run(options, config, argv, dataset.sha256)
    run.write_file("skipped.txt", "".join(f"{reason}\n" for reason in dataset.skipped))
    real = Reference(dataset, options.part)
    images, labels = (part.to(options.device) for part in real.train)
    config = replace(config, batch=min(config.batch, len(images)))
    sizes = ConditionalSizes(config.latent, len(dataset.classes), channels=images.shape[1], image=images.shape[-1])
    recipe = gan.GanRecipe(run, config, images, labels, sizes, short=True)
    gan.train(run, recipe)
    publish(run, real, recipe.averaged_generator(labels))


def publish(run: Run, real: Reference, network: Any) -> None:
    """Evaluate the generator with the serving code, write its card, and publish it."""
    dataset = real.dataset
    card = {
        **cards.generator("conditional-generator", network, dataset.classes),
        "title": f"Generates images of {', '.join(dataset.classes)}"[:200],
        "data": dataset.data,
        "notes": (
            f"{dataset.describe_classes()}; trained on {len(real.train[1]):,} of these images. The generator's weights "
            f"are an average over steps. {len(dataset.skipped):,} files were skipped."
        ),
    }
    sampler = run.predictor(ImageSampler, card, network)
    card = run.measure(card, lambda _: measure(sampler, real))
    pixels: np.ndarray = sampler.predict([class_rows(sampler)])[0]
    samples = save_grid(run.folder / "samples.png", pixels, 10)
    run.finish(card, network, samples)
