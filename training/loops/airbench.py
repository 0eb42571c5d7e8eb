"""The recipes airbench95 and airbench96 for the whitened network.

Whitening, optimizer, schedule of the learning rate and look-ahead follow legacy/airbench95.py and airbench96_faster.py
in the GitHub repository KellerJordan/cifar10-airbench. So do the masks and the selection of images in airbench96.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.cnn import WhitenedNet, WhitenedNetSizes
from training.configs.classifiers import AirbenchConfig
from training.data.image_batches import corrupted, masked, random_shifts, shift_and_mirror
from training.loops.classifier import ClassifierRecipe
from training.loops.fit import autocast, descend
from training.run import derive_seed, set_learning_rate

MOMENTUM = 0.85
BIAS_FACTOR = 64  # factor of the learning rate for the biases of the batch norms
LOOKAHEAD_INTERVAL = 5  # steps between two look-aheads
WHITENING_EPSILON = 5e-4  # added to the variances, so that directions with little variance are not amplified much
SELECTOR_WIDTHS = (32, 64, 64)
SELECTOR_INTERVAL = 4  # steps between two updates of the network that selects images


@torch.no_grad()
def whiten(network: WhitenedNet, images: Tensor) -> None:
    """Set the network's pixel mean and deviation, and the filters of its first layer, from uint8 images [N, C, S, S].

    The filters are the eigenvectors of the covariance matrix of 2x2 patches, and their negatives. They are scaled so
    that their outputs have unit variance.
    """
    pixels = images.double()
    network.mean.copy_(pixels.mean(dim=(0, 2, 3)).view(-1, 1, 1))
    network.deviation.copy_(pixels.std(dim=(0, 2, 3)).clamp(min=1).view(-1, 1, 1))  # a channel may be constant
    patches = F.unfold((pixels - network.mean) / network.deviation, 2)  # [N, C * 4, places]
    patches = patches.transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(patches @ patches.T / patches.shape[1])
    filters = (vectors / (values + WHITENING_EPSILON).sqrt()).T.view(-1, images.shape[1], 2, 2)
    network.whiten.weight.copy_(torch.cat([filters, -filters]))


def sgd(network: nn.Module, rate: float, decay: float, batch: int) -> torch.optim.SGD:
    """Return an SGD optimizer with Nesterov momentum, for a loss that is summed over the batch.

    ``rate`` and ``decay`` are given per 1,024 images, so they do not depend on the momentum and the batch size. The
    effect of ``decay`` does not depend on ``rate``. ``set_learning_rate`` multiplies the peak learning rate of each
    parameter group, ``initial``.
    """
    per_image = 1 / (1024 * (1 + 1 / (1 - MOMENTUM)))
    rate, decay = rate * per_image, decay * batch * per_image
    trained = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    biases = [weight for name, weight in trained if "norm" in name]
    others = [weight for name, weight in trained if "norm" not in name]
    groups = [
        {"params": weights, "lr": peak, "initial": peak, "weight_decay": decay / peak}
        for weights, peak in ((biases, rate * BIAS_FACTOR), (others, rate))
    ]
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)


def triangular_schedule(done: float, warm_up: float, final: float) -> float:
    """Return the factor of the learning rate when the share ``done`` of the steps is done.

    It rises linearly from 0.2 to 1 during ``warm_up``, a share of the steps, and then falls linearly to ``final``.
    """
    if done < warm_up:
        return 0.2 + 0.8 * done / warm_up
    return 1 - (1 - final) * (done - warm_up) / (1 - warm_up)


class Lookahead(nn.Module):
    """Keeps an average of the trained weights, the slow weights, and copies them to the network every few steps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.slow = copy.deepcopy(network)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int, done: float) -> None:
        """Update the slow weights and the network every LOOKAHEAD_INTERVAL steps. Call this method after every step.

        ``step`` counts from 0. After the last step, when ``done`` is 1, the network has the slow weights.
        """
        if (step + 1) % LOOKAHEAD_INTERVAL == 0:
            self._interpolate(network, 0.95**5 * done**3)
        if done >= 1:
            self._interpolate(network, 1.0)

    def _interpolate(self, network: nn.Module, decay: float) -> None:
        for slow, tensor in zip(self.slow.state_dict().values(), network.state_dict().values(), strict=True):
            if tensor.is_floating_point():
                tensor.copy_(slow.lerp_(tensor, 1 - decay))


