"""Evaluate image generators by comparing their samples with real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from app.networks import build
from app.store import Store
from app.store.version import Version
from app.tasks.classification import ImageClassifier
from app.tasks.image_generation import ImageSampler, LatentBatch
from training.configs.classifiers import SAMPLE_CLASSIFIER, CnnConfig
from training.data import datasets
from training.evaluation import intervals
from training.evaluation.calibration import accuracy_of
from training.limits import limits
from training.loops.classifier import AveragedClassifier
from training.loops.fit import Batches
from training.options import Part, store_of
from training.publishing import runnable
from training.run import metric

REFERENCE_CLASSIFIER = "mnist-judge"  # the samples are evaluated with the features and predictions of this model
FOLDS = 10  # number of parts in the jackknife estimate of a standard error
CLASSIFIER_WIDTHS = (16, 32)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of two sets of features [N, D], computed in float64 (Heusel et al. 2017).

    The distance assumes that both sets have Gaussian distributions.
    """
    first, second = first.double(), second.double()
    covariances = [features.t().cov() for features in (first, second)]
    overlap = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    gap = ((first.mean(dim=0) - second.mean(dim=0)) ** 2).sum()
    return float(gap + covariances[0].trace() + covariances[1].trace() - 2 * overlap)


def frechet_with_error(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the Frechet distance of two sets of features [N, D], and its standard error.

    The jackknife estimates the standard error: it leaves out each tenth of ``first`` in turn, and always uses all of
    ``second``. Two sets of real images have the distance that samples of a perfect generator would have.
    """
    fold = torch.arange(len(first)) % FOLDS
    left_out = torch.tensor([frechet_distance(first[fold != number], second) for number in range(FOLDS)])
    return frechet_distance(first, second), float(left_out.std(correction=0)) * (FOLDS - 1) ** 0.5


def frechet_metric(first: Tensor, second: Tensor, split: str) -> tuple[float, dict[str, Any]]:
    """Return the Frechet distance of two sets of features [N, D], and the metric for the card."""
    distance, error = frechet_with_error(first, second)
    return distance, metric(distance, split, 2, interval=intervals.normal(distance, error))


def extract_features(classifier: ImageClassifier, images: Tensor) -> Tensor:
    """Return the reference classifier's features [N, 128] of uint8 images [N, 1, 28, 28]."""
    with torch.inference_mode():
        batches = images.to(classifier.device).split(500)
        return torch.cat([classifier.network.features(batch).cpu() for batch in batches])


def evaluated_latents(sampler: ImageSampler, images: datasets.Images) -> LatentBatch:
    """Return the latents of the evaluated samples, drawn with seed 0.

    If the generator takes labels, the requested labels are those of randomly drawn training images.
    """
    latents = sampler.parse(limits().generated_samples, None, 0)
    if latents.classes is None:
        return latents
    some = torch.randperm(len(images.train_labels), generator=torch.Generator().manual_seed(1))[
        : limits().generated_samples
    ]
    return LatentBatch(latents.latents[: len(some)], images.train_labels[some].numpy())


def evaluate(sampler: ImageSampler, classifier: ImageClassifier, part: Part = "test") -> dict[str, Any]:
    """Compare samples of seed 0 with the test part of the generator's data set; return the metrics.

    ``classifier`` is the reference classifier. If ``part`` is "validation", the samples are compared with the training
    images that the classifier has not seen. Then the generator must not have been trained on them either.
    """
    images: datasets.Images = getattr(datasets, next(iter(sampler.card.data)))()
    latents, samples = evaluated_latents(sampler, images), f"{limits().generated_samples:,} samples of seed 0"
    fake = torch.from_numpy(sampler.predict([latents])[0])
    fake_features = extract_features(classifier, fake)
    with torch.inference_mode():
        predictions = classifier.network.fc2(fake_features.to(classifier.device)).argmax(dim=1).cpu()
    # The classifier was not trained on its validation images, so it has seen neither these nor the test part.
    _, unseen = images.split_validation(limits().unseen_images)
    unseen_features = extract_features(classifier, images.train_images[unseen])
    if part == "validation":
        split = f"{samples}, compared with {len(unseen):,} training images held out for validation"
        return {"frechet_distance": frechet_metric(fake_features, unseen_features, split)[1]}
    real_features = extract_features(classifier, images.test_images)
    compared = f"compared with the {images.name} test part in the features of {classifier.card.name}"
    split = f"the first {len(unseen):,} of {samples}, {compared}"
    distance, of_samples = frechet_metric(fake_features[: len(unseen)], real_features, split)
    split = f"{len(unseen):,} training images unseen by the classifier, {compared}"
    floor, of_real = frechet_metric(unseen_features, real_features, split)
    own, other = (nearest_distances(each[:2000], images.train_images).median() for each in (fake, images.test_images))
    metrics = {
        "frechet_distance": of_samples,
        "frechet_floor": of_real,
        "frechet_ratio": metric(distance / floor, "frechet_distance relative to frechet_floor", 2),
        "nearest_neighbour_ratio": metric(
            (own / other).item(),
            "median pixel distance to the nearest training image: 2,000 samples over 2,000 test images",
            3,
        ),
    }
    if latents.classes is not None:
        return metrics | conditional_metrics(sampler, images, torch.from_numpy(latents.classes), predictions)
    rated = f"{samples}, rated by {classifier.card.name} {classifier.card.version}"
    shares = predictions.bincount(minlength=10) / len(predictions)
    return metrics | {
        "rarest_class": metric(shares.min().item(), rated, 3),
        "commonest_class": metric(shares.max().item(), rated, 3),
    }


def load_reference_classifier(models: Path, device: str, version: int | None = None) -> ImageClassifier:
    """Load the reference classifier from the store or the included store, by default its active version.

    Exit with a message if both stores have none, or if the version was trained on some of the unseen images.
    """
    name = REFERENCE_CLASSIFIER
    models = store_of(models, name, version)
    if not Store(models).numbers(name):
        command = runnable("python -m training.cnn --preset digits", models)
        raise SystemExit(f"{name} is not in {models}: run `{command}` first")
    number = version or Store(models, Version.network).roles(name).active
    if number is None:
        command = runnable("python -m app.models verify", models)
        raise SystemExit(f"{models} holds no undamaged version of {name}: see `{command}`")
    classifier = Store(models).read(name, number)
    held_out, needed = classifier.card.held_out or 0, limits().unseen_images
    if held_out < needed:
        raise SystemExit(
            f"{classifier.label} cannot evaluate generators: at least {needed:,} training images must be held out, but "
            f"its card states {held_out:,}. Train it with --set validation={needed} or more"
        )
    return ImageClassifier(classifier, torch.device(device))


def nearest_distances(images: Tensor, others: Tensor) -> Tensor:
    """Return the Euclidean distance [N], in pixel values, from each image to the nearest image in ``others``."""
    others = others.flatten(1).float()
    return torch.cat([torch.cdist(part, others).min(dim=1).values for part in images.flatten(1).float().split(250)])


def class_rows(sampler: ImageSampler) -> LatentBatch:
    """Return the latents for a grid of samples with one row of ten per label. All rows have the same latents."""
    rows = [sampler.parse(10, label, 0) for label in sampler.labels]
    classes = np.arange(len(rows)).repeat(10)
    return LatentBatch(np.concatenate([row.latents for row in rows]), classes)


def samples_only_accuracy(sampler: ImageSampler, images: datasets.Images) -> dict[str, Any]:
    """Measure the test accuracy of a classifier that is trained on samples only (Ravuri and Vinyals 2019)."""
    latents = sampler.parse(limits().classifier_samples, None, 1)
    samples, labels = torch.from_numpy(sampler.predict([latents])[0]), torch.as_tensor(latents.classes)
    config = SAMPLE_CLASSIFIER
    steps = config.epochs * (len(samples) // config.batch)
    network = sample_classifier(config, samples, labels, {"conv": CLASSIFIER_WIDTHS}, steps, "samples")
    split = (
        f"{images.name} test part, classifier trained on {limits().classifier_samples:,} samples of seed 1 only: "
        f"{config.kind} {CLASSIFIER_WIDTHS}, {config.epochs} epochs, batch {config.batch}, shifts of up to "
        f"{config.shift}, seed 0"
    )
    return metric(accuracy_of(network, images.test_images, images.test_labels), split, 3)


def sample_classifier(
    config: CnnConfig, images: Tensor, labels: Tensor, sizes: dict[str, Any], steps: int, key: str
) -> AveragedModel:
    """Train a classifier with seed 0 on uint8 images [N, C, S, S] and labels [N]; return the averaged network.

    ``key`` determines the random order of the images.
    """
    torch.manual_seed(0)
    batches, network = Batches(torch.arange(len(images)), config.batch, 0, key), build(config.kind, sizes)
    recipe = AveragedClassifier(config, network.to(images.device), images, labels, batches, labels[:0])
    for step in range(steps):
        # The second argument is no share of the steps, so the learning rate is constant. The published figures were
        # measured like this.
        recipe.update(step, steps)
    return recipe.average


def conditional_metrics(
    sampler: ImageSampler, images: datasets.Images, labels: Tensor, predictions: Tensor
) -> dict[str, Any]:
    """Return the additional metrics of a generator that takes labels.

    Args:
        sampler: the generator.
        images: the data set of the generator.
        labels: labels [N] that were requested for the samples.
        predictions: labels [N] that the reference classifier predicts for the samples.
    """
    correct = (labels == predictions).double()
    accuracy = torch.stack([correct[labels == label].mean() for label in range(len(sampler.labels))])
    samples = f"{len(labels):,} samples of seed 0, with the label frequencies of the training part"
    worst = f"label {sampler.labels[int(accuracy.argmin())]}"
    return {
        "conditional_accuracy": metric(accuracy.mean().item(), f"{samples}: classified as their label, mean of labels"),
        "worst_class_accuracy": metric(accuracy.min().item(), f"{samples}: {worst}"),
        "samples_only_accuracy": samples_only_accuracy(sampler, images),
    }


def label_classifier(images: Tensor, labels: Tensor, classes: int, steps: int) -> Any:
    """Train a classifier on real uint8 images [N, C, S, S], to check the labels of generated images; return it."""
    config = SAMPLE_CLASSIFIER.model_copy(
        update={"batch": min(32, len(images)), "learning_rate": 4e-3, "ema_decay": 0.98}
    )
    sizes = {"conv": CLASSIFIER_WIDTHS, "classes": classes, "channels": images.shape[1], "image": images.shape[-1]}
    return sample_classifier(config, images, labels, sizes, steps, "reader")
