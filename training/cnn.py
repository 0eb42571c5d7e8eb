"""Train an image classifier.

    python -m training.cnn                     # the workshop's CNN on CIFAR-10: cifar10-lenet
    python -m training.cnn --preset digits     # the judge of generated digits, on MNIST: mnist-judge
    python -m training.cnn --preset strong     # the recipe of airbench95, narrower and longer: cifar10-whitened
    python -m training.cnn --images DIR --name pets   # your own: a sub-folder for each class, or a CSV of path,label

Measured results stand in the README's table and on each card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.networks import build
from app.networks.cnn import DigitNetSizes, LeNetSizes, WhitenedNet, WhitenedNetSizes, probabilities
from app.tasks.classification import ImageClassifier
from training.data import datasets as data
from training.data.image_batches import accuracy_of, batches, calibrate, draw_samples, moved, served
from training.evaluation.calibration import calibrated, figures
from training.evaluation.corruptions import CORRUPTIONS, STRENGTHS, corrupted
from training.loops import airbench, cnn_finetune
from training.options import Options, options
from training.run import Run, derive, metric, schedule, set_learning_rate


@dataclass(frozen=True)
class Config:
    data: str
    kind: str
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    average: float  # of the weights over steps: the published ones
    shift: int  # pixels, at random, each way
    flip: int  # 1: mirrored at random
    rotate: float  # degrees, at random, each way
    validation: int  # images of the training part that are held out


@dataclass(frozen=True)
class StrongConfig:
    data: str
    kind: str
    first: int  # channels of the first group of convolutions
    later: int  # channels of the second and the third
    epochs: int
    batch: int
    learning_rate: float  # of 1,024 images
    weight_decay: float  # of 1,024 images
    label_smoothing: float
    whiten_epochs: int  # while which the bias of the first layer is learnt
    shift: int  # pixels, at random, each way
    validation: int  # images of the training part that are held out, and that the temperatures are fitted on


@dataclass(frozen=True)
class OwnConfig:
    first: int  # channels of the first group of convolutions, from scratch
    later: int  # channels of the second and the third, from scratch
    epochs: int
    batch: int
    learning_rate: float  # of the last layer
    tuned_rate: float  # of what was learnt before
    fresh_rate: float  # of the other layers, from scratch
    head: float  # share of the steps in which the last layer learns alone
    weight_decay: float
    label_smoothing: float
    shift: int  # pixels, at random, each way
    flip: int  # 1: mirrored at random
    bfloat16: int  # 1: products are computed in it, where that is faster


PRESETS = {
    "workshop": Config("cifar10", "lenet", 150, 512, 4e-3, 5e-4, 0.0, 0.995, 2, 1, 0.0, 5000),
    "digits": Config("mnist", "digit-net", 8, 128, 2e-3, 1e-3, 0.0, 0.998, 2, 0, 10.0, 5000),
}
STRONG = StrongConfig("cifar10", "whitened-net", 96, 320, 22, 1000, 10.0, 0.0153, 0.2, 3, 2, 5000)
OWN = OwnConfig(64, 256, 20, 64, 1e-2, 5e-4, 2e-3, 0.15, 0.05, 0.1, 2, 1, 1)
OPTIONS: dict[str, dict[str, Any]] = {
    "--images": {"metavar": "PATH", "type": Path, "help": "a sub-folder for each class, or a CSV of path,label"},
    "--from": {
        "metavar": "NAME",
        "dest": "origin",
        "default": "cifar10-whitened",
        "help": "network to begin with, or scratch",
    },
    "--size": {"type": int, "choices": (32, 64), "default": 32, "help": "pixels of a side that are looked at"},
}
NAMES = {"workshop": "cifar10-lenet", "digits": "mnist-judge", "strong": "cifar10-whitened"}
SIZES = {"lenet": LeNetSizes, "digit-net": DigitNetSizes}
TITLES = {
    "lenet": "The workshop's CNN: two convolutions, three linear layers; ten kinds of things in 32 x 32 pixels",
    "digit-net": "Reads handwritten digits; the judge of the images that the GAN draws",
    "whitened-net": "Seven convolutions, the first of which whitens; ten kinds of things in 32 x 32 pixels",
}
DAMAGED = 2000  # test images that are also damaged in each of 18 ways


def augment(images: Tensor, config: Config) -> Tensor:
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


def robustness(classifier: ImageClassifier, images: Tensor, labels: Tensor, split: str) -> dict[str, Any]:
    """Accuracy in one view on damaged images: of each kind of damage over its strengths, and of all."""
    found: dict[str, Any] = {}
    for kind in CORRUPTIONS:
        guesses = [served(classifier, corrupted(images, kind, strength)).argmax(dim=1) for strength in range(STRENGTHS)]
        right = (torch.stack(guesses) == labels).double().mean().item()
        found[f"accuracy_{kind}"] = metric(right, f"{split}, {kind} in {STRENGTHS} strengths")
    mean = sum(figure["value"] for figure in found.values()) / len(found)
    return {"accuracy_damaged": metric(mean, f"{split}, {len(found)} kinds of damage"), **found}


def evaluate(classifier: ImageClassifier) -> dict[str, Any]:
    """The metrics of a published classifier, on the test part of its data."""
    images = getattr(data, next(iter(classifier.card.data)))()
    split = f"{images.name} test part, {len(images.test_labels):,} images"
    probability, labels, network = served(classifier, images.test_images), images.test_labels, classifier.network
    if not isinstance(network, WhitenedNet):
        return figures(probability, labels, split)
    found = calibrated(probability, network.temperature.item(), labels, split, "")
    with torch.inference_mode():
        parts = [network.views(batch.to(classifier.device)) for batch in images.test_images.split(250)]
    seen = probabilities(torch.cat(parts)).float().cpu()
    found |= calibrated(seen, network.views_temperature.item(), labels, f"{split}, 6 views", "_views")
    some = slice(DAMAGED)
    return found | robustness(
        classifier, images.test_images[some], labels[some], f"{images.name} test part, first {len(labels[some]):,}"
    )


def update(
    network: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    config: Config,
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


def learn_averaged(run: Run, config: Config, images: data.Images, device: str) -> nn.Module:
    """AdamW on a cosine; what is published is an average of the weights over steps."""
    learn, validate = images.held_out(config.validation)
    train_images, train_labels = images.train_images.to(device), images.train_labels.to(device)
    network = build(config.kind, asdict(SIZES[config.kind]())).to(device)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, fused=True)
    run.track(network=network, average=average, optimizer=optimizer)

    per_epoch = len(learn) // config.batch
    total = config.epochs * per_epoch
    network.train()
    for step, epoch, batch in batches(run, learn, config.batch, config.epochs):
        rate = config.learning_rate * schedule(step, total)
        loss = update(network, average, optimizer, train_images[batch], train_labels[batch], config, rate)
        if (step + 1) % per_epoch == 0:
            accuracy = accuracy_of(average, train_images[validate], train_labels[validate])
            run.log(epoch=epoch + 1, loss=loss.item(), validation_accuracy=accuracy)
    return average.module


def learn_strong(run: Run, config: StrongConfig, images: data.Images, device: str) -> WhitenedNet:
    """The recipe of airbench95: Nesterov's method with look-ahead; images mirrored in every other epoch."""
    learn, validate = images.held_out(config.validation)
    train_images, train_labels = images.train_images.to(device), images.train_labels.to(device)
    widths = (config.first, config.later, config.later)
    network = WhitenedNet(WhitenedNetSizes(widths=widths, label_smoothing=config.label_smoothing))
    airbench.whiten(network, images.train_images[learn[:5000]])
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    slow = airbench.Lookahead(network)
    optimizer = airbench.sgd(network, config.learning_rate, config.weight_decay, config.batch)
    run.track(network=network, slow=slow, optimizer=optimizer)

    per_epoch = len(learn) // config.batch
    total = config.epochs * per_epoch
    generator = torch.Generator().manual_seed(derive(run.options.seed, "mirrored"))
    mirrored = torch.randint(2, (len(train_labels), 1), generator=generator)  # in the epochs 0, 2, 4, ...
    network.train()
    for step, epoch, batch in batches(run, learn, config.batch, config.epochs):
        network.whiten.bias.requires_grad_(epoch < config.whiten_epochs)
        shifts = torch.randint(-config.shift, config.shift + 1, (2, len(batch), 1))
        shown = moved(train_images[batch], shifts, (mirrored[batch] + epoch) % 2 == 1)
        labels = train_labels[batch]
        loss = airbench.update(network, slow, optimizer, shown, labels, config.label_smoothing, step, total)
        if (step + 1) % per_epoch == 0:
            with torch.autocast(network.head.weight.device.type, torch.bfloat16):
                accuracy = accuracy_of(network, train_images[validate], train_labels[validate])
            run.log(epoch=epoch + 1, loss=loss.item(), validation_accuracy=accuracy)
    calibrate(network, train_images[validate], train_labels[validate])
    return network


