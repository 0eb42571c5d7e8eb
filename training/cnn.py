"""Train an image classifier.

    quartet train cnn                     # preset workshop: cifar10-lenet, the workshop's CNN on CIFAR-10
    quartet train cnn --preset digits     # mnist-judge, an MNIST classifier that evaluates the GANs
    quartet train cnn --preset strong     # cifar10-whitened, on CIFAR-10 with the recipe of airbench95
    quartet train cnn --preset accurate   # cifar10-accurate, with the recipe of airbench96 and corrupted images
    quartet train cnn --images DIR --name pets   # preset own: your images, one sub-folder per class

docs/measurements.md and the model cards contain the measured results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from app import store
from app.networks import build
from app.networks.cnn import WhitenedNet, WhitenedNetSizes
from app.tasks.classification import ImageClassifier
from training import cards
from training.configs.classifiers import CNN_PRESETS, AirbenchConfig, CnnConfig, CnnFinetuneConfig
from training.configs.numbers import Described
from training.data import datasets as data
from training.data.datasets import DataError
from training.data.image_dataset import ImageDataset, keep_trainable, print_summary
from training.data.image_folders import largest_side, read
from training.evaluation.calibration import (
    calibrated_metrics,
    classification_metrics,
    fit_temperatures,
    served_probabilities,
)
from training.evaluation.image_classifier import measure, plot_samples
from training.loops import airbench, cnn_finetune
from training.loops.classifier import AveragedClassifier, ClassifierRecipe
from training.loops.fit import Batches, fit
from training.loops.photos import pretrained
from training.loops.photos import train as photos
from training.options import Name, Options, Refit, base_version, flags, parse_options
from training.publishing import read_run
from training.run import Run, run_command


class CnnOptions(Described):
    """The options for the user's images."""

    images: Path | None = None
    """folder of images, or CSV file. A folder has one sub-folder per class, or the folders train, val and test with one
    sub-folder per class each, or images with the class in the file name (cat.0.jpg). A CSV file has the columns
    path,label or, for several labels per image, path,labels"""
    origin: Name | None = Field(None, alias="from")
    """network to fine-tune: efficientnet-lite0, or a published network as NAME or NAME@VERSION; scratch: start from
    random weights. Default: efficientnet-lite0 if --size is above 64, otherwise cifar10-whitened"""
    size: Annotated[int, Field(multiple_of=32, ge=32, le=512)] | None = None
    """resize images to N x N pixels. N is 32 or 64 or, with efficientnet-lite0, 96 to 512 in steps of 32. Default: the
    size of the network in --from; without --from, 224 if most images are larger than 64 pixels, otherwise 32"""
    group: str | None = None
    """keep related images, such as frames of one video, in the same part of the split. Images are related if this
    regular expression matches the same text in their paths. If it has a group (...), only the text of the group
    counts"""
    calibration: Path | None = None
    """presets strong and accurate: use the calibration of this finished run, which had the same recipe with another
    seed and held out more images"""
    refit: Refit = False


SHOWN = 24  # images in samples.png
SMALLEST_SIDE = 32
SMALL_SIDE = 64  # the largest side in pixels for whitened-net
PHOTO_SIDE = 224
NAMES = {
    "workshop": "cifar10-lenet",
    "digits": "mnist-judge",
    "strong": "cifar10-whitened",
    "accurate": "cifar10-accurate",
}
TITLES = {
    "lenet": "The workshop's CNN: two convolutions and three linear layers, for the ten classes of CIFAR-10",
    "digit-net": "Classifies handwritten digits; rates the images of the GANs",
    "whitened-net": "Convolutions, the first of which whitens, for the ten classes of CIFAR-10",
}


def evaluate(classifier: ImageClassifier, validation: int | None = None) -> dict[str, Any]:
    """Return the metrics on the test part of the data set, or on ``validation`` images held out from training."""
    part, images, labels = getattr(data, next(iter(classifier.card.data)))().measured(validation)
    if not len(labels):
        return {}
    split = f"{part}, {len(labels):,} images"
    probability = served_probabilities(classifier, images)
    if not isinstance(classifier.network, WhitenedNet):
        return classification_metrics(probability, labels, split)
    classifier.tta = True
    views = served_probabilities(classifier, images)
    classifier.tta = False
    return calibrated_metrics(probability, labels, split) | calibrated_metrics(
        views, labels, f"{split}, 6 views", "_views"
    )


