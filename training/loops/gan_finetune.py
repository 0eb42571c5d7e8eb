"""The caller's own images, drawn: the training of ``python -m training.gan --images``, its figures and its pictures.

Sub-folders are labels that can be asked for; a folder without any is one label, named like the model. There is no judge
of such images, so no Frechet distance: what can be told is whether samples are copies of what was learnt, and, of
several labels, whether a classifier that learnt from the real images reads them as what was asked for.
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
from training.data.image_folders import ImageDataset
from training.evaluation.generation import CLASSIFIER_WIDTHS, class_rows, label_classifier, nearest_distances
from training.loops import distributed, time_budget
from training.loops.gan import conditional_trainer, fit, save_sheet
from training.options import Options
from training.run import Run, metric

MIN_IMAGES = 64  # different images in all
SAMPLES = 1000  # samples that are measured


def read(path: Path, side: int, colour: str, name: str) -> ImageDataset:
    """The images, grey where ``colour`` says so, or says auto and none has another. Raises DataError."""
    pictures = image_folders.read(path, side, 1 if colour == "grey" else 3, name)
    image_folders.check_trainable(pictures, path, 1)
    if len(pictures.labels) < MIN_IMAGES:
        raise DataError(
            f"{path} holds {pictures.describe_classes()}: to draw such images it takes {MIN_IMAGES} different ones"
        )
    if colour == "auto" and bool((pictures.images == pictures.images[:, :1]).all()):
        return replace(pictures, images=pictures.images[:, :1].contiguous())
    return pictures


def measure(sampler: ImageSampler, pictures: ImageDataset) -> dict[str, Any]:
    """The figures of a published generator, against pictures that took no part in its training."""
    learn, validate, test = pictures.split()
    strange = torch.cat([validate, test])
    drawing = sampler.parse(SAMPLES, None, 0)
    samples = torch.from_numpy(sampler.predict([drawing])[0])
    known, others = pictures.images[learn], pictures.images[strange]
    ratio = nearest_distances(samples, known).median() / nearest_distances(others, known).median()
    told = f"median pixel distance to the nearest image learnt from: {SAMPLES:,} samples over {len(strange):,} others"
    found = {"nearest_neighbour_ratio": metric(ratio.item(), told, 3)}
    if len(pictures.classes) == 1:
        return found
    network = label_classifier(known, pictures.labels[learn], len(pictures.classes))
    asked = torch.as_tensor(drawing.classes)
    by = f"by a {SAMPLE_CLASSIFIER.kind} {CLASSIFIER_WIDTHS} that learnt from {len(learn):,} real images"
    return found | {
        "label_accuracy": metric(
            accuracy_of(network, samples, asked), f"{SAMPLES:,} samples of seed 0, read as what was asked for {by}", 2
        ),
        "label_accuracy_of_real": metric(
            accuracy_of(network, others, pictures.labels[strange]), f"{len(strange):,} other real images, {by}", 2
        ),
    }


def train(chosen: Options, config: ConditionalGanConfig, argv: Sequence[str] | None) -> None:
    """Read, play, measure, publish."""
    pictures = read(
        chosen.data_options["images"], chosen.data_options["size"], chosen.data_options["colour"], chosen.name
    )
    image_folders.print_summary(pictures)
    distributed.print_once("they are grey" if pictures.images.shape[1] == 1 else "they are coloured")
    run = Run(chosen, config, argv, pictures.sha256)
    run.write_file("left-out.txt", "".join(f"{remark}\n" for remark in pictures.skipped))
    learn = pictures.split()[0]
    images, labels = pictures.images[learn].to(chosen.device), pictures.labels[learn].to(chosen.device)
    config = replace(config, batch=distributed.divisible_batch(min(config.batch, len(learn))))
    sizes = ConditionalSizes(config.latent, len(pictures.classes), channels=images.shape[1], image=images.shape[-1])

    def trial() -> Callable[[int], object]:
        other = conditional_trainer(config, chosen.device, sizes)
        real = images[: config.batch].float() / 127.5 - 1
        return lambda step: other.update(real, labels[: config.batch], step, config.learning_rate)

    per_epoch = len(learn) // config.batch
    epochs = time_budget.epochs_within_budget(run, per_epoch, config.epochs, trial)
    torch.manual_seed(chosen.seed)  # the same weights, whether steps were timed or not
    average = max(0.0, min(config.ema_decay, 1 - 20 / (epochs * per_epoch)))  # not older than the training
    trainer = conditional_trainer(replace(config, ema_decay=average), chosen.device, sizes)
    fit(run, trainer, images, labels, epochs)
    if distributed.rank() == 0:
        publish(run, pictures, trainer.averaged_generator())
    distributed.exit_process()


def publish(run: Run, pictures: ImageDataset, network: Any) -> None:
    """Measure with the code that serves, and write the card."""
    sizes = network.sizes
    learn = pictures.split()[0]
    card = {
        "task": "sample",
        "title": f"Draws images of {', '.join(pictures.classes)}"[:200],
        "kind": "conditional-generator",
        "sizes": asdict(sizes),
        "inputs": [
            {"name": "latents", "dtype": "float64", "shape": [-1, sizes.latent]},
            {"name": "classes", "dtype": "int64", "shape": [-1]},
        ],
        "outputs": [{"name": "images", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "labels": pictures.classes,
        "data": {f"images:{pictures.name}": pictures.sha256},
        "notes": (
            f"{pictures.describe_classes()}; trained on {len(learn):,} of these images. The generator's weights are an "
            f"average over steps. {len(pictures.skipped):,} files were skipped."
        ),
    }
    sampler = run.predictor(ImageSampler, card, network)
    card["metrics"] = measure(sampler, pictures)
    pixels: np.ndarray = sampler.predict([class_rows(sampler, 10)])[0]
    samples = save_sheet(run.folder / "samples.png", pixels, 10)
    run.finish(card, network, {"curves.png": run.plot_curves(), "samples.png": samples})
