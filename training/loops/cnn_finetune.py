"""Train image classifiers on your own images: ``quartet train cnn --images``.

A published network is fine-tuned. A new last layer replaces the old last layer, and is trained alone at first. Then all
layers are trained, with a lower learning rate for the pretrained layers. ``--from scratch`` trains a new network
instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.networks.cnn import WhitenedNet, WhitenedNetSizes
from app.store.version import Version
from training import cards
from training.configs.classifiers import CnnFinetuneConfig
from training.data.image_dataset import ImageDataset
from training.evaluation.calibration import TEMPERATURE_RANGE, fit_temperatures
from training.evaluation.image_classifier import measured
from training.loops import airbench
from training.loops.classifier import ClassifierRecipe, randomly_shifted
from training.loops.fit import Batches, autocast, descend, fit
from training.options import Options, base_version
from training.run import Budget, Run, cosine_schedule

MIN_CALIBRATION_IMAGES = 50  # with fewer validation images, no temperatures are fitted


class FinetuneRecipe(ClassifierRecipe):
    """Trains with AdamW and a cosine schedule. The last layer has another learning rate than the layers before it.

    ``pretrained``: whether the layers before the last layer are pretrained. If so, the last layer is first trained
    alone. The classes have no weights, so that the probabilities follow the frequencies of the classes. ``data``: the
    arguments of ``ClassifierRecipe`` after the optimizer.
    """

    def __init__(self, config: CnnFinetuneConfig, network: WhitenedNet, pretrained: bool, *data: Any) -> None:
        weights: dict[bool, list[Tensor]] = {True: [], False: []}  # those of the last layer, and the others
        for name, weight in network.named_parameters():
            if weight.requires_grad:
                weights[name.startswith("head.")].append(weight)
        groups = [{"params": own} for own in weights.values()]
        super().__init__(network, torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True), *data)
        self.config, self.pretrained = config, pretrained

    def train(self, batch: Tensor, step: int, done: float) -> Tensor:
        """Train for one step on the images with the indices ``batch``; return their mean loss."""
        config, images = self.config, self.images[batch]
        head_only = config.head_only_share if self.pretrained else 0.0
        peak = config.pretrained_learning_rate if self.pretrained else config.scratch_learning_rate
        others_rate = peak * cosine_schedule((done - head_only) / (1 - head_only)) if done > head_only else 0.0
        head_rate = config.learning_rate * cosine_schedule(done)
        for group, rate in zip(self.optimizer.param_groups, (head_rate, others_rate), strict=True):
            group["lr"] = rate
        self.network.train(done > head_only)  # batch norms keep their statistics while only the last layer is trained
        images = randomly_shifted(images, config)
        with autocast(images.device):
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), self.labels[batch], label_smoothing=config.label_smoothing)
        descend(self.optimizer, loss)
        return loss


def initial_network(
    config: CnnFinetuneConfig, dataset: ImageDataset, train_indices: Tensor, base: Version | None
) -> WhitenedNet:
    """Return a network for the classes of the dataset.

    The network is ``base`` with a new last layer or, if ``base`` is None, a new network.
    """
    side, classes = dataset.images.shape[-1], len(dataset.classes)
    if base is None:
        widths = (config.first_width, config.later_width, config.later_width)
        network = WhitenedNet(WhitenedNetSizes(classes, image=side, widths=widths))
        airbench.whiten(network, dataset.images[train_indices[:5000]])
        return network
    sizes = {**base.card.sizes, "classes": classes, "image": side, "label_smoothing": 0.0}
    network = WhitenedNet(WhitenedNetSizes(**{**sizes, "widths": tuple(sizes["widths"])}))
    state = base.network().state_dict()
    pretrained = {key: tensor for key, tensor in state.items() if key != "head.weight" and "temperature" not in key}
    network.load_state_dict(pretrained, strict=False)
    return network


def fit_network(
    run: Run,
    config: CnnFinetuneConfig,
    dataset: ImageDataset,
    base: Version | None,
    indices: Tensor,
    validation: Tensor,
    steps: int | None = None,
) -> WhitenedNet:
    """Train a network on the images ``indices``, and return it.

    ``steps``: the number of steps. None: the options determine the duration.
    """
    options, batches = run.options, Batches(indices, config.batch, run.options.seed)
    network = initial_network(config, dataset, indices, base)
    network = network.to(options.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = dataset.images.to(options.device), dataset.labels.to(options.device)
    recipe = FinetuneRecipe(config, network, base is not None, images, labels, batches, validation)
    planned = run.budget(config.epochs * batches.per_epoch, options.refits)
    fit(run, recipe, planned if steps is None else Budget(steps), config.epochs)
    return network.eval()


def train(options: Options, config: CnnFinetuneConfig, argv: Sequence[str] | None, dataset: ImageDataset) -> None:
    """Train a classifier on your own images, evaluate it and publish it."""
    base = base_version(options, ("whitened-net",), "cifar10-whitened")
    if base:
        cards.reject_seen(base.card, f"--from {base.label}", dataset.data, dataset.images.shape[-1])
    run = Run(options, config, argv, dataset.sha256)
    run.write_lines("skipped.txt", dataset.skipped)
    train_indices, validation, test = dataset.split()
    network = fit_network(run, config, dataset, base, train_indices, validation)
    if calibrates := len(validation) >= MIN_CALIBRATION_IMAGES:
        images, labels = (part[validation].to(options.device) for part in (dataset.images, dataset.labels))
        fit_temperatures(network, images, labels)
        network.temperature.clamp_(*TEMPERATURE_RANGE)
        network.views_temperature.clamp_(*TEMPERATURE_RANGE)
    start = f"Fine-tuned from {base.card.name} {base.card.version}" if base else "Trained from scratch"
    fitted = "used to fit the temperatures" if calibrates else "too few to fit the temperatures"
    fields = {
        "kind": "whitened-net",
        "ancestors": cards.ancestors(base.card, "base") if base else None,
        "notes": (
            f"{start}. {dataset.describe_classes()}: {len(train_indices):,} for training, {len(validation):,} for "
            f"validation ({fitted}), {len(test):,} for testing. {len(dataset.skipped):,} files were skipped."
        ),
    }
    card, pictures = measured(run, fields, network, dataset, validation)
    if options.refits:
        steps, first, every = run.step, network, torch.arange(len(dataset.labels))
        torch.manual_seed(options.seed)  # the state of the generator differs in a resumed run
        run.begin_refit()
        network = fit_network(run, config, dataset, base, every, every[:0], steps)
        network.temperature.copy_(first.temperature)
        network.views_temperature.copy_(first.views_temperature)
        card = cards.after_refit(card, steps)
    run.finish(card, network, *pictures)