def read_own(options: Options, config: Any, card: store.Card) -> ImageDataset:
    """Read the images of the user that a version was trained on."""
    return read_dataset(options, card.sizes["image"])


measure_own = measure


def fit_images(
    run: Run, recipe: Callable[..., ClassifierRecipe], config: Any, images: data.Images, network: nn.Module
) -> tuple[Any, Tensor, Tensor]:
    """Train on public images for ``config.epochs`` epochs; return the recipe, and the validation images and labels."""
    train, validation = images.split_validation(config.validation)
    on_device = (part.to(run.options.device) for part in (images.train_images, images.train_labels))
    batches = Batches(train, config.batch, run.options.seed)
    trained = recipe(config, network, *on_device, batches, validation)
    fit(run, trained, run.budget(config.epochs * batches.per_epoch), config.epochs)
    return trained, trained.images[validation], trained.labels[validation]


def read_calibration(options: Options, config: Any, images: data.Images) -> tuple[store.Card | None, Any]:
    """Return the card and the network of the run in ``--calibration``, or None. Raises DataError for another recipe."""
    folder: Path | None = options.calibration
    if folder is None:
        return None, None
    card, network, own = read_run(folder, "--calibration")
    expected = config.model_dump(exclude={"validation"}) | {"data": images.sha256}
    own["data"] = card.data.get(images.name)
    if wrong := [key for key, value in expected.items() if own.get(key) != value]:
        raise DataError(f"--calibration {folder}: this run had another {', '.join(wrong)}")
    return card, network


def train_airbench(run: Run, config: AirbenchConfig, images: data.Images, device: str, calibrated: Any) -> WhitenedNet:
    """Train the whitened network with the recipe of airbench95 or 96, calibrate it, and return it.

    The temperatures are fitted to the held-out images, or are those of the network ``calibrated``.
    """
    widths = (config.first_width, config.second_width, config.third_width)
    sizes = WhitenedNetSizes(widths=widths, label_smoothing=config.label_smoothing, depth=config.depth)
    network = WhitenedNet(sizes)
    train, _ = images.split_validation(config.validation)
    airbench.whiten(network, images.train_images[train[:5000]])
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    _, held_out, labels = fit_images(run, airbench.AirbenchRecipe, config, images, network)
    wide = [layer for layer in network.groups.modules() if isinstance(layer, nn.Conv2d) and config.float16]
    for layer in wide:  # fit the temperatures with the rounded weights
        layer.half().float()
    if calibrated is None:
        smoothings = [round(step / 20 * config.label_smoothing, 6) for step in range(41)]  # to twice that of training
        fit_temperatures(network, held_out, labels, smoothings)
    else:
        network.temperature.copy_(calibrated.temperature)
        network.views_temperature.copy_(calibrated.views_temperature)
        network.sizes = replace(network.sizes, label_smoothing=calibrated.sizes.label_smoothing)
    for layer in wide:  # so that the weights file contains float16
        layer.half()
    return network


def airbench_notes(config: AirbenchConfig, network: WhitenedNet, calibration: store.Card | None) -> str:
    """Return the notes for the model card. ``calibration`` is the card of the network that was calibrated instead."""
    fitted = "and calibration."
    if calibration:
        seed, count = calibration.seed, calibration.held_out
        fitted = f"The calibration was fitted to {count:,} images that a training with seed {seed} held out."
    notes = [
        f"{config.validation:,} training images were held out for validation{'.' if calibration else ''} {fitted}",
        "6 views: the image and two copies shifted by one pixel, each also mirrored.",
        f"The probabilities are corrected for a label smoothing of {network.sizes.label_smoothing:g}, which was fitted "
        f"with the temperatures. The label smoothing in training was {config.label_smoothing:g}.",
    ]
    return " ".join(notes)