class Selector:
    """Selects the images of each batch from which a network learns most: those with the largest loss.

    The losses are those of a small network with the same first layer, which is trained at the same time.
    """

    def __init__(self, config: AirbenchConfig, network: WhitenedNet) -> None:
        self.count = config.selected
        self.label_smoothing = config.label_smoothing
        small = WhitenedNet(WhitenedNetSizes(widths=SELECTOR_WIDTHS, label_smoothing=config.label_smoothing))
        small.whiten.load_state_dict(network.whiten.state_dict())
        small.whiten.requires_grad_(False)
        small.mean.copy_(network.mean)
        small.deviation.copy_(network.deviation)
        device = network.mean.device
        self.network = small.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.optimizer = sgd(self.network, config.learning_rate, config.weight_decay, config.batch)

    def select(self, images: Tensor, labels: Tensor, step: int, rate: float) -> Tensor:
        """Return the indices of the selected images. Train the small network in every SELECTOR_INTERVAL-th step.

        Args:
            images: augmented images, uint8 [N, C, S, S].
            labels: class indices [N].
            step: number of the step, from 0.
            rate: factor of the learning rate.
        """
        train = step % SELECTOR_INTERVAL == 0
        with torch.set_grad_enabled(train):
            scores = self.network.scores(images)
            losses = F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing, reduction="none")
        selected = losses.detach().topk(min(self.count, len(losses))).indices
        if train:
            set_learning_rate(self.optimizer, rate)
            descend(self.optimizer, losses[selected].sum())
        return selected


class AirbenchRecipe(ClassifierRecipe):
    """Trains with SGD, Nesterov momentum and look-ahead. Each image is mirrored in every second epoch.

    ``data``: the arguments of ``ClassifierRecipe`` after the optimizer.
    """

    def __init__(self, config: AirbenchConfig, network: WhitenedNet, *data: Any) -> None:
        super().__init__(network.train(), sgd(network, config.learning_rate, config.weight_decay, config.batch), *data)
        self.config = config
        self.slow = Lookahead(network)
        self.selector = Selector(config, network) if config.selected else None
        if self.selector is not None:
            self.selector_network, self.selector_optimizer = self.selector.network, self.selector.optimizer
        generator = torch.Generator().manual_seed(derive_seed(self.batches.seed, "mirrored"))
        # 1: mirror in even epochs; 0: in odd ones
        self.mirrored = torch.randint(2, (len(self.labels), 1), generator=generator)

    def train(self, batch: Tensor, step: int, done: float) -> Tensor:
        """Train for one step on the images with the indices ``batch``; return their mean loss.

        On GPUs and on CPUs with fast bfloat16 instructions, the convolutions compute in bfloat16, which takes 0.55 of
        the time of float32. The weights, their averages and the loss stay in float32.
        """
        config, network, images, labels = self.config, self.network, self.images[batch], self.labels[batch]
        rate = triangular_schedule(done, config.warm_up, config.final_rate)
        epoch = step // self.batches.per_epoch
        network.whiten.get_parameter("bias").requires_grad_(epoch < config.whiten_epochs)
        images = shift_and_mirror(
            images, random_shifts(len(batch), config.shift), (self.mirrored[batch] + epoch) % 2 == 1
        )
        if config.cutout:
            images = masked(images, config.cutout, network.mean)
        if self.selector is not None:
            selected = self.selector.select(images, labels, step, rate)
            images, labels = images[selected], labels[selected]
        images = corrupted(images, config.corrupted)
        with autocast(images.device):
            logits = network.scores(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing, reduction="sum")
        set_learning_rate(self.optimizer, rate)
        descend(self.optimizer, loss)
        self.slow.update(network, step, done)
        return loss / len(labels)

    def validate(self, steps: int) -> dict[str, float]:
        """Return the accuracy on the validation images."""
        with autocast(self.images.device):
            return super().validate(steps)
