"""The training loop that image classifiers share, and a trainer that uses AdamW and averages the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.configs import CnnConfig
from training.data.image_batches import batches, shift_and_mirror
from training.evaluation.calibration import accuracy_of
from training.run import Run, cosine_schedule, set_learning_rate


class ClassifierTrainer(Protocol):
    """The interface of the trainers. A trainer holds a network and trains it step by step."""

    def update(self, images: Tensor, labels: Tensor, batch: Tensor, step: int, total: int) -> Tensor:
        """Train for one step on the images with the indices ``batch``; return their mean loss.

        ``images`` (uint8 [N, C, S, S]) and ``labels`` [N] are the whole data set, because augmentation may depend on
        the index of an image. ``step`` counts from 0 to ``total`` - 1.
        """

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of the images [N, C, S, S] that the network classifies correctly."""

    def state(self) -> dict[str, Any]:
        """Return the objects that a resumed run restores, by name."""


def fit(
    run: Run,
    trainer: ClassifierTrainer,
    images: Tensor,
    labels: Tensor,
    train: Tensor,
    validation: Tensor,
    batch: int,
    total: Callable[[], int],
) -> None:
    """Train on the images with the indices ``train``. Log loss and validation accuracy after each epoch and at the end.

    ``total`` returns the number of steps, which may change during training.
    """
    run.track(**trainer.state())
    per_epoch = len(train) // batch
    for step, epoch, indices in batches(run, train, batch, total):
        steps = total()
        loss = trainer.update(images, labels, indices, step, steps)
        if (step + 1) % per_epoch == 0 or step + 1 == steps:
            accuracy = trainer.accuracy(images[validation], labels[validation])
            run.log(epoch=epoch + 1, loss=loss.item(), validation_accuracy=accuracy)


class AveragedTrainer:
    """Trains with AdamW and a cosine schedule. ``average`` is the exponential moving average of the weights."""

    def __init__(self, config: CnnConfig, network: nn.Module) -> None:
        self.config = config
        self.network = network.train()
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
        self.optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, fused=True)

    def update(self, images: Tensor, labels: Tensor, batch: Tensor, step: int, total: int) -> Tensor:
        """Train for one step; see ``ClassifierTrainer.update``."""
        config = self.config
        logits = self.network(augment(images[batch], config))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=config.label_smoothing)
        set_learning_rate(self.optimizer, config.learning_rate * cosine_schedule(step, total))
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
