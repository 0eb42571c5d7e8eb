"""Metrics and pictures of image classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.tasks.classification import ImageClassifier
from training import cards
from training.data.image_dataset import ImageDataset, subset
from training.evaluation import intervals
from training.evaluation.calibration import classification_metrics, served_probabilities
from training.options import Part
from training.run import Run, metric, new_figure, save_figure


def measure(classifier: ImageClassifier, dataset: ImageDataset) -> dict[str, Any]:
    """Return the metrics of a published classifier on the test part of its dataset."""
    test = dataset.split()[2]
    return metrics_of(served_probabilities(classifier, subset(dataset.images, test)), classifier, dataset, test)


def measured(
    run: Run,
    fields: dict[str, Any],
    network: Any,
    dataset: ImageDataset,
    indices: Tensor,
    probability: Tensor | None = None,
    folds: Tensor | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Evaluate a new network with the serving code; return its card, and pictures of its predictions.

    With --no-publish, the test part is not read. The metrics are then those of the images with these indices [N].

    Args:
        run: the run that trained the network.
        fields: the fields of the card that do not follow from the network and the dataset. The field ``kind`` is
            needed.
        network: the network.
        dataset: the images.
        indices: see above.
        probability: predicted probabilities [N, classes] for these images, by default those of the network.
        folds: see ``metrics_of``.
    """
    card = {
        **cards.fields(fields["kind"], network, labels=dataset.classes),
        "title": f"Classifies images into {len(dataset.classes)} classes: {', '.join(dataset.classes)}"[:200],
        "data": dataset.data,
        **fields,
    }
    if run.options.part == "test":
        indices, probability, folds = dataset.split()[2], None, None

    def evaluate(classifier: ImageClassifier, part: Part) -> dict[str, Any]:
        nonlocal probability
        if probability is None:
            probability = served_probabilities(classifier, subset(dataset.images, indices))
        return metrics_of(probability, classifier, dataset, indices, part, folds)

    validation = subset(dataset.images, dataset.split()[1])
    card, _ = run.measure(card, network, evaluate, examples=validation.split(100))
    assert probability is not None
    return card, plot_predictions(run.folder, dataset, indices, probability)


def metrics_of(
    probability: Tensor,
    classifier: ImageClassifier,
    dataset: ImageDataset,
    indices: Tensor,
    part: Part = "test",
    folds: Tensor | None = None,
) -> dict[str, Any]:
    """Return the metrics of the probabilities [N, classes] for the images with these indices [N].

    The thresholds of the card are used if images may have several labels. If these thresholds were fitted to the same
    images, ``folds`` [N] gives the fold of each image. Then new thresholds are fitted to the other folds.

    The result is empty if there are no images.
    """
    if not len(indices):
        return {}
    labels = dataset.labels[indices]
    use = "that were not used in training" if part == "test" else "for validation"
    split = f"{len(indices):,} images of {dataset.name} {use}"
    if dataset.multi_label:
        if folds is None:
            thresholds = torch.tensor(classifier.card.thresholds, dtype=probability.dtype)
            return multi_label_metrics(probability, labels, thresholds, split)
        thresholds = cross_fitted_thresholds(probability, labels, folds)
        return multi_label_metrics(probability, labels, thresholds, split, "thresholds fitted to the other folds")
    return single_label_metrics(probability, labels, dataset.classes, split)


def single_label_metrics(probability: Tensor, labels: Tensor, classes: list[str], split: str) -> dict[str, Any]:
    """Return accuracy, calibration and the accuracy of the worst class, for probabilities [N, classes].

    Classes without a test image are ignored.
    """
    correct = probability.argmax(dim=1) == labels
    of_class = {label: correct[labels == label].numpy() for label in labels.unique().tolist()}
    worst = min(of_class, key=lambda label: of_class[label].mean())
    of_worst = f"{split}: {len(of_class[worst]):,} of class {classes[worst]}"
    majority_share = labels.bincount().max().item() / len(labels)
    always = f"{split}: accuracy of always predicting the most common class"
    return {
        **classification_metrics(probability, labels, split),
        "worst_class_accuracy": metric(of_class[worst], of_worst),
        "commonest_class": metric(majority_share, always, intervals.decimals(len(labels))),
    }


def multi_label_metrics(
    probability: Tensor, labels: Tensor, thresholds: Tensor, split: str, origin: str = "thresholds of the card"
) -> dict[str, Any]:
    """Return mean average precision, F1, negative log-likelihood and exact matches for images with several labels.

    Args:
        probability: probability [N, classes] that an image has a label.
        labels: booleans [N, classes]: whether an image has a label. The mean average precision ignores labels that no
            image has, and is left out if no image has a label.
        thresholds: thresholds [classes], or [N, classes] if they differ between images. An image gets a label if the
            probability is at least the threshold.
        split: description of these images for the card.
        origin: description of the thresholds for the card.
    """
    from sklearn.metrics import average_precision_score, f1_score  # imported here, because it takes 1 s

    predicted, tested = probability >= thresholds, labels.any(dim=0)
    exact = (predicted == labels).all(dim=1)
    loss = -torch.where(labels, probability, 1 - probability).clamp(min=1e-12).log().mean().item()
    metrics = {}
    if tested.any():
        mean = average_precision_score(labels[:, tested], probability[:, tested])
        metrics["mean_average_precision"] = metric(mean, f"{split}, {int(tested.sum())} labels")
    f1 = f1_score(labels, predicted, average="micro", zero_division=0)
    return metrics | {
        "f1": metric(f1, f"{split}, {origin}"),
        "nll": metric(loss, f"{split}, for each label"),
        "exact_match": metric(exact.numpy(), f"{split}: all labels correct, {origin}"),
    }


