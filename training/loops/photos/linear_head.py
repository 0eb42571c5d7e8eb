"""Fit the last layer of a pretrained network: logistic regression on its features.

The loss has no class weights, so the probabilities follow the natural frequencies of the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.evaluation.calibration import limited_temperature

# Factors of half the squared weights in the loss, from strong to weak.
PENALTIES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
FOLDS = 5
MAX_STEPS = 60  # steps of L-BFGS for each penalty; each fit starts from the weights of the next stronger penalty
MIN_DEVIATION = 1e-3  # features are divided by their deviation, or by this number if a feature hardly varies


@dataclass(frozen=True)
class LinearHead:
    """A linear layer with ``weight`` [classes, D] and ``bias`` [classes], where D is the number of features."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits [N, classes] of features [N, D]."""
        return F.linear(features, self.weight, self.bias)


@dataclass(frozen=True)
class ChosenPenalty:
    """The penalty with the lowest loss in cross-validation.

    ``temperature``: the best temperature for this penalty; 1 if images may have several labels. ``logits`` [N,
    classes]: the logits of each image, divided by the temperature. They were computed by a last layer that was fitted
    to the other folds.
    """

    penalty: float
    temperature: float
    logits: Tensor


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of logits [N, classes]: softmax for indices [N], sigmoid for booleans [N, classes]."""
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").sum(dim=1).mean()


def fit(features: Tensor, targets: Tensor, classes: int, penalties: Sequence[float]) -> list[LinearHead]:
    """Fit one last layer (head) for each penalty. Each fit starts from the weights of the previous fit.

    The penalties should decrease, so that each fit starts from weights near its solution.

    Args:
        features: features [N, D] of the images.
        targets: indices [N], or booleans [N, classes] if images may have several labels.
        classes: number of classes.
        penalties: the loss contains half of the squared norm of the weights, multiplied by this factor. The features
            are scaled to variance 1 first.
    """
    mean = features.mean(dim=0)
    deviation = features.std(dim=0, correction=0).clamp(min=MIN_DEVIATION)
    x = (features - mean) / deviation
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    heads = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

        def closure(optimizer: torch.optim.LBFGS = optimizer, penalty: float = penalty) -> float:
            optimizer.zero_grad()
            loss = loss_of(F.linear(x, weight, bias), targets) + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        scaled = weight.detach() / deviation
        heads.append(LinearHead(scaled, bias.detach() - scaled @ mean))
    return heads


def choose(
    features: Sequence[Tensor],
    targets: Tensor,
    folds: Tensor,
    classes: int,
) -> ChosenPenalty:
    """Choose the penalty with the lowest loss in cross-validation, and fit the temperature on the same predictions.

    Args:
        features: views of the images, each [N, D]. The heads are fitted to all views and validated on the first view.
        targets: see ``fit``.
        folds: the fold [N] of each image.
        classes: number of classes.
    """
    logits = torch.zeros(len(PENALTIES), len(targets), classes, device=targets.device)
    for fold in folds.unique().tolist():
        others, own = folds != fold, folds == fold
        views = [view[others] for view in features]
        heads = fit(torch.cat(views), torch.cat([targets[others]] * len(views)), classes, PENALTIES)
        for index, head in enumerate(heads):
            logits[index, own] = head(features[0][own])
    best = min(range(len(PENALTIES)), key=lambda index: float(loss_of(logits[index], targets)))
    temperature = limited_temperature(logits[best], targets)
    return ChosenPenalty(PENALTIES[best], temperature, logits[best] / temperature)


def fit_chosen(features: Sequence[Tensor], targets: Tensor, classes: int, choice: ChosenPenalty) -> LinearHead:
    """Fit the head with the chosen penalty and temperature on all views [N, D]."""
    path = [penalty for penalty in PENALTIES if penalty >= choice.penalty]
    head = fit(torch.cat(list(features)), torch.cat([targets] * len(features)), classes, path)[-1]
    return LinearHead(head.weight / choice.temperature, head.bias / choice.temperature)
