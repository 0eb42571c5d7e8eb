"""Train classifiers for users' photographs: ``quartet train cnn --images`` with images above 64 pixels.

A pretrained network computes the features of all images once. Then a new last layer is fitted to these features. With
enough images, the last blocks of the network are fine-tuned too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.efficientnet import EfficientNetLite, EfficientNetSizes
from app.tasks.classification import ImageClassifier
from app.tasks.precision import fast_bfloat16
from training import cards, lineage, refit
from training.configs.classifiers import CnnFinetuneConfig
from training.data.datasets import DataError
from training.data.image_dataset import ImageDataset
from training.data.image_files import subset
from training.evaluation.calibration import divide_logits, limited_temperature, served_probabilities
from training.evaluation.image_classifier import best_thresholds, metrics_of, plot_predictions
from training.limits import limits
from training.loops.classifier import ClassifierRecipe
from training.loops.fit import Batches, descend, fit
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
    """The network from which training starts, and what the card of the trained network states about it."""

    network: EfficientNetLite
    name: str
    ancestors: list[dict[str, Any]] | None  # field of the card
    licence: str | None
    source: str | None


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
    origin: str | None = options.data_options["origin"]
    if origin in (None, pretrained.NAME):
        return Base(pretrained.load(), pretrained.NAME, None, pretrained.LICENCE, pretrained.SOURCE)
    if origin == "scratch":
        raise DataError("--from scratch needs --size 32 or --size 64: larger networks start from efficientnet-lite0")
    version = base_version(options, (KIND,), advice="")
    assert version is not None
    card = version.card
    name = f"{card.name}@{card.version}"
    lineage.reject_seen(card, f"--from {name}", dataset.data)
    if card.refit_layers != "last":  # otherwise only the last layer has seen the images, and a new one replaces it
        lineage.reject_other_size(card, f"--from {name}", dataset.data, dataset.images.shape[-1])
    return Base(version.network(), name, lineage.ancestors(card, "base"), card.licence, card.source)


def train(options: Options, config: CnnFinetuneConfig, argv: Sequence[str] | None, dataset: ImageDataset) -> None:
    """Train a classifier on the user's images and publish it."""
    base = read_base(options, dataset)
    run = Run(options, config, argv, dataset.sha256)
    run.write_file("skipped.txt", "".join(f"{reason}\n" for reason in dataset.skipped))
    train_indices, validation, _ = dataset.split()
    known, every = torch.cat([train_indices, validation]).sort().values, torch.arange(len(dataset.labels))
    choice = choose_head(run, config, base, dataset, known)
    result = Result(new_head(run, config, base, dataset, known, choice), choice, known, choice.logits)
    enough = len(train_indices) >= limits().min_tuned_images and len(validation) >= limits().min_calibration_images
    if config.finetune_epochs and enough:
        start = new_head(run, config, base, dataset, train_indices, choice)
        result = fine_tune(run, config, dataset, base, result, start)
    card, pictures = measured(run, dataset, base, result)
    network = result.network
    if refit.is_planned(options):
        network, steps = new_head(run, config, base, dataset, every, choice), linear_head.MAX_STEPS
        if result.steps:
            steps = result.steps
            run.begin_refit()
            network = divide_logits(tune(run, config, network, dataset, every, Budget(steps)), result.temperature)
        card = refit.describe(card, steps, "all" if result.steps else "last")
    run.finish(card, network, *pictures, has_curves=result.steps > 0)


