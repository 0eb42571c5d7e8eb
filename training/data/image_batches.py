"""Batches, augmentation, evaluation and plots for image classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.cnn import WhitenedNet, unsmoothed
from app.tasks.classification import ImageClassifier
from training.evaluation.calibration import fit_temperature
from training.run import Run, permutation, save_figure


def shift_and_mirror(images: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
    """Shift images [N, C, S, S] up and left by ``shifts`` [2, N, 1]; mirror them where ``mirrored`` [N, 1] is true.

    Reflected pixels fill the edges. The result is in channels-last memory format.
    """
    count, _, side, _ = images.shape
    position = torch.arange(side) + shifts  # [2, N, S]
    position = side - 1 - (side - 1 - position.abs()).abs()  # reflected at both edges, in 0 ... S - 1
    columns = torch.where(mirrored, side - 1 - position[1], position[1]).to(images.device)
    rows = position[0].to(images.device)
    image_indices = torch.arange(count, device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[image_indices, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def masked(images: Tensor, side: int, fill: Tensor) -> Tensor:
    """Return images [N, C, S, S] in which a square at a random place has the value ``fill`` [C, 1, 1] (cutout).

    ``side``: side length of the square in pixels.
    """
    count, _, height, width = images.shape

    def covered(length: int) -> Tensor:
        start = torch.randint(length - side + 1, (count, 1))
        position = torch.arange(length)
        return ((position >= start) & (position < start + side)).to(images.device)  # [N, length]

    square = covered(height)[:, None, :, None] & covered(width)[:, None, None, :]
    return torch.where(square, fill.to(images.dtype), images)


def corrupted(images: Tensor, share: float) -> Tensor:
    """Return uint8 images [N, C, S, S] of which a share has noise, blur or JPEG artefacts of random strengths.

    Of these images, half have Gaussian noise with a standard deviation of up to 40 (of 255), a quarter is blurred with
    a standard deviation of 0.3 to 1.2 pixels, and a quarter is compressed with a JPEG quality of 15 to 90.
    """
    count = min(round(len(images) * share / 4), len(images) // 4)
    if not count:
        return images
    from torchvision.transforms.v2.functional import gaussian_blur, jpeg  # takes 2 s, and few trainings need it

    images = images.clone()
    noisy, blurred, compressed = torch.randperm(len(images))[: 4 * count].split([2 * count, count, count])
    noise = torch.randn(images[noisy].shape) * 40 * torch.rand(2 * count, 1, 1, 1)
    images[noisy] = (images[noisy] + noise.to(images.device)).round().clamp(0, 255).to(torch.uint8)
    for index, deviation in zip(blurred.tolist(), (0.3 + 0.9 * torch.rand(count)).tolist(), strict=True):
        images[index] = gaussian_blur(images[index], [7, 7], [deviation])
    for index, quality in zip(compressed.tolist(), torch.randint(15, 91, (count,)).tolist(), strict=True):
        images[index] = jpeg(images[index].cpu(), quality)
    return images


def batches(run: Run, train: Tensor, size: int, total: Callable[[], int]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the step, the epoch and the image indices [size] for each remaining step. Each epoch has a new order."""
    per_epoch = len(train) // size
    shuffled_epoch = -1
    for step in run.steps(total):
        epoch, position = divmod(step, per_epoch)
        if shuffled_epoch != epoch:
            shuffled_epoch, order = epoch, train[permutation(len(train), run.options.seed, "epoch", epoch)]
        yield step, epoch, order[position * size : (position + 1) * size]


