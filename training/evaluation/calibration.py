"""Accuracy and calibration of classifiers, and temperature scaling (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.cnn import WhitenedNet, unsmoothed
from app.tasks.classification import ImageClassifier
from training.data.image_dataset import Pixels
from training.run import metric

# Limits of a temperature that is fitted to a user's images. Without limits, it would be 0 if there are few images and
# all are classified correctly.
TEMPERATURE_RANGE = (0.4, 2.5)


def accuracy_of(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images [N, C, S, S] that the network classifies correctly."""
    network.eval()
    with torch.inference_mode():
        predicted = torch.cat([network(part).argmax(dim=1) for part in images.split(500)])
    network.train()
    return (predicted == labels).double().mean().item()


def served_probabilities(classifier: ImageClassifier, images: Pixels) -> Tensor:
    """Return the probabilities [N, classes] that the service would return for uint8 images [N, C, S, S]."""
    rows = [classifier.predict(list(batch)) for batch in images.split(500)]
    return torch.tensor([row for batch in rows for row in batch])


def classification_metrics(probability: Tensor, labels: Tensor, split: str) -> dict[str, Any]:
    """Return accuracy, negative log-likelihood and expected calibration error of probabilities [N, classes].

    The calibration error uses 15 bins.
    """
    confidence, prediction = probability.max(dim=1)
    correct = prediction == labels
    bins = (confidence * 15).long().clamp(max=14)
    gaps = torch.zeros(15, dtype=torch.float64).index_add(0, bins, confidence - correct.double()).abs()
    losses = -probability[torch.arange(len(labels)), labels].clamp(min=1e-12).log()
    return {
        "accuracy": metric(correct.numpy(), split),
        "nll": metric(losses.numpy(), split),
        "calibration_error": metric(gaps.sum().item() / len(labels), split),
    }


def calibrated_metrics(probability: Tensor, labels: Tensor, split: str, suffix: str = "") -> dict[str, Any]:
    """Return the ``classification_metrics`` and the Brier score of probabilities [N, classes].

    ``suffix`` is appended to the names of all metrics.
    """
    squared_error = (probability - F.one_hot(labels, probability.shape[1])).square().sum(dim=1)
    metrics = classification_metrics(probability, labels, split) | {"brier": metric(squared_error.mean().item(), split)}
    return {f"{name}{suffix}": entry for name, entry in metrics.items()}


@torch.no_grad()
def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T that minimises the negative log-likelihood of logits [N, classes] / T.

    The negative log-likelihood is convex in 1 / T, so bisection finds the zero of its derivative.
    """
    logits = logits.double()
    label_logit = logits.gather(1, labels.unsqueeze(1)).mean()
    low, high = 0.01, 100.0  # bounds of 1 / T
    for _ in range(60):
        middle = (low * high) ** 0.5
        slope = ((logits * middle).softmax(dim=1) * logits).sum(dim=1).mean() - label_logit
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 1 / (low * high) ** 0.5


def limited_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature within TEMPERATURE_RANGE that fits the labels best; 1 if images may have several labels.

    ``targets``: class indices [N], or booleans [N, classes] if images may have several labels.
    """
    low, high = TEMPERATURE_RANGE
    return min(max(fit_temperature(logits, targets), low), high) if targets.ndim == 1 else 1.0


@torch.no_grad()
def divide_logits(network: Any, temperature: float) -> Any:
    """Divide the weights of the last layer, and so the logits, by ``temperature``; return the network."""
    network.head.weight /= temperature
    network.head.bias /= temperature
    return network


@torch.inference_mode()
def fit_temperatures(
    network: WhitenedNet, images: Tensor, labels: Tensor, smoothings: Sequence[float] = (0.0,)
) -> None:
    """Calibrate the network on images that were not used for training.

    Fit the two temperatures, for predictions without and with test-time augmentation. Of ``smoothings``, choose the
    strength of label smoothing to remove from the logits. The sum of both negative log-likelihoods is minimised.
    """
    network.eval()
    network.sizes = replace(network.sizes, label_smoothing=0.0)
    for temperature in (network.temperature, network.views_temperature):
        temperature.fill_(1)
    parts = images.split(250)
    scores = [torch.cat([forward(part) for part in parts]).double() for forward in (network, network.tta_logits)]

    def fit(smoothing: float) -> tuple[float, list[float]]:
        """Return the sum of the negative log-likelihoods, and the temperatures."""
        logits = [unsmoothed(each, smoothing) for each in scores]
        temperatures = [fit_temperature(each, labels) for each in logits]
        losses = [F.cross_entropy(each / t, labels).item() for each, t in zip(logits, temperatures, strict=True)]
        return sum(losses), temperatures

    _, temperatures, smoothing = min((*fit(smoothing), smoothing) for smoothing in smoothings)
    network.sizes = replace(network.sizes, label_smoothing=smoothing)
    for temperature, value in zip((network.temperature, network.views_temperature), temperatures, strict=True):
        temperature.fill_(value)
