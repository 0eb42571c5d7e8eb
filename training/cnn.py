"""Train an image classifier.

    python -m training.cnn                     # the workshop's CNN on CIFAR-10: cifar10-lenet
    python -m training.cnn --preset digits     # the judge of generated digits, on MNIST: mnist-judge

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
from app.networks.cnn import DigitNetSizes, LeNetSizes
from app.predictors.cnn import ImageClassifier
from training import data
from training.run import Run, metric, options, permutation, schedule, set_learning_rate


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


PRESETS = {
    "workshop": Config("cifar10", "lenet", 150, 512, 4e-3, 5e-4, 0.0, 0.995, 2, 1, 0.0, 5000),
    "digits": Config("mnist", "digit-net", 8, 128, 2e-3, 1e-3, 0.0, 0.998, 2, 0, 10.0, 5000),
}
NAMES = {"workshop": "cifar10-lenet", "digits": "mnist-judge"}
SIZES = {"lenet": LeNetSizes, "digit-net": DigitNetSizes}
TITLES = {
    "lenet": "The workshop's CNN: two convolutions, three linear layers; ten kinds of things in 32 x 32 pixels",
    "digit-net": "Reads handwritten digits; the judge of the images that the GAN draws",
}


def augment(images: Tensor, config: Config) -> Tensor:
    """uint8 images [N, C, S, S] -> the same, mirrored, rotated and shifted at random; edges are reflected."""
    count, _, side, _ = images.shape
    if config.rotate:
        angle = (torch.rand(count) * 2 - 1) * torch.pi / 180 * config.rotate
        zero = torch.zeros(count)
        theta = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1)
        grid = F.affine_grid(theta.view(count, 2, 3).to(images.device), list(images.shape), align_corners=False)
        images = F.grid_sample(images.float(), grid, align_corners=False, padding_mode="reflection")
    place = torch.arange(side) + torch.randint(-config.shift, config.shift + 1, (2, count, 1))  # [2, N, S]
    place = side - 1 - (side - 1 - place.abs()).abs()  # reflected at both edges
    mirrored = torch.randint(2, (count, 1)) * config.flip == 1
    columns = torch.where(mirrored, side - 1 - place[1], place[1]).to(images.device)
    rows = place[0].to(images.device)
    which = torch.arange(count, device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[which, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def measure(classifier: ImageClassifier, images: Tensor, labels: Tensor, split: str) -> dict[str, Any]:
    """Accuracy, negative log-likelihood, calibration error (15 equal bins, Guo et al. 2017), as the service answers."""
    rows = [classifier.predict(list(batch)) for batch in images.split(500)]
    probability = torch.tensor([row for batch in rows for row in batch])
    confidence, guess = probability.max(dim=1)
    right = (guess == labels).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [(confidence[bins == b] - right[bins == b]).sum().abs() for b in range(15)]
    likelihood = probability[torch.arange(len(labels)), labels].clamp(min=1e-12).log()
    return {
        "accuracy": metric(right.mean().item(), split),
        "nll": metric(-likelihood.mean().item(), split),
        "calibration_error": metric(torch.stack(gaps).sum().item() / len(labels), split),
    }


def evaluate(classifier: ImageClassifier) -> dict[str, Any]:
    """The metrics of a published classifier, on the test part of its data."""
    images = getattr(data, next(iter(classifier.card.data)))()
    split = f"{images.name} test part, {len(images.test_labels):,} images"
    return measure(classifier, images.test_images, images.test_labels, split)


def draw_samples(path: Path, images: Tensor, labels: list[str], probability: Tensor, truth: Tensor) -> Path:
    """Classified images with the answer above each, in red where it is wrong."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    for i, axis in enumerate(figure.subplots(3, 8).flat):
        best = int(probability[i].argmax())
        axis.imshow(images[i].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
        color = "black" if best == int(truth[i]) else "crimson"
        axis.set_title(f"{labels[best]} {probability[i, best]:.0%}", fontsize=9, color=color)
        axis.axis("off")
    figure.savefig(path, dpi=70)
    return path


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


def main(argv: Sequence[str] | None = None) -> None:
    chosen, config = options(__doc__ or "", PRESETS, NAMES, argv)
    run = Run(chosen, config, argv)

    images: data.Images = getattr(data, config.data)()
    learn, validate = images.held_out(config.validation)
    train_images, train_labels = images.train_images.to(chosen.device), images.train_labels.to(chosen.device)

    sizes = SIZES[config.kind]()
    network = build(config.kind, asdict(sizes)).to(chosen.device)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, fused=True)
    run.track(network=network, average=average, optimizer=optimizer)

    per_epoch = len(learn) // config.batch
    total = config.epochs * per_epoch
    network.train()
    shuffled = -1
    for step in run.steps(total):
        epoch, place = divmod(step, per_epoch)
        if shuffled != epoch:
            shuffled, order = epoch, learn[permutation(len(learn), chosen.seed, "epoch", epoch)]
        batch = order[place * config.batch : (place + 1) * config.batch]
        rate = config.learning_rate * schedule(step, total)
        loss = update(network, average, optimizer, train_images[batch], train_labels[batch], config, rate)
        if place == per_epoch - 1:
            accuracy = accuracy_of(average, train_images[validate], train_labels[validate])
            run.log(epoch=epoch + 1, loss=loss.item(), validation_accuracy=accuracy)

    publish(run, config, images, average.module)


def accuracy_of(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the averaged network gets right."""
    network.eval()
    with torch.inference_mode():
        right = sum(
            int((network(x).argmax(1).eq(y)).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    network.train()
    return right / len(labels)


def publish(run: Run, config: Config, images: data.Images, network: nn.Module) -> None:
    """Read the test part once, with the code that serves, and write the card."""
    sizes = SIZES[config.kind]()
    card = {
        "task": "classify",
        "title": TITLES[config.kind],
        "kind": config.kind,
        "sizes": asdict(sizes),
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "outputs": [{"name": "probabilities", "dtype": "float64", "shape": [-1, sizes.classes]}],
        "labels": images.labels,
        "data": {images.name: images.sha256},
        "notes": f"{config.validation:,} images of the training part validated; weights averaged over steps.",
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
