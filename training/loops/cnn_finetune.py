"""The caller's own images: the loop of ``python -m training.cnn --images``, its figures and its pictures.

Begins with a network that knows other images, whose last layer is made anew: first this layer learns alone, then all
do, those that are not new at a lower rate. Or begins from nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app import store
from app.networks.cnn import WhitenedNet, WhitenedNetSizes
from app.tasks.classification import ImageClassifier
from app.tasks.precision import fast_bfloat16
from training.configs import CnnFinetuneConfig
from training.data import image_folders
from training.data.image_batches import (
    accuracy_of,
    fit_temperatures,
    plot_confusion,
    plot_mistakes,
    plot_samples,
    served_probabilities,
    shift_and_mirror,
)
from training.data.image_folders import ImageDataset
from training.evaluation.calibration import classification_metrics
from training.loops import airbench, distributed, time_budget
from training.loops.classifier import fit
from training.options import Options, base_version
from training.run import Run, cosine_schedule, metric

MAX_IMBALANCE = 1.5  # times as many images as the smallest class has, from which on classes are weighted
MIN_CALIBRATION_IMAGES = 50  # images that must validate for a temperature to be fitted on them
TEMPERATURE_RANGE = (0.4, 2.5)  # a few hundred images that are all read rightly would call for one of 0


class FinetuneLoss(nn.Module):
    """The cross-entropy of a network, weighted by class.

    A module, so that DistributedDataParallel averages its gradients.
    """

    weights: Tensor

    def __init__(self, network: WhitenedNet, weights: Tensor, config: CnnFinetuneConfig) -> None:
        super().__init__()
        self.network = network
        self.label_smoothing = config.label_smoothing
        self.use_bfloat16 = bool(config.bfloat16) and fast_bfloat16(weights.device)
        self.register_buffer("weights", weights)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of uint8 images [N, C, S, S] and labels [N]."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            logits = self.network(images)
        return F.cross_entropy(
            logits.float(), labels, self.weights, label_smoothing=self.label_smoothing, reduction="none"
        ).mean()


class FinetuneTrainer:
    """AdamW with a cosine schedule and separate learning rates for the last layer and for all layers before it.

    ``pretrained``: the layers before the last one have been trained before, so at first only the last one is trained.
    """

    def __init__(
        self, config: CnnFinetuneConfig, network: WhitenedNet, weights: Tensor, device: str, pretrained: bool
    ) -> None:
        self.config, self.pretrained = config, pretrained
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = distributed.data_parallel(FinetuneLoss(self.network, weights.to(device), config))
        head = list(self.network.head.parameters())
        others = [
            weight
            for name, weight in self.network.named_parameters()
            if weight.requires_grad and not name.startswith("head.")
        ]
        self.optimizer = torch.optim.AdamW(
            [{"params": head}, {"params": others}], weight_decay=config.weight_decay, fused=True
        )

    def update(self, images: Tensor, labels: Tensor, batch: Tensor, step: int, total: int) -> Tensor:
        """As in ClassifierTrainer; the loss is that of this process's share of the batch."""
        config = self.config
        head_steps = round(total * config.head_only_share) if self.pretrained else 0
        peak = config.pretrained_learning_rate if self.pretrained else config.scratch_learning_rate
        others_rate = peak * cosine_schedule(step - head_steps, total - head_steps) if step >= head_steps else 0.0
        head_rate = config.learning_rate * cosine_schedule(step, total)
        for group, rate in zip(self.optimizer.param_groups, (head_rate, others_rate), strict=True):
            group["lr"] = rate
        self.network.train(step >= head_steps)  # batch norms keep their statistics while only the last layer is trained
        shifts = torch.randint(-config.shift, config.shift + 1, (2, len(batch), 1))
        mirrored = torch.randint(2, (len(batch), 1)) * config.flip == 1
        augmented = shift_and_mirror(
            distributed.shard(images[batch]),
            shifts[:, distributed.rank() :: distributed.world_size()],
            distributed.shard(mirrored),
        )
        loss: Tensor = self.loss(augmented, distributed.shard(labels[batch]))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """As in ClassifierTrainer."""
        return accuracy_of(self.network, images, labels)

    def state(self) -> dict[str, Any]:
        """As in ClassifierTrainer."""
        return {"network": self.network, "optimizer": self.optimizer}


def initial_network(
    config: CnnFinetuneConfig, pictures: ImageDataset, learn: Tensor, base: store.Version | None
) -> WhitenedNet:
    """A network for the classes of these pictures: what ``base`` knows with a new last layer, or nothing yet."""
    side, classes = pictures.images.shape[-1], len(pictures.classes)
    if base is None:
        widths = (config.first_width, config.later_width, config.later_width)
        network = WhitenedNet(WhitenedNetSizes(classes, image=side, widths=widths))
        airbench.whiten(network, pictures.images[learn[:5000]])
        return network
    sizes = {**base.card.sizes, "classes": classes, "image": side, "label_smoothing": 0.0}
    network = WhitenedNet(WhitenedNetSizes(**{**sizes, "widths": tuple(sizes["widths"])}))
    known = base.network().state_dict()
    kept = {key: tensor for key, tensor in known.items() if key != "head.weight" and "temperature" not in key}
    network.load_state_dict(kept, strict=False)
    return network


