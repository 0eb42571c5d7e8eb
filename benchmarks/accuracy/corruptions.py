"""Measure classifiers of CIFAR-10 on images with the corruptions of the package imagecorruptions-imaug.

    pip install imagecorruptions-imaug
    python -m benchmarks.accuracy.corruptions --save benchmarks/results/accuracy/corruptions.json    # 20 minutes
    python -m benchmarks.accuracy.corruptions cifar10-whitened --images 100

The package has the 15 corruptions of ImageNet-C in five severities (Hendrycks and Dietterich 2019, arXiv 1903.12261).
Anybody can repeat the measurement with it. The severities are those of ImageNet-C, which change images of 32 x 32
pixels more than those of CIFAR-10-C. So the results cannot be compared with results on CIFAR-10-C.

Each classifier gets the same corrupted images, the first ``--images`` images of the test part. Test-time augmentation
is not used.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.tasks.classification import ImageClassifier
from benchmarks.support import report
from benchmarks.support.hardware import hardware
from benchmarks.support.servers import ROOT
from benchmarks.support.throughput_limits import newest
from docs import markdown
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


def table(models: Sequence[str], results: dict[str, list[float]]) -> dict[str, Any]:
    """Return a table for benchmarks/results/: a row for each group of corruptions, and a column for each classifier."""
    rows: list[list[Any]] = [["no corruption", *results["none"]]]
    for group, kinds in GROUPS.items():
        means = [statistics.mean(column) for column in zip(*(results[kind] for kind in kinds), strict=True)]
        rows.append([f"{group}: {', '.join(kind.replace('_', ' ') for kind in kinds)}", *means])
    corruptions = [values for kind, values in results.items() if kind != "none"]
    rows.append(["mean of 15 corruptions", *(statistics.mean(column) for column in zip(*corruptions, strict=True))])
    return {"title": "accuracy", "columns": {"images": None} | dict.fromkeys(models, 3), "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=MODELS, help=f"classifiers (default: {', '.join(MODELS)})")
    parser.add_argument("--images", type=int, default=500, help="number of test images (default: %(default)s)")
    parser.add_argument("--store", type=Path, default=ROOT / "models_store", help="folder of the networks")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the table to a file in benchmarks/results/")
    options = parser.parse_args(argv)
    versions = [newest(options.store, name) for name in options.names]
    results = accuracies([ImageClassifier(version, torch.device("cpu")) for version in versions], options.images)
    made = table([version.label for version in versions], results)
    print(markdown.table(list(made["columns"]), [[name, *(f"{x:.3f}" for x in row)] for name, *row in made["rows"]]))
    for kind, values in results.items():
        print(f"{kind:18}", *(f"{value:.3f}" for value in values))
    if options.save:
        content = {
            "title": options.save.stem,
            "command": f"python -m benchmarks.accuracy.corruptions --images {options.images} {' '.join(options.names)}",
            "machine": hardware(),
            "date": time.strftime("%Y-%m-%d"),
            "notes": [],
            "tables": [made],
        }
        report.write(options.save, content)


if __name__ == "__main__":
    main()
