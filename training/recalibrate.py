"""Publish a classifier for CIFAR-10 again, with the calibration of another training with the same recipe.

    quartet train cnn --preset accurate --seed 1 --set validation=5000 --no-publish
    quartet train recalibrate cifar10-accurate@N --run runs/cifar10-accurate/TIME

N is the version that the first training published. The first command is the other training with the same recipe.

If a training holds out few images, chance has a large effect on the calibration that is fitted to them. Networks of the
same recipe have nearly the same calibration. So this command fits the temperatures and the strength of label smoothing
to a network that was trained with another seed and with more images held out. The weights of the published version do
not change.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from app import store
from app.networks.cnn import WhitenedNet
from app.store import Store
from app.store.version import Version
from app.tasks.classification import ImageClassifier
from training import cnn, evaluation_log, lineage, publishing
from training.configs.classifiers import AirbenchConfig
from training.data import datasets
from training.evaluation.calibration import fit_temperatures
from training.options import STORE, STORE_HELP

FITTED = ("temperature", "views_temperature")  # names of the fitted tensors
SIZES_OF_RECIPE = ("classes", "channels", "image", "widths", "depth")


def recalibrated(version: Version, folder: Path) -> Version:
    """Return ``version`` with the calibration of a run.

    Raises:
        ValueError: the run cannot be used, or has another recipe.
    """
    other, network, config = publishing.read_run(folder, "--run")
    if not isinstance(network, WhitenedNet) or "whiten_epochs" not in config:
        raise ValueError(f"--run {folder}: only runs of the presets strong and accurate can be used")
    network = network.float()
    for key in SIZES_OF_RECIPE:
        if other.sizes.get(key) != version.card.sizes.get(key):
            raise ValueError(f"--run {folder}: its network has another {key} than {version.label}")
    if other.data != version.card.data:
        raise ValueError(f"--run {folder}: its network was trained on other data than {version.label}")
    images: datasets.Images = getattr(datasets, config["data"])()
    _, held_out = images.split_validation(config["validation"])
    recipe = AirbenchConfig(**{key: config[key] for key in AirbenchConfig.__dataclass_fields__})
    fit_temperatures(network, images.train_images[held_out], images.train_labels[held_out], cnn.smoothings(recipe))
    smoothing = network.sizes.label_smoothing
    tensors = version.tensors | {name: getattr(network, name).clone() for name in FITTED}
    notes = (
        f"{version.card.notes} In this version, the temperatures and the corrected label smoothing ({smoothing:g}) "
        f"were fitted to {len(held_out):,} images that a training with seed {config['seed']} held out. The other "
        f"weights are those of {version.card.name}@{version.card.version}."
    )
    name = f"{other.name}, seed {other.seed}"
    ancestors = lineage.ancestors(version.card, "base") + lineage.ancestors(other, "calibration", name)
    reading = store.Reading(
        reason=f"{version.label}, before the recalibration",
        metrics={key: metric.value for key, metric in version.card.metrics.items()},
    )
    changes = {
        "sizes": {**version.card.sizes, "label_smoothing": smoothing},
        "notes": notes,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": 0.0,
        "ancestors": [store.Ancestor(**ancestor) for ancestor in ancestors],
        "earlier_readings": [*(version.card.earlier_readings or []), reading],
    }
    card = version.card.model_copy(update=changes)
    return replace(version, card=card, tensors=tensors)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "quartet train recalibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", metavar="NAME@VERSION", help="the published version")
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="folder of the other training")
    parser.add_argument("--store", default=STORE, type=Path, metavar="DIR", help=STORE_HELP)
    options = parser.parse_args(argv)
    name, _, number = options.version.partition("@")
    if not number.isdecimal():
        parser.error(f"{options.version!r} is not NAME@VERSION, such as cifar10-accurate@1")
    try:
        version = recalibrated(Store(options.store).read(name, int(number)), options.run)
    except (store.StoreError, ValueError) as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "training.recalibrate", *(argv or sys.argv[1:])])
    publish(version, options.store, options.run.parent.parent, command)


def publish(version: Version, models: Path, runs: Path, command: str) -> None:
    """Measure a version on the test part, and publish it as the next version of its model.

    The measurement is logged; see ``training.evaluation_log``. ``runs`` is the folder of all runs.
    """
    classifier = ImageClassifier(version, torch.device("cpu"))
    fields = version.card.model_dump(mode="json", exclude={"version", "weights_sha256"})
    fields |= {"command": command, "commit": publishing.commit(), "metrics": cnn.evaluate(classifier)}
    evaluation_log.record(runs, fields)
    for key, metric in fields["metrics"].items():
        print(f"{key:30} {metric['value']:.{metric['decimals']}f}  {metric['split']}")
    with tempfile.TemporaryDirectory() as folder:
        samples = cnn.draw_samples(Path(folder) / "samples.png", classifier)
        pictures = [version.folder / "curves.png", samples]
        publishing.publish_once(models, fields, version.tensors, pictures, activate=None)


if __name__ == "__main__":
    main()
