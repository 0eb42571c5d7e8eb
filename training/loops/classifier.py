"""Recipes of image classifiers: one that trains with AdamW and averages the weights, and what all of them share."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.configs.classifiers import CnnConfig
from training.data.image_batches import shift_and_mirror
from training.evaluation.calibration import accuracy_of
from training.loops.fit import Batches, averaged
from training.run import cosine_schedule, set_learning_rate


class ClassifierTrainer(Protocol):
    """Holds a network and trains it step by step."""

    def update(self, images: Tensor, labels: Tensor, batch: Tensor, step: int, done: float) -> Tensor:
        """Train for one step on the images with the indices ``batch``; return their mean loss.

        ``images`` (uint8 [N, C, S, S]) and ``labels`` [N] are the whole data set, because augmentation may depend on
        the index of an image. ``step`` and ``done``: see ``Recipe.update``.
        """

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of the images [N, C, S, S] that the network classifies correctly."""

    def state(self) -> dict[str, Any]:
        """Return the objects that a resumed run restores, by name."""


class ClassifierRecipe:
    """The recipe of a trainer and its images; see ``training.loops.fit.Recipe``.

    ``validation``: indices of the images whose accuracy is logged; it may be empty.
    """

    def __init__(
        self, trainer: ClassifierTrainer, images: Tensor, labels: Tensor, batches: Batches, validation: Tensor
    ) -> None:
        self.trainer, self.images, self.labels = trainer, images, labels
        self.batches, self.validation = batches, validation

    def update(self, step: int, done: float) -> dict[str, Tensor]:
        """Train for one step."""
        return {"loss": self.trainer.update(self.images, self.labels, self.batches(step), step, done)}

    def validate(self, steps: int) -> dict[str, float]:
        """Return the accuracy on the validation images."""
        if not len(self.validation):
            return {}
        accuracy = self.trainer.accuracy(self.images[self.validation], self.labels[self.validation])
        return {"validation_accuracy": accuracy}

    def state(self) -> dict[str, Any]:
        """Return the objects that a resumed run restores, by name."""
        return self.trainer.state()


class AveragedTrainer:
    """Trains with AdamW and a cosine schedule. ``average`` is the exponential moving average of the weights."""

    def __init__(self, config: CnnConfig, network: nn.Module) -> None:
        self.config = config
        self.network = network.train()
        self.average = averaged(network, config.ema_decay, use_buffers=True)
        self.optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, fused=True)

    def update(self, images: Tensor, labels: Tensor, batch: Tensor, step: int, done: float) -> Tensor:
        """Train for one step; see ``ClassifierTrainer.update``."""
        config = self.config
        logits = self.network(augment(images[batch], config))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=config.label_smoothing)
        set_learning_rate(self.optimizer, config.learning_rate * cosine_schedule(done))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return loss

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of the images that the averaged weights classify correctly."""
        return accuracy_of(self.average, images, labels)

    def state(self) -> dict[str, Any]:
        """Return the objects that a resumed run restores, by name."""
        return {"network": self.network, "average": self.average, "optimizer": self.optimizer}


def augment(images: Tensor, config: CnnConfig) -> Tensor:
    """Rotate, mirror and shift uint8 images [N, C, S, S] at random. Reflected pixels fill the edges."""
    count = len(images)
    if config.rotate:
        angle = (torch.rand(count) * 2 - 1) * torch.pi / 180 * config.rotate
        zero = torch.zeros(count)
        theta = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1)
        grid = F.affine_grid(theta.view(count, 2, 3).to(images.device), list(images.shape), align_corners=False)
        images = F.grid_sample(images.float(), grid, align_corners=False, padding_mode="reflection")
    shifts = torch.randint(-config.shift, config.shift + 1, (2, count, 1))
    mirrored = torch.randint(2, (count, 1)) * config.flip == 1
    return shift_and_mirror(images, shifts, mirrored)
