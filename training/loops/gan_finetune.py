"""Train image generators on your own images: ``python -m training.gan --images``.

The name of each sub-folder is a label. The images of a folder without sub-folders have a single label, the name of the
model. The Frechet distance is not measured, because there is no reference classifier for your images. The metrics show
whether samples are copies of training images. With several labels, they also show whether a classifier that was trained
on the real images recognises the requested labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.networks.gan import ConditionalGenerator, ConditionalSizes
from app.tasks.image_generation import ImageSampler
from training.configs import SAMPLE_CLASSIFIER, ConditionalGanConfig
from training.data import image_folders
from training.data.datasets import DataError
from training.data.image_dataset import ImageDataset, keep_trainable, print_summary
from training.evaluation import generation
from training.evaluation.calibration import accuracy_of
from training.evaluation.generation import CLASSIFIER_WIDTHS, class_rows, label_classifier, nearest_distances
from training.loops import distributed, time_budget
from training.loops import gan as gan_loop
from training.loops.gan import conditional_trainer, fit, save_grid
from training.options import Options, Part
from training.run import Run, metric

MIN_IMAGES = 64  # smallest number of different images
SAMPLES = 1000  # number of generated images that are evaluated
MAX_HELD_OUT = 2000  # largest number of real images that are evaluated
# Limits with --minutes, so that a short training does not spend most of its time on the evaluation.
CLASSIFIER_STEPS_PER_MINUTE = 600
COMPARED_PER_MINUTE = 20_000  # training images with which each sample is compared
MIN_RECALIBRATION_BATCHES, RECALIBRATION_BATCHES_PER_MINUTE = 20, 40


def read(path: Path, side: int, colour: str, name: str) -> ImageDataset:
    """Read the images. ``colour`` is "grey", "rgb" or "auto"; "auto" means grey if all images are grey.

    Raises DataError if there are not enough different images, or if images have several labels.
    """
    dataset = image_folders.read(path, side, 1 if colour == "grey" else 3, name)
    if dataset.multi_label:
        raise DataError(f"{path} has several labels for an image, but image generators need one: a column label")
    dataset = keep_trainable(dataset, path, 1)
    if len(dataset.labels) < MIN_IMAGES:
        raise DataError(f"{path} holds {dataset.describe_classes()}: at least {MIN_IMAGES} different images are needed")
    if colour == "auto" and bool((dataset.images == dataset.images[:, :1]).all()):
        return replace(dataset, images=dataset.images[:, :1].contiguous())
    return dataset


@dataclass(frozen=True)
class Reference:
    """Real images that samples are compared with. Some of them are held out from the training of the generator.

    Attributes:
        dataset: the images.
        classifier_steps: number of training steps of the classifier that checks the labels of samples.
        max_compared: largest number of training images with which each sample is compared.
        part: "test", or "validation" to leave out the images of the test part.
    """

    dataset: ImageDataset
    classifier_steps: int
    max_compared: int
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
    def compared(self) -> Tensor:
        """Return the training images with which each sample is compared."""
        return at_most(self.max_compared, self.train[0])

    @cached_property
    def distance(self) -> Tensor:
        """Return the median distance from a held-out image to the nearest training image."""
        return nearest_distances(self.held_out[0], self.compared).median()

    @cached_property
    def classifier(self) -> Any:
        """Return a classifier that was trained on the real images."""
        return label_classifier(*self.train, len(self.dataset.classes), self.classifier_steps)

    @cached_property
    def accuracy(self) -> float:
        """Return the accuracy of the classifier on the held-out images."""
        return accuracy_of(self.classifier, *self.held_out)

    def prepare(self) -> None:
        """Compute and cache the values that the evaluation of every generator needs."""
        _ = self.distance, len(self.dataset.classes) > 1 and self.accuracy


def reference(options: Options, dataset: ImageDataset) -> Reference:
    """Return the real images for the evaluation. With ``--minutes``, the work of the evaluation is limited."""
    steps, minutes = generation.LABEL_CLASSIFIER_STEPS, options.minutes
    if minutes is None:
        return Reference(dataset, steps, len(dataset.labels), options.part)
    steps = min(steps, 1 + int(CLASSIFIER_STEPS_PER_MINUTE * minutes))
    return Reference(dataset, steps, 1 + int(COMPARED_PER_MINUTE * minutes), options.part)


def at_most(count: int, tensor: Tensor) -> Tensor:
    """Return at most ``count`` entries of the first dimension, evenly spaced."""
    return tensor[:: max(1, -(-len(tensor) // count))]


def recalibration_batches(options: Options) -> int:
    """Return the number of batches that give the final statistics of the batch norms."""
    if options.minutes is None:
        return gan_loop.RECALIBRATION_BATCHES
    planned = max(MIN_RECALIBRATION_BATCHES, int(RECALIBRATION_BATCHES_PER_MINUTE * options.minutes))
    return min(gan_loop.RECALIBRATION_BATCHES, planned)


def measure(sampler: ImageSampler, real: Reference) -> dict[str, Any]:
    """Return the metrics of a published generator, relative to real images that it was not trained on."""
    latents = sampler.parse(SAMPLES, None, 0)
    samples = torch.from_numpy(sampler.predict([latents])[0])
    held_out = len(real.held_out[1])
    ratio = nearest_distances(samples, real.compared).median() / real.distance
    split = (
        f"median pixel distance to the nearest of {len(real.compared):,} training images: {SAMPLES:,} samples over "
        f"{held_out:,} others"
    )
    metrics = {"nearest_neighbour_ratio": metric(ratio.item(), split, 3)}
    if len(real.dataset.classes) == 1:
        return metrics
    by = (
        f"classified by a {SAMPLE_CLASSIFIER.kind} {CLASSIFIER_WIDTHS} trained for {real.classifier_steps:,} steps on "
        f"{len(real.train[1]):,} real images"
    )
    accuracy = accuracy_of(real.classifier, samples, torch.as_tensor(latents.classes))
    return metrics | {
        "label_accuracy": metric(accuracy, f"{SAMPLES:,} samples of seed 0, {by}", 2),
        "label_accuracy_of_real": metric(real.accuracy, f"{held_out:,} other real images, {by}", 2),
    }


def train(options: Options, config: ConditionalGanConfig, argv: Sequence[str] | None) -> None:
    """Train a generator on your own images, evaluate it and publish it."""
    dataset = read(
        options.data_options["images"], options.data_options["size"], options.data_options["colour"], options.name
    )
    print_summary(dataset)
    distributed.print_once(f"the images are {'grey' if dataset.images.shape[1] == 1 else 'coloured'}")
    run = Run(options, config, argv, dataset.sha256)
    run.write_file("skipped.txt", "".join(f"{reason}\n" for reason in dataset.skipped))
    real = reference(options, dataset)
    images, labels = (part.to(options.device) for part in real.train)
    config = replace(config, batch=distributed.divisible_batch(min(config.batch, len(images))))
    sizes = ConditionalSizes(config.latent, len(dataset.classes), channels=images.shape[1], image=images.shape[-1])

    def start_dummy_run() -> Callable[[int], object]:
        other = conditional_trainer(config, options.device, sizes)
        real = images[: config.batch].float() / 127.5 - 1
        return lambda step: other.update(real, labels[: config.batch], step, config.learning_rate)

    per_epoch = len(images) // config.batch
    batches = recalibration_batches(options)

    def timed_evaluation() -> float:
        # Only the first process calls this function, so it must not create a trainer, which waits for all processes.
        network = ConditionalGenerator(sizes).to(options.device)
        publish(run, real, gan_loop.recalibrate_batchnorm(network, batches, labels))
        return 0.0

    if options.minutes is not None and distributed.rank() == 0:
        real.prepare()  # cached now, because the time of an evaluation is measured next
    budget = time_budget.plan(run, config.epochs * per_epoch, start_dummy_run, timed_evaluation)
    torch.manual_seed(options.seed)  # the same initial weights with and without --minutes
    ema_decay = max(0.0, min(config.ema_decay, 1 - 20 / budget.steps))  # the average covers at most 5 % of a short run
    trainer = conditional_trainer(replace(config, ema_decay=ema_decay), options.device, sizes)
    fit(run, trainer, images, labels, budget)
    if distributed.rank() == 0:
        publish(run, real, trainer.averaged_generator(batches, labels))
    distributed.exit_process()


def publish(run: Run, real: Reference, network: Any) -> None:
    """Evaluate the generator with the serving code, write its card, and publish it."""
    sizes, dataset = network.sizes, real.dataset
    card = {
        "task": "sample",
        "title": f"Generates images of {', '.join(dataset.classes)}"[:200],
        "kind": "conditional-generator",
        "sizes": asdict(sizes),
        "inputs": [
            {"name": "latents", "dtype": "float64", "shape": [-1, sizes.latent]},
            {"name": "classes", "dtype": "int64", "shape": [-1]},
        ],
        "outputs": [{"name": "images", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "labels": dataset.classes,
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
    run.finish(card, network, {"curves.png": run.plot_curves(), "samples.png": samples})
