"""Measure the accuracy of photograph classifiers that are trained on few images of each class.

    python -m benchmarks.accuracy.photos --no-flip      # 10, 50 and 500 images for each class: ten minutes on one core
    python -m benchmarks.accuracy.photos --images 10 --seeds 1

The images are CIFAR-10 images that are enlarged to 224 pixels. The benchmark draws the training images at random, and
repeats this three times by default. It fits only the last layer, as
``training.cnn --images FOLDER --set finetune_epochs=0`` does. The inputs of this layer are the features of the
pretrained network. The benchmark stores these features in the folder ``--runs``, so a second run takes only a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from app.tasks.precision import fast_bfloat16
from training.data import datasets
from training.data.image_dataset import ImageDataset
from training.loops.photos import linear_head, pretrained
from training.loops.photos.features import FeatureCache

SIDE = 224  # side length of the enlarged images in pixels
TEST_IMAGES = 1000
POOL = 15_500  # each seed draws its images from the first POOL training images


def enlarged(images: Tensor) -> Tensor:
    """Return uint8 images [N, 3, 32, 32], enlarged to [N, 3, 224, 224]."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = [np.array(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return the indices of ``count`` random images of each class, sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    classes = [(labels == label).nonzero().flatten() for label in range(int(labels.max()) + 1)]
    return torch.cat([own[torch.randperm(len(own), generator=generator)[:count]] for own in classes])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 500], help="images for each class")
    parser.add_argument("--seeds", type=int, default=3, help="number of random choices of the images")
    parser.add_argument("--no-flip", action="store_true", help="do not use mirror images")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder in which the features are stored")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    cifar = datasets.cifar10()
    network = pretrained.load().to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    if fast_bfloat16(torch.device("cpu")):
        network.to_bfloat16()
    cache = FeatureCache(options.runs / "features", network, "cpu")

    def features(images: Tensor, names: list[str], view: str) -> Tensor:
        small = ImageDataset("cifar10", cifar.labels, images, torch.zeros(len(images)), names, [])
        mirrored = view == "mirrored"
        return cache(
            small,
            torch.arange(len(images)),
            view,
            lambda batch: enlarged(batch).flip(-1) if mirrored else enlarged(batch),
        )

    names = [f"cifar10-test-{index}" for index in range(TEST_IMAGES)]
    test, truth = features(cifar.test_images[:TEST_IMAGES], names, "plain"), cifar.test_labels[:TEST_IMAGES]
    for count in options.images:
        accuracies = []
        for seed in range(options.seeds):
            indices = drawn(cifar.train_labels[:POOL], count, seed)
            targets = cifar.train_labels[indices]
            names = [f"cifar10-train-{index}" for index in indices.tolist()]
            kinds = ["plain"] if options.no_flip else ["plain", "mirrored"]
            views = [features(cifar.train_images[indices], names, view) for view in kinds]
            folds = torch.arange(len(indices)) % linear_head.FOLDS  # sorted by class, so that each fold has all classes
            choice = linear_head.choose(views, targets, folds, 10)
            head = linear_head.fit_chosen(views, targets, 10, choice)
            accuracies.append((head(test).argmax(dim=1) == truth).double().mean().item())
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        row = {"images": count, "accuracy": statistics.mean(accuracies), "deviation": spread, "seeds": accuracies}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
