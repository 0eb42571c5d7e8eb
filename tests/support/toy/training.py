"""The training script of the toy architecture, written like a file of ``training``.

The network distinguishes images with horizontal bars from images with vertical bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.tasks.classification import ImageClassifier
from support.toy.network import ToyNet, ToyNetSizes
from training.configs.numbers import Described
from training.options import parse_options
from training.run import Run, metric

LABELS = ["horizontal", "vertical"]
IMAGES, TEST, VALIDATION = 32, 1, 2  # images in a part; seeds of the test and validation part


class ToyConfig(Described):
    steps: int = 150
    batch: int = 16
    learning_rate: float = 0.05


def draw_bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images uint8 [count, 1, 8, 8] with one bar each, and labels int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 2, (count,), generator=generator)
    positions = torch.randint(0, 8, (count,), generator=generator)
    for image, label, position in zip(images, labels.tolist(), positions.tolist(), strict=True):
        bar = image[0, position] if label == 0 else image[0, :, position]
        bar.fill_(255)
    return images, labels


def evaluate(classifier: ImageClassifier, seed: int = TEST) -> dict[str, Any]:
    """Return the metrics of a predictor on the images that are drawn with a seed."""
    images, labels = draw_bars(IMAGES, seed)
    predictions = torch.tensor(classifier.predict(list(images))).argmax(dim=1)
    accuracy = (predictions == labels).double().mean().item()
    return {"accuracy": metric(accuracy, f"{IMAGES} images of seed {seed}")}


def main(argv: Sequence[str] | None = None) -> None:
    options, config = parse_options(__name__, __doc__ or "", {"toy": ToyConfig()}, {"toy": "toy"}, argv)
    run = Run(options, config, argv)
    network = ToyNet(ToyNetSizes())
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    run.track(network=network, optimizer=optimizer)
    for step in run.steps(run.budget(config.steps)):
        images, labels = draw_bars(config.batch, seed=100 + step)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss.item())
    sizes = network.sizes
    card: dict[str, Any] = {
        "task": "classify",
        "title": "Tells horizontal from vertical bars",
        "kind": "toy-net",
        "sizes": asdict(sizes),
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [-1, sizes.channels, sizes.image, sizes.image]}],
        "outputs": [{"name": "probabilities", "dtype": "float64", "shape": [-1, sizes.classes]}],
        "labels": LABELS,
        "data": {},
        "notes": "",
    }
    card, _ = run.measure(
        card, network, lambda classifier, part: evaluate(classifier, VALIDATION if part == "validation" else TEST)
    )
    run.finish(card, network)