def arguments(argv: Sequence[str] | None) -> tuple[Options, CnnConfig | AirbenchConfig | CnnFinetuneConfig]:
    """Parse the command line; return the options, and the preset's config with all overrides."""
    options, config = parse_options("training.cnn", __doc__ or "", CNN_PRESETS, NAMES, argv, flags(CnnOptions))
    if options.calibration and not isinstance(config, AirbenchConfig):
        raise SystemExit(f"--calibration cannot be combined with --preset {options.preset}; use strong or accurate")
    return options, config


def image_side(options: Options) -> int:
    """Return the side length to which the user's images are resized. Raises DataError if --from is not usable."""
    path: Path = options.images
    side: int | None = options.size
    origin: str | None = options.origin
    if side is not None and side <= SMALL_SIDE and origin == pretrained.NAME:
        raise DataError(f"--from {origin} needs --size {SMALL_SIDE + 32} or more, not --size {side}")
    if side is None and origin in (None, pretrained.NAME):
        side = PHOTO_SIDE if origin or largest_side(path) > SMALL_SIDE else SMALLEST_SIDE
    if side is None and (base := base_version(options, ("whitened-net", "efficientnet-lite"))) is not None:
        side = base.card.sizes["image"]
    return side or SMALLEST_SIDE


def read_dataset(options: Options, side: int) -> ImageDataset:
    """Read the user's images, and skip classes with too few images. Raises DataError if the images cannot be used."""
    path: Path = options.images
    dataset = keep_trainable(read(path, side, group=options.group), path)
    if dataset.multi_label and side <= SMALL_SIDE:
        raise DataError(f"{path} has several labels for an image, which needs --size {PHOTO_SIDE}; the size is {side}")
    return dataset


def main(argv: Sequence[str] | None = None) -> None:
    options, config = arguments(argv)
    if isinstance(config, CnnFinetuneConfig):
        side = image_side(options)
        dataset = read_dataset(options, side)
        print_summary(dataset)
        if options.preview:
            return
        if side > SMALL_SIDE:
            photos.train(options, config, argv, dataset)
        else:
            cnn_finetune.train(options, config, argv, dataset)
        return
    images: data.Images = getattr(data, config.data)()
    if config.batch > (left := len(images.train_labels) - config.validation):
        sys.exit(f"batch is {config.batch:,}, but there are only {left:,} training images")
    calibration, calibrated = read_calibration(options, config, images)
    run = Run(options, config, argv)
    if isinstance(config, AirbenchConfig):
        whitened = train_airbench(run, config, images, options.device, calibrated)
        network: nn.Module = whitened
        notes = airbench_notes(config, whitened, calibration)
    else:
        network = build(config.kind, {}).to(options.device)
        network = fit_images(run, AveragedClassifier, config, images, network)[0].average.module
        notes = (
            f"{config.validation:,} training images were held out for validation. The weights are averaged over steps."
        )
    publish(run, config, images, network, notes, calibration)


def publish(
    run: Run,
    config: CnnConfig | AirbenchConfig,
    images: data.Images,
    network: Any,
    notes: str,
    calibration: store.Card | None,
) -> None:
    """Evaluate the network with the serving code, write its model card, and publish it."""
    name = f"{calibration.name}, seed {calibration.seed}" if calibration else ""
    validation = config.validation if run.options.part == "validation" else None
    card = {
        **cards.fields(config.kind, network, labels=images.labels),
        "title": TITLES[config.kind],
        "data": {images.name: images.sha256},
        "ancestors": cards.ancestors(calibration, "calibration", name) if calibration else None,
        "held_out": config.validation,
        "notes": notes,
    }
    _, held_out, _ = images.measured(config.validation)
    card, classifier = run.measure(
        card, network, lambda classifier, _: evaluate(classifier, validation), examples=held_out.split(100)
    )
    _, shown, truth = images.measured(validation)
    probability = torch.tensor(classifier.predict(list(shown[:SHOWN])))
    run.finish(
        card, network, plot_samples(run.folder / "samples.png", shown[:SHOWN], images.labels, probability, truth)
    )


if __name__ == "__main__":
    run_command(main)