def class_weights(counts: Sequence[int]) -> Tensor:
    """A weight [classes] for each class, so that all weigh alike; 1 for all where they are nearly even."""
    shares = torch.tensor(counts, dtype=torch.float32)
    if shares.max() <= MAX_IMBALANCE * shares.min():
        return torch.ones(len(shares))
    return shares.sum() / (len(shares) * shares)


def fine_tune(run: Run, config: CnnFinetuneConfig, pictures: ImageDataset, base: store.Version | None) -> WhitenedNet:
    """The whole training; gives the network, with its temperatures where enough images validate."""
    learn, validate, _ = pictures.split()
    device = run.options.device
    images, labels = pictures.images.to(device), pictures.labels.to(device)
    weights = class_weights(pictures.labels[learn].bincount(minlength=len(pictures.classes)).tolist())
    network = initial_network(config, pictures, learn, base)
    size = distributed.divisible_batch(min(config.batch, len(learn)))
    per_epoch = len(learn) // size

    def trial() -> Callable[[int], object]:
        trainer = FinetuneTrainer(config, copy.deepcopy(network), weights, device, base is not None)
        return lambda step: trainer.update(images, labels, learn[:size], step + 100, 200)

    epochs = time_budget.epochs_within_budget(run, per_epoch, config.epochs, trial)
    trainer = FinetuneTrainer(config, network, weights, device, base is not None)
    fit(run, trainer, images, labels, learn, validate, size, epochs)
    network.eval()
    if len(validate) >= MIN_CALIBRATION_IMAGES:
        fit_temperatures(network, images[validate], labels[validate])
        network.temperature.clamp_(*TEMPERATURE_RANGE)
        network.views_temperature.clamp_(*TEMPERATURE_RANGE)
    return network


def measure(classifier: ImageClassifier, pictures: ImageDataset) -> dict[str, Any]:
    """The figures of a published classifier on the test part of its pictures."""
    test = pictures.split()[2]
    probability, labels = served_probabilities(classifier, pictures.images[test]), pictures.labels[test]
    split = f"{len(test):,} images of {pictures.name} that took no part in the training"
    right = (probability.argmax(dim=1) == labels).double()
    each = torch.stack([right[labels == label].mean() for label in range(len(pictures.classes))])
    worst = pictures.classes[int(each.argmin())]
    commonest = labels.bincount().max().item() / len(labels)
    return {
        **classification_metrics(probability, labels, split),
        "worst_class_accuracy": metric(each.min().item(), f"{split}: those of {worst}"),
        "commonest_class": metric(commonest, f"{split}: what always naming the commonest class gets right"),
    }


def train(chosen: Options, config: CnnFinetuneConfig, argv: Sequence[str] | None) -> None:
    """Read, learn, measure, publish."""
    path: Path = chosen.data_options["images"]
    base = base_version(chosen, ("whitened-net",))
    pictures = image_folders.read(path, chosen.data_options["size"])
    image_folders.check_trainable(pictures, path)
    image_folders.print_summary(pictures)
    run = Run(chosen, config, argv, pictures.sha256)
    run.write_file("left-out.txt", "".join(f"{remark}\n" for remark in pictures.skipped))
    network = fine_tune(run, config, pictures, base)
    if distributed.rank() == 0:
        publish(run, pictures, network, base)
    distributed.exit_process()


def publish(run: Run, pictures: ImageDataset, network: WhitenedNet, base: store.Version | None) -> None:
    """Read the test part once, with the code that serves, and write the card."""
    sizes, (learn, validate, test) = network.sizes, pictures.split()
    begin = f"Begun with {base.card.name} {base.card.version}" if base else "Begun from nothing"
    fitted = (
        "the temperatures fitted on them"
        if len(validate) >= MIN_CALIBRATION_IMAGES
        else "too few to fit a temperature on"
    )
    card = {
        "task": "classify",
        "title": f"Tells {len(pictures.classes)} kinds of images apart: {', '.join(pictures.classes)}"[:200],
        "kind": "whitened-net",
        "sizes": asdict(sizes),
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "outputs": [{"name": "probabilities", "dtype": "float64", "shape": [-1, sizes.classes]}],
        "labels": pictures.classes,
        "data": {f"images:{pictures.name}": pictures.sha256}
        | ({f"{base.card.name}@{base.card.version}": base.card.weights_sha256} if base else {}),
        "notes": (
            f"{begin}. {pictures.describe_classes()}: {len(learn):,} for training, {len(validate):,} for validation "
            f"({fitted}), {len(test):,} for testing. {len(pictures.skipped):,} files were skipped."
        ),
    }
    classifier = run.predictor(ImageClassifier, card, network)
    card["metrics"] = measure(classifier, pictures)
    images, truth = pictures.images[test], pictures.labels[test]
    probability = served_probabilities(classifier, images)
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:24]
    labels, folder = pictures.classes, run.folder
    drawn = {
        "curves.png": run.plot_curves(),
        "samples.png": plot_samples(folder / "samples.png", images[some], labels, probability[some], truth[some]),
        "confusion.png": plot_confusion(folder / "confusion.png", labels, truth, probability.argmax(dim=1)),
        "mistakes.png": plot_mistakes(folder / "mistakes.png", images, labels, probability, truth),
    }
    run.finish(card, network, drawn)
