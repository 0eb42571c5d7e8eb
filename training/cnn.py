"""Train an image classifier.

    python -m training.cnn                     # the workshop's CNN on CIFAR-10: cifar10-lenet
    python -m training.cnn --preset digits     # the judge of generated digits, on MNIST: mnist-judge
    python -m training.cnn --preset strong     # the recipe of airbench95, narrower and longer: cifar10-whitened
    python -m training.cnn --images DIR --name pets   # your own: a sub-folder for each class, or a CSV of path,label

Measured results stand in the README's table and on each card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.networks import build
from app.networks.cnn import DigitNetSizes, LeNetSizes, WhitenedNet, WhitenedNetSizes, probabilities
from app.tasks.classification import ImageClassifier
from training.configs import CNN_PRESETS, AirbenchConfig, CnnConfig, CnnFinetuneConfig
from training.data import datasets as data
from training.data.image_batches import fit_temperatures, plot_samples, served_probabilities
from training.evaluation.calibration import calibrated_metrics, classification_metrics
from training.evaluation.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from training.loops import airbench, cnn_finetune
from training.loops.classifier import AveragedTrainer, fit
from training.options import Options, parse_options
from training.run import Run, metric

OPTIONS: dict[str, dict[str, Any]] = {
    "--images": {"metavar": "PATH", "type": Path, "help": "a sub-folder for each class, or a CSV of path,label"},
    "--from": {
        "metavar": "NAME",
        "dest": "origin",
        "default": "cifar10-whitened",
        "help": "network to begin with, or scratch",
    },
    "--size": {"type": int, "choices": (32, 64), "default": 32, "help": "pixels of a side that are looked at"},
}
NAMES = {"workshop": "cifar10-lenet", "digits": "mnist-judge", "strong": "cifar10-whitened"}
SIZES = {"lenet": LeNetSizes, "digit-net": DigitNetSizes}
TITLES = {
    "lenet": "The workshop's CNN: two convolutions, three linear layers; ten kinds of things in 32 x 32 pixels",
    "digit-net": "Reads handwritten digits; the judge of the images that the GAN draws",
    "whitened-net": "Seven convolutions, the first of which whitens; ten kinds of things in 32 x 32 pixels",
}
CORRUPTED_IMAGES = 2000  # test images that are also damaged in each of 18 ways


def corruption_metrics(classifier: ImageClassifier, images: Tensor, labels: Tensor, split: str) -> dict[str, Any]:
    """Accuracy in one view on damaged images: of each kind of damage over its strengths, and of all."""
    found: dict[str, Any] = {}
    for kind in CORRUPTIONS:
        guesses = [
            served_probabilities(classifier, corrupt(images, kind, strength)).argmax(dim=1)
            for strength in range(STRENGTHS)
        ]
        right = (torch.stack(guesses) == labels).double().mean().item()
        found[f"accuracy_{kind}"] = metric(right, f"{split}, {kind} in {STRENGTHS} strengths")
    mean = sum(figure["value"] for figure in found.values()) / len(found)
    return {"accuracy_damaged": metric(mean, f"{split}, {len(found)} kinds of damage"), **found}


def evaluate(classifier: ImageClassifier) -> dict[str, Any]:
    """The metrics of a published classifier, on the test part of its data."""
    images = getattr(data, next(iter(classifier.card.data)))()
    split = f"{images.name} test part, {len(images.test_labels):,} images"
    probability, labels, network = (
        served_probabilities(classifier, images.test_images),
        images.test_labels,
        classifier.network,
    )
    if not isinstance(network, WhitenedNet):
        return classification_metrics(probability, labels, split)
    found = calibrated_metrics(probability, network.temperature.item(), labels, split, "")
    with torch.inference_mode():
        parts = [network.views(batch.to(classifier.device)) for batch in images.test_images.split(250)]
    seen = probabilities(torch.cat(parts)).float().cpu()
    found |= calibrated_metrics(seen, network.views_temperature.item(), labels, f"{split}, 6 views", "_views")
    some = slice(CORRUPTED_IMAGES)
    return found | corruption_metrics(
        classifier, images.test_images[some], labels[some], f"{images.name} test part, first {len(labels[some]):,}"
    )


def train_averaged(run: Run, config: CnnConfig, images: data.Images, device: str) -> nn.Module:
    """Train LeNet or the digit network; return the averaged network."""
    train, validation = images.split_validation(config.validation)
    trainer = AveragedTrainer(config, build(config.kind, asdict(SIZES[config.kind]())).to(device))
    train_images, train_labels = images.train_images.to(device), images.train_labels.to(device)
    fit(run, trainer, train_images, train_labels, train, validation, config.batch, config.epochs)
    return trainer.average.module


def train_airbench(run: Run, config: AirbenchConfig, images: data.Images, device: str) -> WhitenedNet:
    """Train the whitened network with the recipe of airbench95; return it with fitted temperatures."""
    train, validation = images.split_validation(config.validation)
    widths = (config.first_width, config.later_width, config.later_width)
    network = WhitenedNet(WhitenedNetSizes(widths=widths, label_smoothing=config.label_smoothing))
    airbench.whiten(network, images.train_images[train[:5000]])
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = airbench.AirbenchTrainer(config, network, len(images.train_labels), run.options.seed)
    train_images, train_labels = images.train_images.to(device), images.train_labels.to(device)
    fit(run, trainer, train_images, train_labels, train, validation, config.batch, config.epochs)
    fit_temperatures(network, train_images[validation], train_labels[validation])
    return network


def arguments(argv: Sequence[str] | None) -> tuple[Options, CnnConfig | AirbenchConfig | CnnFinetuneConfig]:
    """What a command line says."""
    return parse_options("training.cnn", __doc__ or "", CNN_PRESETS, NAMES, argv, OPTIONS)


def main(argv: Sequence[str] | None = None) -> None:
    chosen, config = arguments(argv)
    if isinstance(config, CnnFinetuneConfig):
        cnn_finetune.train(chosen, config, argv)
        return
    run = Run(chosen, config, argv)
    images: data.Images = getattr(data, config.data)()
    if isinstance(config, AirbenchConfig):
        network: nn.Module = train_airbench(run, config, images, chosen.device)
        notes = (
            f"{config.validation:,} images of the training part were held out, and the temperatures fitted on them. "
            "6 views: the image and two moved by one pixel, each also mirrored. "
            f"The answers are without the label smoothing of {config.label_smoothing} that was learnt with."
        )
    else:
        network = train_averaged(run, config, images, chosen.device)
        notes = f"{config.validation:,} images of the training part validated; weights averaged over steps."
    publish(run, config.kind, images, network, notes)


def publish(run: Run, kind: str, images: data.Images, network: Any, notes: str) -> None:
    """Read the test part once, with the code that serves, and write the card."""
    sizes = network.sizes
    card = {
        "task": "classify",
        "title": TITLES[kind],
        "kind": kind,
        "sizes": asdict(sizes),
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "outputs": [{"name": "probabilities", "dtype": "float64", "shape": [-1, sizes.classes]}],
        "labels": images.labels,
        "data": {images.name: images.sha256},
        "notes": notes,
    }
    classifier = run.predictor(ImageClassifier, card, network)
    card["metrics"] = evaluate(classifier)
    shown = images.test_images[:24]
    samples = plot_samples(
        run.folder / "samples.png",
        shown,
        images.labels,
        torch.tensor(classifier.predict(list(shown))),
        images.test_labels,
    )
    run.finish(card, network, {"curves.png": run.plot_curves(), "samples.png": samples})


if __name__ == "__main__":
    main()
