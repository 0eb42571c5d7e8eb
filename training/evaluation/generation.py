"""What the samples of a generator are worth, beside real images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from app import store
from app.networks import build
from app.store import rollout
from app.tasks.classification import ImageClassifier
from app.tasks.image_generation import ImageSampler, LatentBatch
from training.configs import SAMPLE_CLASSIFIER, CnnConfig
from training.data import datasets
from training.data.image_batches import accuracy_of
from training.loops.classifier import AveragedTrainer
from training.run import metric, permutation

REFERENCE_CLASSIFIER = "mnist-judge"
SAMPLES = 10_000  # samples, and as many real images
CLASSIFIER_SAMPLES = 60_000  # samples that a classifier learns from
CLASSIFIER_WIDTHS = (16, 32)
NEIGHBOURS = 5
LABEL_CLASSIFIER_STEPS = 400  # steps of the classifier that reads them


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features [N, D], each taken for a Gaussian (Heusel et al. 2017), in float64."""
    means, roots, covariances = [], [], []
    for features in (first.double(), second.double()):
        covariance = features.t().cov()
        values, vectors = torch.linalg.eigh(covariance)
        means.append(features.mean(dim=0))
        covariances.append(covariance)
        roots.append(vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.t())
    inner = roots[0] @ covariances[1] @ roots[0]
    overlap = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum()
    gap = ((means[0] - means[1]) ** 2).sum()
    return float(gap + covariances[0].trace() + covariances[1].trace() - 2 * overlap)


def extract_features(judge: ImageClassifier, images: Tensor) -> Tensor:
    """uint8 images [N, 1, 28, 28] -> the judge's features [N, 128]."""
    with torch.inference_mode():
        return torch.cat([judge.network.features(batch).cpu() for batch in images.to(judge.device).split(500)])


def evaluated_latents(sampler: ImageSampler, images: datasets.Images) -> LatentBatch:
    """The samples that are judged, of seed 0; their labels are those of as many training images, drawn at random."""
    drawing = sampler.parse(SAMPLES, None, 0)
    if drawing.classes is None:
        return drawing
    some = torch.randperm(len(images.train_labels), generator=torch.Generator().manual_seed(1))[:SAMPLES]
    return LatentBatch(drawing.latents[: len(some)], images.train_labels[some].numpy())


def evaluate(sampler: ImageSampler, judge: ImageClassifier) -> dict[str, Any]:
    """The metrics of a published generator: 10,000 samples of seed 0 against the test part of its data."""
    images: datasets.Images = getattr(datasets, next(iter(sampler.card.data)))()
    drawing = evaluated_latents(sampler, images)
    fake = torch.from_numpy(sampler.predict([drawing])[0])
    generator = torch.Generator().manual_seed(0)
    fake_features = extract_features(judge, fake)
    with torch.inference_mode():
        classes = judge.network.fc2(fake_features.to(judge.device)).argmax(dim=1).cpu()
    real_features = extract_features(judge, images.test_images)
    floors = []
    for _ in range(5):
        drawn = torch.randperm(len(images.train_images), generator=generator)[:SAMPLES]
        train_features = extract_features(judge, images.train_images[drawn])
        floors.append(frechet_distance(train_features, real_features))
    floor = float(np.mean(floors))
    _, strangers = images.split_validation(
        5000
    )  # the judge did not learn from these, so that they are as strange as the test
    unseen = frechet_distance(extract_features(judge, images.train_images[strangers]), real_features)
    some = frechet_distance(fake_features[: len(strangers)], real_features)
    distance = frechet_distance(fake_features, real_features)
    train = images.train_images
    ratio = (
        nearest_distances(fake[:2000], train).median() / nearest_distances(images.test_images[:2000], train).median()
    )
    told = f"{SAMPLES:,} samples of seed 0, judged by {judge.card.name} {judge.card.version}"
    against = f"{told}, against the {images.name} test part"
    distances = {
        "frechet_distance": metric(distance, against, 2),
        "frechet_floor": metric(floor, f"{SAMPLES:,} training images against the test part, mean of 5 draws", 2),
        "frechet_ratio": metric(distance / floor, against, 1),
        "frechet_distance_5000": metric(some, "the first 5,000 of these samples, against the same", 2),
        "frechet_floor_5000": metric(unseen, "5,000 training images that the judge never saw, against the same", 2),
        "nearest_neighbour_ratio": metric(
            ratio.item(), "median pixel distance to the nearest training image: 2,000 samples over 2,000 test images", 3
        ),
    }
    if drawing.classes is not None:
        features = (fake_features, real_features, train_features)
        return distances | conditional_metrics(sampler, images, torch.from_numpy(drawing.classes), classes, features)
    shares = classes.bincount(minlength=10) / len(classes)
    return distances | {
        "rarest_class": metric(shares.min().item(), told, 3),
        "commonest_class": metric(shares.max().item(), told, 3),
    }


def load_reference_classifier(models: Path, device: str, version: int | None = None) -> ImageClassifier:
    """A version of the judge, by default the one that serves."""
    if not models.exists() or REFERENCE_CLASSIFIER not in rollout.stored_versions(models):
        raise SystemExit(
            f"{REFERENCE_CLASSIFIER} is not in {models}: run `python -m training.cnn --preset digits` first"
        )
    serves = version or rollout.serving(models, REFERENCE_CLASSIFIER, rollout.read(models, REFERENCE_CLASSIFIER))
    if serves is None:
        raise SystemExit(
            f"no version of {REFERENCE_CLASSIFIER} in {models} is whole: `python -m app.models verify` says why"
        )
    return ImageClassifier(store.read_version(models, REFERENCE_CLASSIFIER, serves), torch.device(device))


