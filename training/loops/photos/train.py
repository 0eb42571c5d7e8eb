"""Train classifiers for users' photographs: ``quartet train cnn --images`` with images above 64 pixels.

A pretrained network computes the features of all images once. Then a new last layer is fitted to these features. With
enough images, the last blocks of the network are fine-tuned too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.networks.efficientnet import EfficientNetLite
from app.tasks.precision import fast_bfloat16
from training import cards
from training.configs.classifiers import CnnFinetuneConfig
from training.data.datasets import DataError
from training.data.image_dataset import ImageDataset
from training.evaluation.calibration import divide_logits, limited_temperature
from training.evaluation.image_classifier import best_thresholds, measured
from training.limits import limits
from training.loops.classifier import ClassifierRecipe
from training.loops.fit import Batches, autocast, descend, fit
from training.loops.photos import linear_head, pretrained
from training.loops.photos.features import BATCH, FeatureCache
from training.loops.photos.linear_head import ChosenPenalty, loss_of
from training.options import Options, base_version
from training.run import Budget, Run, cosine_schedule, set_learning_rate

KIND = "efficientnet-lite"
TUNED_BLOCKS = 5  # number of blocks at the end that are trained; the side of their outputs is 1/32 of the image's side
MIN_SCALE = 0.4  # smallest area of a random crop, as a share of the image
JITTER = 0.2  # largest relative change of brightness, contrast and saturation

MAX_DEFAULT_STEPS = 300  # largest number of fine-tuning steps without --minutes


@dataclass(frozen=True)
class Base:
    """The network from which training starts, and the fields about it on the card of the trained network."""

    network: EfficientNetLite
    name: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A trained network.

    Attributes:
        network: the network.
        choice: the penalty of the last layer, with the results of its cross-validation.
        indices: indices of the images for validation or cross-validation.
        logits: logits [len(indices), classes] of these images, from networks that were not trained on them.
        steps: the steps of fine-tuning; 0 if only the last layer was fitted.
        temperature: the number by which the logits of the network are divided after fine-tuning.
    """

    network: EfficientNetLite
    choice: ChosenPenalty
    indices: Tensor
    logits: Tensor
    steps: int = 0
    temperature: float = 1.0


def read_base(options: Options, dataset: ImageDataset) -> Base:
    """Return the network given by ``--from``.

    Raises:
        DataError: the network cannot be used, or it may know images of the test part.
    """
    origin: str | None = options.origin
    if origin in (None, pretrained.NAME):
        return Base(pretrained.load(), pretrained.NAME, {"licence": pretrained.LICENCE, "source": pretrained.SOURCE})
    if origin == "scratch":
        raise DataError("--from scratch needs --size 32 or --size 64: larger networks start from efficientnet-lite0")
    version = base_version(options, (KIND,), advice="")
    assert version is not None
    card = version.card
    cards.reject_seen(card, f"--from {version.label}", dataset.data, dataset.images.shape[-1])
    fields = {"ancestors": cards.ancestors(card, "base"), "licence": card.licence, "source": card.source}
    return Base(version.network(), version.label, fields)


def train(options: Options, config: CnnFinetuneConfig, argv: Sequence[str] | None, dataset: ImageDataset) -> None:
    """Train a classifier on the user's images and publish it."""
    base = read_base(options, dataset)
    run = Run(options, config, argv, dataset.sha256)
    run.write_lines("skipped.txt", dataset.skipped)
    training = PhotoTraining(run, config, dataset, base)
    result = training.best()
    card, pictures = training.measured(result)
    network = result.network
    if options.refits:
        network, steps = training.refitted(result)
        card = cards.after_refit(card, steps, "all" if result.steps else "last")
    run.finish(card, network, *pictures, has_curves=result.steps > 0)


