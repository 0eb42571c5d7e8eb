"""Fine-tune the last blocks of a pretrained network on augmented images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.efficientnet import EfficientNetLite
from app.tasks.precision import fast_bfloat16
from training.configs.classifiers import CnnFinetuneConfig
from training.data.image_dataset import ImageDataset
from training.loops.classifier import ClassifierRecipe
from training.loops.fit import Batches, descend, fit
from training.loops.photos.linear_head import loss_of
from training.run import Budget, Run, cosine_schedule, set_learning_rate

TUNED_BLOCKS = 5  # number of blocks at the end that are trained; the side of their outputs is 1/32 of the image's side
MIN_SCALE = 0.4  # smallest area of a random crop, as a share of the image
JITTER = 0.2  # largest relative change of brightness, contrast and saturation


def augmentation(side: int, flip: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that augments uint8 images [N, C, S, S] at random.

    It crops the images, changes their colours and, if ``flip`` is true, mirrors some of them.
    """
    from torchvision.transforms import v2  # imported here, because it takes 1.7 s and few commands need it

    steps: list[nn.Module] = [v2.RandomResizedCrop(side, scale=(MIN_SCALE, 1.0), antialias=True)]
    steps += [v2.ColorJitter(JITTER, JITTER, JITTER)]
    steps += [v2.RandomHorizontalFlip()] if flip else []
    change = v2.Compose(steps)
    return lambda images: torch.stack([change(image) for image in images])


class LastBlocksRecipe(ClassifierRecipe):
    """Trains the last blocks and layers with AdamW and a cosine schedule. Earlier layers are not trained.

    ``data``: the arguments of ``ClassifierRecipe`` after the optimizer.
    """

    def __init__(self, config: CnnFinetuneConfig, network: EfficientNetLite, device: str, *data: Any) -> None:
        network = network.to(device, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
        trained = nn.ModuleList([*list(network.blocks)[-TUNED_BLOCKS:], network.last, network.head])
        weights = trained.requires_grad_(True).parameters()
        super().__init__(network, torch.optim.AdamW(weights, weight_decay=config.weight_decay, fused=True), *data)
        self.config, self.device = config, torch.device(device)
        self.use_bfloat16 = bool(config.bfloat16) and fast_bfloat16(self.device)
        self.augment = augmentation(network.sizes.image, bool(config.flip))

    def logits(self, pixels: Tensor) -> Tensor:
        """Return the logits [N, classes] of uint8 images [N, C, S, S]."""
        network = self.network
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            with torch.no_grad():
                x = F.relu6(network.stem(network.scaled(pixels)))
                for block in network.blocks[:-TUNED_BLOCKS]:
                    x = block(x)
            for block in network.blocks[-TUNED_BLOCKS:]:
                x = block(x)
            maps = F.relu6(network.last(x))
        return F.linear(maps.float().mean(dim=(2, 3)), network.head.weight, network.head.bias)

    def train(self, batch: Tensor, step: int, done: float) -> Tensor:
        """Train for one step on the images with the indices ``batch``; return their mean loss."""
        set_learning_rate(self.optimizer, self.config.finetune_learning_rate * cosine_schedule(done))
        logits = self.logits(self.augment(self.images[batch]).to(self.device))
        loss = loss_of(logits, self.labels[batch].to(self.device))
        descend(self.optimizer, loss)
        return loss


def tune(
    run: Run,
    config: CnnFinetuneConfig,
    network: EfficientNetLite,
    dataset: ImageDataset,
    indices: Tensor,
    budget: Budget,
) -> EfficientNetLite:
    """Train the last blocks of ``network`` on the images ``indices``; return the network."""
    batches, device = Batches(indices, config.finetune_batch, run.options.seed), run.options.device
    recipe = LastBlocksRecipe(config, network, device, dataset.images, dataset.labels, batches, indices[:0])
    fit(run, recipe, budget, config.finetune_epochs)
    return network.eval().requires_grad_(False)
