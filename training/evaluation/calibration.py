"""How right a classifier is, and how right about how sure it is; the temperature that makes it so (Guo et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.run import metric


def classification_metrics(probability: Tensor, labels: Tensor, split: str) -> dict[str, Any]:
    """Accuracy, negative log-likelihood, calibration error (15 equal bins, Guo et al. 2017) of [N, classes]."""
    confidence, guess = probability.max(dim=1)
    right = (guess == labels).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [(confidence[bins == b] - right[bins == b]).sum().abs() for b in range(15)]
    likelihood = probability[torch.arange(len(labels)), labels].clamp(min=1e-12).log()
    return {
        "accuracy": metric(right.mean().item(), split),
        "nll": metric(-likelihood.mean().item(), split),
        "calibration_error": metric(torch.stack(gaps).sum().item() / len(labels), split),
    }


def calibrated_metrics(
    probability: Tensor, temperature: float, labels: Tensor, split: str, suffix: str
) -> dict[str, Any]:
    """The figures of calibrated probabilities, their Brier score, and what they were before the temperature."""
    found = classification_metrics(probability, labels, split)
    wrong = (probability - F.one_hot(labels, probability.shape[1])).square().sum(dim=1)
    found["brier"] = metric(wrong.mean().item(), split)
    raw = torch.softmax(probability.double().clamp(min=1e-30).log() * temperature, dim=1).float()
    before = classification_metrics(raw, labels, f"{split}, before the temperature")
    found |= {f"{name}_before": before[name] for name in ("nll", "calibration_error")}
    return {f"{name}{suffix}": found[name] for name in found}


@torch.no_grad()
def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T by which logits [N, classes] are divided so that their negative log-likelihood is least.

    In 1 / T it is convex: its slope is halved down to where it is 0.
    """
    logits = logits.double()
    right = logits.gather(1, labels.unsqueeze(1)).mean()
    low, high = 0.01, 100.0  # of 1 / T
    for _ in range(60):
        middle = (low * high) ** 0.5
        slope = ((logits * middle).softmax(dim=1) * logits).sum(dim=1).mean() - right
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 1 / (low * high) ** 0.5
