"""Image classifiers for own images: ``python -m training.cnn --images``.

Fine-tunes a published network: its last layer is replaced and trained alone first, then all layers are trained, the
pretrained ones with a lower learning rate. ``--from scratch`` trains a new network instead.
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

MAX_IMBALANCE = 1.5  # images of the largest class over those of the smallest; above it, classes are weighted
MIN_CALIBRATION_IMAGES = 50  # with fewer validation images, no temperatures are fitted
TEMPERATURE_RANGE = (0.4, 2.5)  # with few images that are all classified correctly, the best fit would be 0


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
    config: CnnFinetuneConfig, dataset: ImageDataset, train_indices: Tensor, base: store.Version | None
) -> WhitenedNet:
    """A network for the classes of the dataset: ``base`` with a new last layer, or a new network without ``base``."""
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


def class_weights(counts: Sequence[int]) -> Tensor:
    """Loss weights [classes] that give all classes the same total weight; 1 for nearly even classes."""
    shares = torch.tensor(counts, dtype=torch.float32)
    if shares.max() <= MAX_IMBALANCE * shares.min():
        return torch.ones(len(shares))
    return shares.sum() / (len(shares) * shares)


def fine_tune(run: Run, config: CnnFinetuneConfig, dataset: ImageDataset, base: store.Version | None) -> WhitenedNet:
    """Train and return the network; with enough validation images, its temperatures are fitted."""
    train_indices, validation, _ = dataset.split()
    device = run.options.device
    images, labels = dataset.images.to(device), dataset.labels.to(device)
    weights = class_weights(dataset.labels[train_indices].bincount(minlength=len(dataset.classes)).tolist())
    network = initial_network(config, dataset, train_indices, base)
    size = distributed.divisible_batch(min(config.batch, len(train_indices)))
    per_epoch = len(train_indices) // size

    def start_dummy_run() -> Callable[[int], object]:
        trainer = FinetuneTrainer(config, copy.deepcopy(network), weights, device, base is not None)
        return lambda step: trainer.update(images, labels, train_indices[:size], step + 100, 200)

    def rehearse() -> float:
        publish(run, dataset, copy.deepcopy(network).eval(), base)
        return 0.0

    budget = time_budget.plan(run, config.epochs * per_epoch, start_dummy_run, rehearse)
    trainer = FinetuneTrainer(config, network, weights, device, base is not None)
    fit(run, trainer, images, labels, train_indices, validation, size, budget)
    network.eval()
    if len(validation) >= MIN_CALIBRATION_IMAGES:
        fit_temperatures(network, images[validation], labels[validation])
        network.temperature.clamp_(*TEMPERATURE_RANGE)
        network.views_temperature.clamp_(*TEMPERATURE_RANGE)
    return network


def measure(classifier: ImageClassifier, dataset: ImageDataset) -> dict[str, Any]:
    """The metrics of a published classifier on the test part of its dataset."""
    test = dataset.split()[2]
    probability, labels = served_probabilities(classifier, dataset.images[test]), dataset.labels[test]
    split = f"{len(test):,} images of {dataset.name} that were not used in training"
    correct = (probability.argmax(dim=1) == labels).double()
    class_accuracy = torch.stack([correct[labels == label].mean() for label in range(len(dataset.classes))])
    worst = dataset.classes[int(class_accuracy.argmin())]
    majority_share = labels.bincount().max().item() / len(labels)
    return {
        **classification_metrics(probability, labels, split),
        "worst_class_accuracy": metric(class_accuracy.min().item(), f"{split}: class {worst}"),
        "commonest_class": metric(majority_share, f"{split}: accuracy of always predicting the most common class"),
    }


def train(options: Options, config: CnnFinetuneConfig, argv: Sequence[str] | None) -> None:
    """Train on own images and publish."""
    path: Path = options.data_options["images"]
    base = base_version(options, ("whitened-net",))
    dataset = image_folders.read(path, options.data_options["size"])
    image_folders.check_trainable(dataset, path)
    image_folders.print_summary(dataset)
    run = Run(options, config, argv, dataset.sha256)
    run.write_file("skipped.txt", "".join(f"{reason}\n" for reason in dataset.skipped))
    network = fine_tune(run, config, dataset, base)
    if distributed.rank() == 0:
        publish(run, dataset, network, base)
    distributed.exit_process()


def publish(run: Run, dataset: ImageDataset, network: WhitenedNet, base: store.Version | None) -> None:
    """Evaluate on the test part with the serving code, write the card, and publish."""
    sizes, (train_indices, validation, test) = network.sizes, dataset.split()
    start = f"Fine-tuned from {base.card.name} {base.card.version}" if base else "Trained from scratch"
    fitted = (
        "used to fit the temperatures"
        if len(validation) >= MIN_CALIBRATION_IMAGES
        else "too few to fit the temperatures"
    )
    card = {
        "task": "classify",
        "title": f"Classifies images into {len(dataset.classes)} classes: {', '.join(dataset.classes)}"[:200],
        "kind": "whitened-net",
        "sizes": asdict(sizes),
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "outputs": [{"name": "probabilities", "dtype": "float64", "shape": [-1, sizes.classes]}],
        "labels": dataset.classes,
        "data": {f"images:{dataset.name}": dataset.sha256}
        | ({f"{base.card.name}@{base.card.version}": base.card.weights_sha256} if base else {}),
        "notes": (
            f"{start}. {dataset.describe_classes()}: {len(train_indices):,} for training, {len(validation):,} for "
            f"validation ({fitted}), {len(test):,} for testing. {len(dataset.skipped):,} files were skipped."
        ),
    }
    classifier = run.predictor(ImageClassifier, card, network)
    card["metrics"] = measure(classifier, dataset)
    images, truth = dataset.images[test], dataset.labels[test]
    probability = served_probabilities(classifier, images)
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:24]
    labels, folder = dataset.classes, run.folder
    pictures = {
        "curves.png": run.plot_curves(),
        "samples.png": plot_samples(folder / "samples.png", images[some], labels, probability[some], truth[some]),
        "confusion.png": plot_confusion(folder / "confusion.png", labels, truth, probability.argmax(dim=1)),
        "mistakes.png": plot_mistakes(folder / "mistakes.png", images, labels, probability, truth),
    }
    run.finish(card, network, pictures)