def fine_tune(
    run: Run, config: CnnFinetuneConfig, dataset: ImageDataset, base: Base, head_only: Result, start: EfficientNetLite
) -> Result:
    """Fine-tune ``start``, whose last layer is fitted to the training part.

    Return the fine-tuned network, or ``head_only`` if ``start`` has a lower loss on the validation part.
    """
    train_indices, validation, _ = dataset.split()
    size = min(config.finetune_batch, len(train_indices))
    steps = min(config.finetune_epochs * (len(train_indices) // size), MAX_DEFAULT_STEPS)

    before = Result(start, head_only.choice, validation, logits_of(start, dataset, validation))
    budget = run.budget(steps, refit.is_planned(run.options))
    network = tune(run, config, copy.deepcopy(start), dataset, train_indices, budget)
    after = Result(network, head_only.choice, validation, logits_of(network, dataset, validation), run.step)
    targets = dataset.labels[validation]
    temperatures = [limited_temperature(result.logits, targets) for result in (before, after)]
    losses = [
        float(loss_of(result.logits / temperature, targets))
        for result, temperature in zip((before, after), temperatures, strict=True)
    ]
    print(f"validation loss: {losses[0]:.4f} with a new last layer, {losses[1]:.4f} after fine-tuning")
    if losses[1] >= losses[0]:
        print("fine-tuning did not help, so the network with a new last layer is used")
        return head_only
    temperature = temperatures[1]
    return replace(
        after, network=divide_logits(network, temperature), logits=after.logits / temperature, temperature=temperature
    )


def logits_of(network: EfficientNetLite, dataset: ImageDataset, indices: Tensor) -> Tensor:
    """Return the logits [len(indices), classes] of the images with these indices."""
    device = network.head.weight.device
    with torch.inference_mode():
        parts = [network(dataset.images[part].to(device)).cpu() for part in indices.split(BATCH)]
    return torch.cat(parts).clone()


def compute_features(
    run: Run, config: CnnFinetuneConfig, base: Base, dataset: ImageDataset, indices: Tensor
) -> list[Tensor]:
    """Return the features [len(indices), D] of each view: the image and, with ``config.flip``, its mirror image."""
    device = torch.device(run.options.device)
    network = base.network.to(device, memory_format=base.network.memory_format).eval().requires_grad_(False)  # type: ignore[call-overload]
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    if device.type == "cpu" and fast_bfloat16(device):  # as the service does
        network.to_bfloat16()
    cache = FeatureCache(run.options.runs / "features", network, run.options.device)
    views = [cache(dataset, indices, "plain", lambda images: images)]
    if config.flip:
        views.append(cache(dataset, indices, "mirrored", lambda images: images.flip(-1)))
    network.to(torch.float32).load_state_dict(state)
    return views


def choose_head(
    run: Run, config: CnnFinetuneConfig, base: Base, dataset: ImageDataset, indices: Tensor
) -> ChosenPenalty:
    """Choose the penalty of the last layer in cross-validation on the images with these indices."""
    features, folds = compute_features(run, config, base, dataset, indices), dataset.folds(indices, linear_head.FOLDS)
    choice = linear_head.choose(features, dataset.labels[indices], folds, len(dataset.classes))
    losses = [f"{penalty:g} {loss:.4f}" for penalty, loss in choice.losses.items()]
    run.write_file("penalties.txt", "penalty and loss in cross-validation\n" + "\n".join(losses) + "\n")
    return choice


def new_head(
    run: Run, config: CnnFinetuneConfig, base: Base, dataset: ImageDataset, indices: Tensor, choice: ChosenPenalty
) -> EfficientNetLite:
    """Return the base network with a new last layer, which is fitted to the images with these indices."""
    features, classes = compute_features(run, config, base, dataset, indices), len(dataset.classes)
    head = linear_head.fit_chosen(features, dataset.labels[indices], classes, choice)
    side = dataset.images.shape[-1]
    sizes = replace(base.network.sizes, classes=classes, image=side, multi_label=dataset.multi_label)
    network = EfficientNetLite(EfficientNetSizes(**asdict(sizes)))
    state = {key: tensor for key, tensor in base.network.state_dict().items() if not key.startswith("head.")}
    network.load_state_dict({**state, "head.weight": head.weight, "head.bias": head.bias})
    return network.eval().requires_grad_(False)


def measured(run: Run, dataset: ImageDataset, base: Base, result: Result) -> tuple[dict[str, Any], list[Path]]:
    """Evaluate the network with the serving code; return the card and the pictures.

    With --no-publish, the test part is not read. The metrics are then those of the predictions on the validation images
    or in cross-validation.
    """
    train_indices, validation, test = dataset.split()
    penalty = f"{linear_head.FOLDS}-fold cross-validation of the penalty ({result.choice.penalty:g})"
    if result.steps:
        start = f"The last {TUNED_BLOCKS} blocks of {base.name} and a new last layer are fine-tuned"
        use = f"{len(train_indices):,} for training, {len(validation):,} for validation and the temperature"
    else:
        start = f"The last layer is fitted to the features of {base.name}"
        use = f"{len(train_indices) + len(validation):,} for training with {penalty} and the temperature"
    card: dict[str, Any] = {
        **cards.classifier(KIND, result.network, dataset.classes),
        "title": f"Classifies images into {len(dataset.classes)} classes: {', '.join(dataset.classes)}"[:200],
        "data": dataset.data,
        "ancestors": base.ancestors,
        "licence": base.licence,
        "source": base.source,
        "notes": (
            f"{start}, without class weights. {dataset.describe_classes()}: {use}, {len(test):,} for testing. "
            f"Skipped: {len(dataset.skipped):,} files or classes."
        ),
    }
    if dataset.multi_label:
        card["thresholds"] = best_thresholds(result.logits.sigmoid(), dataset.labels[result.indices])
    classifier = run.predictor(ImageClassifier, card, result.network)
    folds = None
    if run.options.part == "test":
        indices, probability = test, served_probabilities(classifier, subset(dataset.images, test))
    else:
        indices, folds = result.indices, dataset.folds(result.indices, linear_head.FOLDS)
        probability = result.logits.sigmoid() if dataset.multi_label else result.logits.softmax(dim=1)
    card = run.measure(card, lambda part: metrics_of(probability, classifier, dataset, indices, part, folds))
    return card, plot_predictions(run.folder, dataset, indices, probability)


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