@dataclass(frozen=True)
class PhotoTraining:
    """The steps of a training on photographs. ``base`` is the network from which it starts."""

    run: Run
    config: CnnFinetuneConfig
    dataset: ImageDataset
    base: Base

    def best(self) -> Result:
        """Fit a new last layer and, if there are enough images, fine-tune the network; return the better network."""
        train_indices, validation, _ = self.dataset.split()
        known = torch.cat([train_indices, validation]).sort().values
        dataset, folds = self.dataset, self.dataset.folds(known, linear_head.FOLDS)
        choice = linear_head.choose(self.features(known), dataset.labels[known], folds, len(dataset.classes))
        head_only = Result(self.new_head(known, choice), choice, known, choice.logits)
        enough = len(train_indices) >= limits().min_tuned_images and len(validation) >= limits().min_calibration_images
        return self.fine_tuned(head_only) if self.config.finetune_epochs and enough else head_only

    def refitted(self, result: Result) -> tuple[EfficientNetLite, int]:
        """Return a network that is trained like that of ``result`` on all images, and the number of steps."""
        every = torch.arange(len(self.dataset.labels))
        network = self.new_head(every, result.choice)
        if not result.steps:
            return network, linear_head.MAX_STEPS
        self.run.begin_refit()
        return divide_logits(self.tune(network, every, Budget(result.steps)), result.temperature), result.steps

    def fine_tuned(self, head_only: Result) -> Result:
        """Fine-tune a network whose last layer is fitted to the training part.

        Return the fine-tuned network, or ``head_only`` if the network before fine-tuning has a lower loss on the
        validation part.
        """
        train_indices, validation, _ = self.dataset.split()
        targets, choice = self.dataset.labels[validation], head_only.choice
        start = self.new_head(train_indices, choice)
        size = min(self.config.finetune_batch, len(train_indices))
        steps = min(self.config.finetune_epochs * (len(train_indices) // size), MAX_DEFAULT_STEPS)
        before = self.logits(start, validation)
        network = self.tune(start, train_indices, self.run.budget(steps, self.run.options.refits))
        after = self.logits(network, validation)
        temperatures = [limited_temperature(logits, targets) for logits in (before, after)]
        before, after = before / temperatures[0], after / temperatures[1]
        losses = [float(loss_of(logits, targets)) for logits in (before, after)]
        print(f"validation loss: {losses[0]:.4f} with a new last layer, {losses[1]:.4f} after fine-tuning")
        if losses[1] >= losses[0]:
            print("fine-tuning did not help, so the network with a new last layer is used")
            return head_only
        network = divide_logits(network, temperatures[1])
        return Result(network, choice, validation, after, self.run.step, temperatures[1])

    def tune(self, network: EfficientNetLite, indices: Tensor, budget: Budget) -> EfficientNetLite:
        """Train the last blocks of ``network`` on the images ``indices``; return the network."""
        config, dataset, options = self.config, self.dataset, self.run.options
        batches = Batches(indices, config.finetune_batch, options.seed)
        data = dataset.images, dataset.labels, batches, indices[:0]
        fit(self.run, LastBlocksRecipe(config, network, options.device, *data), budget, config.finetune_epochs)
        return network.eval().requires_grad_(False)

    def logits(self, network: EfficientNetLite, indices: Tensor) -> Tensor:
        """Return the logits [len(indices), classes] of the images with these indices."""
        device = network.head.weight.device
        with torch.inference_mode():
            parts = [network(self.dataset.images[part].to(device)).cpu() for part in indices.split(BATCH)]
        return torch.cat(parts).clone()

    def features(self, indices: Tensor) -> list[Tensor]:
        """Return the features [len(indices), D] of each view: the image and, with ``config.flip``, its mirror image."""
        options = self.run.options
        device, network = torch.device(options.device), copy.deepcopy(self.base.network)
        network.to(device, memory_format=network.memory_format).eval().requires_grad_(False)  # type: ignore[call-overload]
        if device.type == "cpu" and fast_bfloat16(device):  # as the service does
            network.to_bfloat16()
        cache = FeatureCache(options.runs / "features", network, options.device)
        views = [cache(self.dataset, indices, "plain", lambda images: images)]
        if self.config.flip:
            views.append(cache(self.dataset, indices, "mirrored", lambda images: images.flip(-1)))
        cache.database.close()
        return views

    def new_head(self, indices: Tensor, choice: ChosenPenalty) -> EfficientNetLite:
        """Return the base network with a new last layer, which is fitted to the images with these indices."""
        dataset, base = self.dataset, self.base.network
        classes, side = len(dataset.classes), dataset.images.shape[-1]
        head = linear_head.fit_chosen(self.features(indices), dataset.labels[indices], classes, choice)
        network = EfficientNetLite(replace(base.sizes, classes=classes, image=side, multi_label=dataset.multi_label))
        network.load_state_dict({**base.state_dict(), "head.weight": head.weight, "head.bias": head.bias})
        return network.eval().requires_grad_(False)

    def measured(self, result: Result) -> tuple[dict[str, Any], list[Path]]:
        """Evaluate the network with the serving code; return the card and the pictures.

        With --no-publish, the metrics are those of the predictions on the validation images or in cross-validation.
        """
        dataset, base = self.dataset, self.base
        train_indices, validation, test = dataset.split()
        penalty = f"{linear_head.FOLDS}-fold cross-validation of the penalty ({result.choice.penalty:g})"
        if result.steps:
            start = f"The last {TUNED_BLOCKS} blocks of {base.name} and a new last layer are fine-tuned"
            use = f"{len(train_indices):,} for training, {len(validation):,} for validation and the temperature"
        else:
            start = f"The last layer is fitted to the features of {base.name}"
            use = f"{len(train_indices) + len(validation):,} for training with {penalty} and the temperature"
        fields: dict[str, Any] = {
            "kind": KIND,
            **base.fields,
            "notes": (
                f"{start}, without class weights. {dataset.describe_classes()}: {use}, {len(test):,} for testing. "
                f"Skipped: {len(dataset.skipped):,} files or classes."
            ),
        }
        probability = result.logits.softmax(dim=1)
        if dataset.multi_label:
            probability = result.logits.sigmoid()
            fields["thresholds"] = best_thresholds(probability, dataset.labels[result.indices])
        folds = dataset.folds(result.indices, linear_head.FOLDS)
        return measured(self.run, fields, result.network, dataset, result.indices, probability, folds)


# --- fine-tuning


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
        self.augment = augmentation(network.sizes.image, bool(config.flip))

    def logits(self, pixels: Tensor) -> Tensor:
        """Return the logits [N, classes] of uint8 images [N, C, S, S]."""
        with autocast(self.device):
            maps = self.network.maps(pixels)
        return self.network.classified(maps)

    def train(self, batch: Tensor, step: int, done: float) -> Tensor:
        """Train for one step on the images with the indices ``batch``; return their mean loss."""
        set_learning_rate(self.optimizer, self.config.finetune_learning_rate * cosine_schedule(done))
        logits = self.logits(self.augment(self.images[batch]).to(self.device))
        loss = loss_of(logits, self.labels[batch].to(self.device))
        descend(self.optimizer, loss)
        return loss