def arguments(argv: Sequence[str] | None) -> tuple[Options, Config | StrongConfig | OwnConfig]:
    """What a command line says."""
    presets: dict[str, Config | StrongConfig | OwnConfig] = {**PRESETS, "strong": STRONG, "own": OWN}
    return options(__doc__ or "", presets, NAMES, argv, OPTIONS)


def main(argv: Sequence[str] | None = None) -> None:
    chosen, config = arguments(argv)
    if isinstance(config, OwnConfig):
        cnn_finetune.train(chosen, config, argv)
        return
    run = Run(chosen, config, argv)
    images: data.Images = getattr(data, config.data)()
    if isinstance(config, StrongConfig):
        network: nn.Module = learn_strong(run, config, images, chosen.device)
        notes = (
            f"{config.validation:,} images of the training part were held out, and the temperatures fitted on them. "
            "6 views: the image and two moved by one pixel, each also mirrored. "
            f"The answers are without the label smoothing of {config.label_smoothing} that was learnt with."
        )
    else:
        network = learn_averaged(run, config, images, chosen.device)
        notes = f"{config.validation:,} images of the training part validated; weights averaged over steps."
    publish(run, config.kind, images, network, notes)


def publish(run: Run, kind: str, images: data.Images, network: Any, notes: str) -> None:
    """Read the test part once, with the code that serves, and write the card."""
    sizes = network.sizes
    card = {
        "task": "classify",
        "title": TITLES[kind],
        "kind": kind,
        "sizes": asdict(sizes),
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "outputs": [{"name": "probabilities", "dtype": "float64", "shape": [-1, sizes.classes]}],
        "labels": images.labels,
        "data": {images.name: images.sha256},
        "notes": notes,
    }
    classifier = run.predictor(ImageClassifier, card, network)
    card["metrics"] = evaluate(classifier)
    shown = images.test_images[:24]
    samples = draw_samples(
        run.folder / "samples.png",
        shown,
        images.labels,
        torch.tensor(classifier.predict(list(shown))),
        images.test_labels,
    )
    run.finish(card, network, {"curves.png": run.curves(), "samples.png": samples})


if __name__ == "__main__":
    main()