def best_thresholds(probability: Tensor, present: Tensor) -> list[float]:
    """Return for each label the threshold with the highest F1 on probabilities [N, classes].

    If several thresholds are equally good, and 0.5 is one of them, 0.5 is returned. For a label that no image has, all
    thresholds are equally good.
    """
    from sklearn.metrics import f1_score

    candidates = [0.5, *(step / 20 for step in range(1, 20))]
    f1 = [f1_score(present, probability >= each, average=None, zero_division=0) for each in candidates]
    return [candidates[best] for best in np.argmax(f1, axis=0)]


def cross_fitted_thresholds(probability: Tensor, present: Tensor, folds: Tensor) -> Tensor:
    """Return thresholds [N, classes]. The thresholds of an image are the best on the images of all other folds.

    Args:
        probability: the probability [N, classes] that an image has a label.
        present: booleans [N, classes]: whether an image has a label.
        folds: the fold [N] of each image.
    """
    thresholds = torch.empty_like(probability)
    for fold in folds.unique().tolist():
        own = folds == fold
        thresholds[own] = torch.tensor(best_thresholds(probability[~own], present[~own]), dtype=probability.dtype)
    return thresholds


def plot_predictions(folder: Path, dataset: ImageDataset, indices: Tensor, probability: Tensor) -> list[Path]:
    """Plot predictions, confusions and mistakes; return the paths of the pictures.

    ``indices`` [N]: the indices of the plotted images. ``probability`` [N, classes]: the predicted probabilities of
    these images.
    """
    truth, labels = dataset.labels[indices], dataset.classes
    if dataset.multi_label or not len(indices):
        return []
    some = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:24]
    return [
        plot_samples(folder / "samples.png", dataset.images[indices[some]], labels, probability[some], truth[some]),
        plot_confusion(folder / "confusion.png", labels, truth, probability.argmax(dim=1)),
        plot_mistakes(folder / "mistakes.png", dataset, indices, probability),
    ]


def plot_samples(
    path: Path, images: Tensor, labels: list[str], probability: Tensor, truth: Tensor, beside: str = ""
) -> Path:
    """Plot up to 24 images with their predictions. The titles of wrong predictions are red.

    ``beside``: second line in the titles of wrong predictions. In this line, {truth} is replaced by the true class.
    """
    figure = new_figure(12, 5.2)
    for i, axis in enumerate(figure.subplots(3, 8).flat):
        axis.axis("off")
        if i >= len(images):
            continue
        best = int(probability[i].argmax())
        axis.imshow(images[i].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
        correct = best == int(truth[i])
        title = f"{_shorten(labels[best])} {probability[i, best]:.0%}"
        if beside and not correct:
            title += "\n" + beside.format(truth=_shorten(labels[int(truth[i])]))
        axis.set_title(title, fontsize=9, color="black" if correct else "crimson", parse_math=False)
    return save_figure(figure, path, 70)


def plot_confusion(path: Path, labels: list[str], truth: Tensor, predictions: Tensor) -> Path:
    """Plot the confusion matrix: classes in rows, predictions in columns."""
    counts = (truth * len(labels) + predictions).bincount(minlength=len(labels) ** 2).view(len(labels), -1)
    side = min(16.0, 2.2 + 0.55 * len(labels))
    figure = new_figure(side, side)
    axis = figure.subplots()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    names = [_shorten(label) for label in labels]
    axis.set_xticks(range(len(labels)), names, rotation=90, parse_math=False)
    axis.set_yticks(range(len(labels)), names, parse_math=False)
    axis.set(xlabel="predicted", ylabel="true class")
    if len(labels) <= 20:
        for row, column in counts.nonzero().tolist():
            color = "white" if counts[row, column] > counts[row].sum() / 2 else "black"
            axis.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=color, fontsize=8)
    return save_figure(figure, path)


def plot_mistakes(path: Path, dataset: ImageDataset, indices: Tensor, probability: Tensor) -> Path:
    """Plot the 24 most confident wrong predictions.

    If there are fewer wrong predictions, the least confident correct predictions follow.
    """
    confidence, predictions = probability.max(dim=1)
    truth = dataset.labels[indices]
    worst = torch.where(predictions != truth, confidence, -1 - confidence).argsort(descending=True)[:24]
    images = dataset.images[indices[worst]]
    return plot_samples(path, images, dataset.classes, probability[worst], truth[worst], "is {truth}")


def _shorten(label: str) -> str:
    return label if len(label) <= 14 else f"{label[:13]}…"
