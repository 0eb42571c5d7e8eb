"""Image generators for own images: ``python -m training.gan --images``.

Sub-folders are labels. A folder without sub-folders is one label, named like the model. There is no reference
classifier of own images, so there is no Frechet distance. The metrics say whether samples are copies of training
images, and, with several labels, whether a classifier trained on the real images recognises the requested labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.networks.gan import ConditionalSizes
from app.tasks.image_generation import ImageSampler
from training.configs import SAMPLE_CLASSIFIER, ConditionalGanConfig
from training.data import image_folders
from training.data.datasets import DataError
from training.data.image_batches import accuracy_of
from training.data.image_dataset import ImageDataset, keep_trainable, print_summary
from training.evaluation.generation import CLASSIFIER_WIDTHS, class_rows, label_classifier, nearest_distances
from training.loops import distributed, time_budget
from training.loops.gan import conditional_trainer, fit, save_sheet
from training.options import Options
from training.run import Run, metric

MIN_IMAGES = 64  # different images in total
SAMPLES = 1000  # generated images that are evaluated


def read(path: Path, side: int, colour: str, name: str) -> ImageDataset:
    """Read the images; ``colour`` is grey, rgb, or auto: grey if all images are grey. Raises DataError."""
    dataset = image_folders.read(path, side, 1 if colour == "grey" else 3, name)
    dataset = keep_trainable(dataset, path, 1)
    if len(dataset.labels) < MIN_IMAGES:
        raise DataError(f"{path} holds {dataset.describe_classes()}: at least {MIN_IMAGES} different images are needed")
    if colour == "auto" and bool((dataset.images == dataset.images[:, :1]).all()):
        return replace(dataset, images=dataset.images[:, :1].contiguous())
    return dataset


def measure(sampler: ImageSampler, dataset: ImageDataset) -> dict[str, Any]:
    """The metrics of a published generator, compared with the images that were not used in its training."""
    train, validation, test = dataset.split()
    held_out = torch.cat([validation, test])
    latents = sampler.parse(SAMPLES, None, 0)
    samples = torch.from_numpy(sampler.predict([latents])[0])
    train_images, other_images = dataset.images[train], dataset.images[held_out]
    ratio = nearest_distances(samples, train_images).median() / nearest_distances(other_images, train_images).median()
    split = f"median pixel distance to the nearest training image: {SAMPLES:,} samples over {len(held_out):,} others"
    metrics = {"nearest_neighbour_ratio": metric(ratio.item(), split, 3)}
    if len(dataset.classes) == 1:
        return metrics
    network = label_classifier(train_images, dataset.labels[train], len(dataset.classes))
    by = f"classified by a {SAMPLE_CLASSIFIER.kind} {CLASSIFIER_WIDTHS} trained on {len(train):,} real images"
    accuracy = accuracy_of(network, samples, torch.as_tensor(latents.classes))
    real_accuracy = accuracy_of(network, other_images, dataset.labels[held_out])
    return metrics | {
        "label_accuracy": metric(accuracy, f"{SAMPLES:,} samples of seed 0, {by}", 2),
        "label_accuracy_of_real": metric(real_accuracy, f"{len(held_out):,} other real images, {by}", 2),
    }


def train(options: Options, config: ConditionalGanConfig, argv: Sequence[str] | None) -> None:
    """Train on own images and publish."""
    dataset = read(
        options.data_options["images"], options.data_options["size"], options.data_options["colour"], options.name
    )
    print_summary(dataset)
    distributed.print_once(f"the images are {'grey' if dataset.images.shape[1] == 1 else 'coloured'}")
    run = Run(options, config, argv, dataset.sha256)
    run.write_file("skipped.txt", "".join(f"{reason}\n" for reason in dataset.skipped))
    train_indices = dataset.split()[0]
    images, labels = dataset.images[train_indices].to(options.device), dataset.labels[train_indices].to(options.device)
    config = replace(config, batch=distributed.divisible_batch(min(config.batch, len(train_indices))))
    sizes = ConditionalSizes(config.latent, len(dataset.classes), channels=images.shape[1], image=images.shape[-1])

    def start_dummy_run() -> Callable[[int], object]:
        other = conditional_trainer(config, options.device, sizes)
        real = images[: config.batch].float() / 127.5 - 1
        return lambda step: other.update(real, labels[: config.batch], step, config.learning_rate)

    per_epoch = len(train_indices) // config.batch

    def rehearse() -> float:
        publish(run, dataset, conditional_trainer(config, options.device, sizes).averaged_generator())
        return 0.0

    budget = time_budget.plan(run, config.epochs * per_epoch, start_dummy_run, rehearse)
    torch.manual_seed(options.seed)  # the same initial weights with and without --minutes
    ema_decay = max(0.0, min(config.ema_decay, 1 - 20 / budget.steps))  # covers at most 5 % of a short run
    trainer = conditional_trainer(replace(config, ema_decay=ema_decay), options.device, sizes)
    fit(run, trainer, images, labels, budget)
    if distributed.rank() == 0:
        publish(run, dataset, trainer.averaged_generator())
    distributed.exit_process()


def publish(run: Run, dataset: ImageDataset, network: Any) -> None:
    """Evaluate with the serving code, write the card, and publish."""
    sizes = network.sizes
    train_indices = dataset.split()[0]
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
        "data": {f"images:{dataset.name}": dataset.sha256},
        "notes": (
            f"{dataset.describe_classes()}; trained on {len(train_indices):,} of these images. The generator's weights "
            f"are an average over steps. {len(dataset.skipped):,} files were skipped."
        ),
    }
    sampler = run.predictor(ImageSampler, card, network)
    card["metrics"] = measure(sampler, dataset)
    pixels: np.ndarray = sampler.predict([class_rows(sampler, 10)])[0]
    samples = save_sheet(run.folder / "samples.png", pixels, 10)
    run.finish(card, network, {"curves.png": run.plot_curves(), "samples.png": samples})
