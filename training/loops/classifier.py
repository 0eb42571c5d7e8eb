"""Recipes of image classifiers: one that trains with AdamW and averages the weights, and what all of them share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.configs.classifiers import CnnConfig, CnnFinetuneConfig
from training.data.image_batches import random_shifts, shift_and_mirror
from training.evaluation.calibration import accuracy_of
from training.loops.fit import Batches, averaged, descend
from training.run import cosine_schedule, set_learning_rate


class ClassifierRecipe:
    """The recipe of an image classifier; see ``training.loops.fit.Recipe``. Subclasses define ``train``.

    Args:
        network: the network.
        optimizer: its optimizer.
        images: uint8 [N, C, S, S], the whole data set, because augmentation may depend on the index of an image.
        labels: the labels [N].
        batches: chooses the images of each step.
        validation: indices of the images whose accuracy is logged; it may be empty.
    """

    def __init__(
        self,
        network: Any,
        optimizer: torch.optim.Optimizer,
        images: Any,
        labels: Tensor,
        batches: Batches,
        validation: Tensor,
    ) -> None:
        self.network, self.optimizer = network, optimizer
        self.images, self.labels, self.batches, self.validation = images, labels, batches, validation

    def train(self, batch: Tensor, step: int, done: float) -> Tensor:
        """Train for one step on the images with the indices ``batch``; return their mean loss."""
        raise NotImplementedError

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train for one step."""
        return {"loss": self.train(self.batches(step), step, done)}

    def validate(self, steps: int) -> dict[str, float]:
        """Return the accuracy on the validation images, of the averaged weights if there are any."""
        if not len(self.validation):
            return {}
        network = getattr(self, "average", self.network)
        accuracy = accuracy_of(network, self.images[self.validation], self.labels[self.validation])
        return {"validation_accuracy": accuracy}


class AveragedClassifier(ClassifierRecipe):
    """Trains with AdamW and a cosine schedule. ``average`` is the exponential moving average of the weights."""

    def __init__(self, config: CnnConfig, network: nn.Module, *data: Any) -> None:
        """``data``: the arguments of ``ClassifierRecipe`` after the optimizer."""
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, fused=True)
        super().__init__(network.train(), optimizer, *data)
        self.config, self.average = config, averaged(network, config.ema_decay, use_buffers=True)

    def train(self, batch: Tensor, step: int, done: float) -> Tensor:
        """Train for one step on the images with the indices ``batch``; return their mean loss."""
        config = self.config
        logits = self.network(augment(self.images[batch], config))
        loss = F.cross_entropy(logits, self.labels[batch], label_smoothing=config.label_smoothing)
        set_learning_rate(self.optimizer, config.learning_rate * cosine_schedule(done))
        descend(self.optimizer, loss)
        self.average.update_parameters(self.network)
        return loss


def augment(images: Tensor, config: CnnConfig) -> Tensor:
    """Rotate, mirror and shift uint8 images [N, C, S, S] at random. Reflected pixels fill the edges."""
    count = len(images)
    if config.rotate:
        angle = (torch.rand(count) * 2 - 1) * torch.pi / 180 * config.rotate
        zero = torch.zeros(count)
        theta = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1)
        grid = F.affine_grid(theta.view(count, 2, 3).to(images.device), list(images.shape), align_corners=False)
        images = F.grid_sample(images.float(), grid, align_corners=False, padding_mode="reflection")
    return randomly_shifted(images, config)


def randomly_shifted(images: Tensor, config: CnnConfig | CnnFinetuneConfig) -> Tensor:
    """Shift images [N, C, S, S] at random and, with ``config.flip``, mirror half of them."""
    shifts = random_shifts(len(images), config.shift)
    mirrored = torch.randint(2, (len(images), 1)) * config.flip == 1
    return shift_and_mirror(images, shifts, mirrored)
