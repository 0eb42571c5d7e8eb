"""Measure classifiers of CIFAR-10 on images with the corruptions of the package imagecorruptions-imaug.

    pip install imagecorruptions-imaug
    python -m benchmarks corruptions                # 20 minutes
    python -m benchmarks corruptions cifar10-whitened --images 100

The package has the 15 corruptions of ImageNet-C in five severities (Hendrycks and Dietterich 2019, arXiv 1903.12261).
Anybody can repeat the measurement with it. The severities are those of ImageNet-C, which change images of 32 x 32
pixels more than those of CIFAR-10-C. So the results cannot be compared with results on CIFAR-10-C.

Each classifier gets the same corrupted images, the first ``--images`` images of the test part. Test-time augmentation
is not used.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.store import Store
from app.tasks.classification import ImageClassifier
from benchmarks.support import report
from benchmarks.support.servers import ROOT
from training.data import datasets
from training.evaluation.calibration import served_probabilities

MODELS = ["cifar10-lenet", "cifar10-whitened", "cifar10-accurate"]
GROUPS = {  # as in the paper
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
SEVERITIES = range(1, 6)


def corrupted(images: np.ndarray, job: tuple[str, int]) -> np.ndarray:
    """Return images uint8 [N, S, S, 3] with a corruption. ``job`` is its kind and its severity from 1 to 5."""
    import imagecorruptions  # type: ignore[import-not-found]  # the fork has the same module name as the original

    kind, severity = job
    seeded = {"seed": 0} if kind in ("glass_blur", "impulse_noise") else {}
    np.random.seed(0)  # the package uses NumPy's global generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = [
            imagecorruptions.corrupt(image, severity=severity, corruption_name=kind, **seeded) for image in images
        ]
    return np.stack(changed).astype(np.uint8)


def accuracies(classifiers: Sequence[ImageClassifier], count: int) -> dict[str, list[float]]:
    """Return the accuracy of each classifier on ``count`` test images, for each kind of corruption and for none."""
    cifar = datasets.cifar10()
    labels = cifar.test_labels[:count]
    images = cifar.test_images[:count].permute(0, 2, 3, 1).contiguous().numpy()  # [N, 32, 32, 3]

    def measured(pixels: np.ndarray) -> list[float]:
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        predictions = [served_probabilities(classifier, tensor).argmax(dim=1) for classifier in classifiers]
        return [(own == labels).double().mean().item() for own in predictions]

    kinds = [kind for group in GROUPS.values() for kind in group]
    jobs = [(kind, severity) for kind in kinds for severity in SEVERITIES]
    results = {"none": measured(images)}
    with ProcessPoolExecutor() as pool:
        found = list(map(measured, pool.map(partial(corrupted, images), jobs)))
    for kind in kinds:
        of_kind = [own for own, (name, _) in zip(found, jobs, strict=True) if name == kind]
        results[kind] = [statistics.mean(column) for column in zip(*of_kind, strict=True)]
    return results


def table(models: Sequence[str], results: dict[str, list[float]]) -> report.Table:
    """Return a table: a row for each group of corruptions, and a column for each classifier."""
    rows: list[list[Any]] = [["no corruption", *results["none"]]]
    for group, kinds in GROUPS.items():
        means = [statistics.mean(column) for column in zip(*(results[kind] for kind in kinds), strict=True)]
        rows.append([f"{group}: {', '.join(kind.replace('_', ' ') for kind in kinds)}", *means])
    corruptions = [values for kind, values in results.items() if kind != "none"]
    rows.append(["mean of 15 corruptions", *(statistics.mean(column) for column in zip(*corruptions, strict=True))])
    return report.table("accuracy", {"images": None} | dict.fromkeys(models, 3), rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", default=MODELS, help=f"classifiers (default: {', '.join(MODELS)})")
    parser.add_argument("--images", type=int, default=500, help="number of test images (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    store = Store(ROOT / "models_store")
    versions = [store.read(name, max(store.numbers(name))) for name in options.names]
    results = accuracies([ImageClassifier(version, torch.device("cpu")) for version in versions], options.images)
    return [table([version.label for version in versions], results)], []
