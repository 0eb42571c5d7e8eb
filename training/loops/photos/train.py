"""Classifiers for own photographs: ``python -m training.cnn --images`` for images above 64 pixels.

A pretrained network computes the features of all images once. Then a new last layer is fitted to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.networks.efficientnet import EfficientNetLite, EfficientNetSizes
from app.tasks.classification import ImageClassifier
from app.tasks.precision import fast_bfloat16
from training import refit
from training.configs import CnnFinetuneConfig
from training.data.datasets import DataError
from training.data.image_batches import served_probabilities
from training.data.image_dataset import ImageDataset
from training.evaluation.own_images import best_thresholds, measure, plot_test
from training.loops import distributed
from training.loops.photos import linear_head, pretrained
from training.loops.photos.features import FeatureCache
from training.loops.photos.linear_head import Choice
from training.options import Options, base_version
from training.run import Run

KIND = "efficientnet-lite"


@dataclass(frozen=True)
class Base:
    """The network with which the training starts, and how the card names it."""

    network: EfficientNetLite
    name: str
    data: dict[str, str]  # entry of the card
    licence: str | None
    source: str | None


def read_base(options: Options) -> Base:
    """Return the network that ``--from`` names. Raises DataError."""
    origin: str | None = options.data_options["origin"]
    if origin in (None, pretrained.NAME):
        return Base(pretrained.load(), pretrained.NAME, {}, pretrained.LICENCE, pretrained.SOURCE)
    if origin == "scratch":
        raise DataError("--from scratch needs --size 32 or --size 64: larger networks start from efficientnet-lite0")
    version = base_version(options, (KIND,))
    assert version is not None
    card = version.card
    name = f"{card.name}@{card.version}"
    return Base(version.network(), name, {name: card.weights_sha256}, card.licence, card.source)


def train(options: Options, config: CnnFinetuneConfig, argv: Sequence[str] | None, dataset: ImageDataset) -> None:
    """Train on own images and publish."""
    if distributed.world_size() > 1:
        raise DataError("images above 64 pixels are trained in one process; start the command without torchrun")
    base = read_base(options)
    run = Run(options, config, argv, dataset.sha256)
    run.write_file("skipped.txt", "".join(f"{reason}\n" for reason in dataset.skipped))
    train_indices, validation, _ = dataset.split()
    known = torch.cat([train_indices, validation]).sort().values
    features, targets = compute_features(run, config, base, dataset, known), dataset.labels[known]
    classes = len(dataset.classes)
    choice = choose_head(run, dataset, known, features)
    network = with_head(base, dataset, linear_head.fit_chosen(features, targets, classes, choice))
    card, pictures = measured(run, dataset, base, network, choice, targets)
    if refit.is_planned(options):
        every = torch.arange(len(dataset.labels))
        features = compute_features(run, config, base, dataset, every)
        network = with_head(base, dataset, linear_head.fit_chosen(features, dataset.labels, classes, choice))
        card = refit.describe(card, linear_head.MAX_STEPS, "of L-BFGS, with the same penalty and temperature")
    run.finish(card, network, pictures)


def compute_features(
    run: Run, config: CnnFinetuneConfig, base: Base, dataset: ImageDataset, indices: Tensor
) -> list[Tensor]:
    """The features [len(indices), D] of each view: the image and, with ``--flip yes``, its mirror image."""
    device = torch.device(run.options.device)
    network = base.network.to(device, memory_format=base.network.order).eval().requires_grad_(False)  # type: ignore[call-overload]
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    if device.type == "cpu" and fast_bfloat16(device):  # as in the service
        network.halve()
    cache = FeatureCache(run.options.runs / "features", network, run.options.device)
    views = [cache(dataset, indices, "plain", lambda images: images)]
    if config.flip:
        views.append(cache(dataset, indices, "mirrored", lambda images: images.flip(-1)))
    network.to(torch.float32).load_state_dict(state)
    return views


def choose_head(run: Run, dataset: ImageDataset, indices: Tensor, features: Sequence[Tensor]) -> Choice:
    """Choose the penalty of the last layer in cross-validation on the images with these indices."""

    def log(penalty: float, loss: float) -> None:
        run.log(penalty=penalty, cross_validation_loss=loss)
        run.step += 1

    folds = dataset.folds(indices, linear_head.FOLDS)
    return linear_head.choose(features, dataset.labels[indices], folds, len(dataset.classes), log)


def with_head(base: Base, dataset: ImageDataset, head: linear_head.LinearHead) -> EfficientNetLite:
    """The network with a new last layer for the classes of the dataset."""
    sizes = replace(base.network.sizes, classes=len(dataset.classes), multi_label=dataset.multi_label)
    sizes = replace(sizes, image=dataset.images.shape[-1])
    network = EfficientNetLite(EfficientNetSizes(**asdict(sizes)))
    state = {key: tensor for key, tensor in base.network.state_dict().items() if not key.startswith("head.")}
    network.load_state_dict({**state, "head.weight": head.weight, "head.bias": head.bias})
    return network


def measured(
    run: Run, dataset: ImageDataset, base: Base, network: EfficientNetLite, choice: Choice, targets: Tensor
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Evaluate on the test part with the serving code; return the card and the pictures."""
    sizes, (train_indices, validation, test) = network.sizes, dataset.split()
    card: dict[str, Any] = {
        "task": "classify",
        "title": f"Classifies images into {len(dataset.classes)} classes: {', '.join(dataset.classes)}"[:200],
        "kind": KIND,
        "sizes": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(sizes).items()},
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "outputs": [{"name": "probabilities", "dtype": "float64", "shape": [-1, sizes.classes]}],
        "labels": dataset.classes,
        "data": {f"images:{dataset.name}": dataset.sha256, **base.data},
        "licence": base.licence,
        "source": base.source,
        "notes": (
            f"The last layer is fitted to the features of {base.name}, without class weights. "
            f"{dataset.describe_classes()}: {len(train_indices) + len(validation):,} for training with "
            f"{linear_head.FOLDS}-fold cross-validation of the penalty ({choice.penalty:g}) and the temperature, "
            f"{len(test):,} for testing. Skipped: {len(dataset.skipped):,} files or classes."
        ),
    }
    if dataset.multi_label:
        card["thresholds"] = best_thresholds(choice.logits.sigmoid(), targets)
    classifier = run.predictor(ImageClassifier, card, network)
    card["metrics"] = measure(classifier, dataset)
    probability = served_probabilities(classifier, dataset.images[test])
    return card, {"curves.png": run.plot_curves(), **plot_test(run.folder, dataset, probability)}