def nearest_distances(images: Tensor, among: Tensor) -> Tensor:
    """The distance [N] in pixel values of each image to the nearest of others."""
    others = among.flatten(1).float()
    return torch.cat([torch.cdist(part, others).min(dim=1).values for part in images.flatten(1).float().split(250)])


def class_rows(sampler: ImageSampler, each: int) -> LatentBatch:
    """A row for each label, all rows of the same latents."""
    drawn = [sampler.parse(each, label, 0) for label in sampler.labels]
    classes = np.arange(len(drawn)).repeat(each)
    return LatentBatch(np.concatenate([drawing.latents for drawing in drawn]), classes)


def class_accuracies(labels: Tensor, guesses: Tensor, classes: int) -> Tensor:
    """The share [classes] of the images of each label that are read as such."""
    right = (labels == guesses).double()
    return torch.stack([right[labels == label].mean() for label in range(classes)])


def density_and_coverage(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """In how many real images' neighbourhoods a fake one lies, over k; the share of these that have a fake one in them.

    Of features [N, D], k = 5 (Naeem et al. 2020).
    """
    reach = torch.cat(
        [torch.cdist(part, real).kthvalue(NEIGHBOURS + 1, dim=1).values for part in real.split(1000)]
    )  # to the fifth neighbour that is not itself
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for part in fake.split(1000):
        within = torch.cdist(part, real) < reach  # [1000, N]
        inside += int(within.sum())
        covered |= within.any(dim=0)
    return inside / NEIGHBOURS / len(fake), covered.double().mean().item()


def samples_only_accuracy(sampler: ImageSampler, images: datasets.Images) -> dict[str, Any]:
    """The accuracy on the test part of a classifier that learnt from samples only (Ravuri and Vinyals 2019)."""
    drawing = sampler.parse(CLASSIFIER_SAMPLES, None, 1)
    accuracy = learnt_from(torch.from_numpy(sampler.predict([drawing])[0]), torch.as_tensor(drawing.classes), images)
    config = SAMPLE_CLASSIFIER
    told = (
        f"{images.name} test part, classifier trained on {CLASSIFIER_SAMPLES:,} samples of seed 1 only: {config.kind} "
        f"{CLASSIFIER_WIDTHS}, {config.epochs} epochs, batch {config.batch}, shifts of up to {config.shift}, seed 0"
    )
    return metric(accuracy, told, 3)


def learnt_from(learn: Tensor, labels: Tensor, images: datasets.Images) -> float:
    """The accuracy on the test part of SAMPLE_CLASSIFIER after images [N, 1, 28, 28] and labels [N]."""
    config = SAMPLE_CLASSIFIER
    steps = config.epochs * (len(learn) // config.batch)
    network = sample_classifier(config, learn, labels, {"conv": CLASSIFIER_WIDTHS}, steps, "samples")
    return accuracy_of(network, images.test_images, images.test_labels)


def sample_classifier(
    config: CnnConfig, images: Tensor, labels: Tensor, sizes: dict[str, Any], steps: int, key: str
) -> AveragedModel:
    """Train a classifier of seed 0 on uint8 images [N, C, S, S] and labels [N]; return the averaged network.

    ``key`` selects the order of the images.
    """
    torch.manual_seed(0)
    trainer = AveragedTrainer(config, build(config.kind, sizes).to(images.device))
    per_epoch = len(images) // config.batch
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        batch = permutation(len(images), 0, key, epoch)[place * config.batch : (place + 1) * config.batch]
        trainer.update(images, labels, batch, step, steps)
    return trainer.average


def conditional_metrics(
    sampler: ImageSampler,
    images: datasets.Images,
    labels: Tensor,
    guesses: Tensor,
    features: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Any]:
    """What a card tells besides distances.

    ``labels`` and the judge's ``guesses`` are those of the judged samples; ``features`` of samples, test images, and
    training images.
    """
    fake, real, train = features
    right = class_accuracies(labels, guesses, len(sampler.labels))
    judged = f"{len(labels):,} samples of seed 0, with as many of each label as in the training part"
    near = f"in the judge's features, {NEIGHBOURS} neighbours, against the {images.name} test part"
    density, coverage = density_and_coverage(real, fake)
    real_density, real_coverage = density_and_coverage(real, train)
    return {
        "conditional_accuracy": metric(right.mean().item(), f"{judged}: read as their label, mean over the labels"),
        "worst_class_accuracy": metric(right.min().item(), f"{judged}: label {sampler.labels[int(right.argmin())]}"),
        "samples_only_accuracy": samples_only_accuracy(sampler, images),
        "density": metric(density, f"{judged}, {near}", 3),
        "density_of_real": metric(real_density, f"{len(train):,} training images, {near}", 3),
        "coverage": metric(coverage, f"{judged}, {near}", 3),
        "coverage_of_real": metric(real_coverage, f"{len(train):,} training images, {near}", 3),
    }


def label_classifier(images: Tensor, labels: Tensor, classes: int) -> Any:
    """SAMPLE_CLASSIFIER's classifier after a few hundred steps on uint8 images [N, C, S, S] and labels [N]."""
    config = replace(SAMPLE_CLASSIFIER, batch=min(SAMPLE_CLASSIFIER.batch, len(images)), ema_decay=0.98)
    sizes = {"conv": CLASSIFIER_WIDTHS, "classes": classes, "channels": images.shape[1], "image": images.shape[-1]}
    return sample_classifier(config, images, labels, sizes, LABEL_CLASSIFIER_STEPS, "reader")