def accuracy_of(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images [N, C, S, S] that the network classifies correctly."""
    network.eval()
    with torch.inference_mode():
        correct = sum(
            int((network(x).argmax(1).eq(y)).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    network.train()
    return correct / len(labels)


@torch.inference_mode()
def fit_temperatures(
    network: WhitenedNet, images: Tensor, labels: Tensor, smoothings: Sequence[float] = (0.0,)
) -> None:
    """Calibrate the network on images that were not used for training.

    Fit the two temperatures, for predictions without and with test-time augmentation. Of ``smoothings``, choose the
    strength of label smoothing to remove from the logits. The sum of both negative log-likelihoods is minimised.
    """
    network.eval()
    network.sizes = replace(network.sizes, label_smoothing=0.0)
    for temperature in (network.temperature, network.views_temperature):
        temperature.fill_(1)
    parts = images.split(250)
    scores = [torch.cat([forward(part) for part in parts]).double() for forward in (network, network.tta_logits)]

    def fit(smoothing: float) -> tuple[float, list[float]]:
        """Return the sum of the negative log-likelihoods, and the temperatures."""
        logits = [unsmoothed(each, smoothing) for each in scores]
        temperatures = [fit_temperature(each, labels) for each in logits]
        losses = [F.cross_entropy(each / t, labels).item() for each, t in zip(logits, temperatures, strict=True)]
        return sum(losses), temperatures

    smoothing = min(smoothings, key=lambda smoothing: fit(smoothing)[0])
    network.sizes = replace(network.sizes, label_smoothing=smoothing)
    for temperature, value in zip((network.temperature, network.views_temperature), fit(smoothing)[1], strict=True):
        temperature.fill_(value)


def served_probabilities(classifier: ImageClassifier, images: Tensor) -> Tensor:
    """Return the probabilities [N, classes] that the service would return for uint8 images [N, C, S, S]."""
    rows = [classifier.predict(list(batch)) for batch in images.split(500)]
    return torch.tensor([row for batch in rows for row in batch])


def plot_samples(
    path: Path, images: Tensor, labels: list[str], probability: Tensor, truth: Tensor, beside: str = ""
) -> Path:
    """Plot up to 24 images with their predictions. The titles of wrong predictions are red.

    ``beside``: second line in the titles of wrong predictions. In this line, {truth} is replaced by the true class.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    for i, axis in enumerate(figure.subplots(3, 8).flat):
        axis.axis("off")
        if i >= len(images):
            continue
        best = int(probability[i].argmax())
        axis.imshow(images[i].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
        correct = best == int(truth[i])
        title = f"{_shorten(labels[best])} {probability[i, best]:.0%}"
        if beside and not correct:
            title += "\n" + beside.format(truth=_shorten(labels[int(truth[i])]))
        axis.set_title(title, fontsize=9, color="black" if correct else "crimson", parse_math=False)
    return save_figure(figure, path, 70)


def plot_confusion(path: Path, labels: list[str], truth: Tensor, predictions: Tensor) -> Path:
    """Plot the confusion matrix: classes in rows, predictions in columns."""
    from matplotlib.figure import Figure

    counts = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    counts.index_put_((truth, predictions), torch.ones_like(truth), accumulate=True)
    side = min(16.0, 2.2 + 0.55 * len(labels))
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    names = [_shorten(label) for label in labels]
    axis.set_xticks(range(len(labels)), names, rotation=90, parse_math=False)
    axis.set_yticks(range(len(labels)), names, parse_math=False)
    axis.set(xlabel="predicted", ylabel="true class")
    if len(labels) <= 20:
        for row, column in counts.nonzero().tolist():
            color = "white" if counts[row, column] > counts[row].sum() / 2 else "black"
            axis.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=color, fontsize=8)
    return save_figure(figure, path)


def plot_mistakes(path: Path, images: Tensor, labels: list[str], probability: Tensor, truth: Tensor) -> Path:
    """Plot the 24 most confident wrong predictions.

    If there are fewer wrong predictions, the least confident correct predictions follow.
    """
    confidence, predictions = probability.max(dim=1)
    wrong = predictions != truth
    worst = torch.where(wrong, confidence, -1 - confidence).argsort(descending=True)
    return plot_samples(path, images[worst], labels, probability[worst], truth[worst], "is {truth}")


def _shorten(label: str) -> str:
    return label if len(label) <= 14 else f"{label[:13]}…"
