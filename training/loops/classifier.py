"""One training step of an image classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from training.configs import CnnConfig
from training.data.image_batches import moved
from training.run import set_learning_rate


def augment(images: Tensor, config: CnnConfig) -> Tensor:
    """uint8 images [N, C, S, S] -> the same, mirrored, rotated and shifted at random; edges are reflected."""
    count = len(images)
    if config.rotate:
        angle = (torch.rand(count) * 2 - 1) * torch.pi / 180 * config.rotate
        zero = torch.zeros(count)
        theta = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1)
        grid = F.affine_grid(theta.view(count, 2, 3).to(images.device), list(images.shape), align_corners=False)
        images = F.grid_sample(images.float(), grid, align_corners=False, padding_mode="reflection")
    shifts = torch.randint(-config.shift, config.shift + 1, (2, count, 1))
    mirrored = torch.randint(2, (count, 1)) * config.flip == 1
    return moved(images, shifts, mirrored)


def update(
    network: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    config: CnnConfig,
    rate: float,
) -> Tensor:
    """One step on uint8 images [N, C, S, S]; gives the loss."""
    logits = network(augment(images, config))
    loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update_parameters(network)
    return loss
