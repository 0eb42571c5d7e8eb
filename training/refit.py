"""Train a second time, on all of the user's data, after a first network was measured on held-out data (refit).

Usage, in a training on the user's data:

    run = ...; network = ...  # trained on one part of the data, validated and tested on the other parts
    card = refit.describe({..., "metrics": ...}, steps)
    run.begin_refit()
    run.track(...)
    for step in run.steps(steps): ...  # trains on all data; ``steps``: the number that was best for the first network
"""

from __future__ import annotations

from typing import Any

from app import store
from training.data.datasets import DataError
from training.options import Options

OPTION: dict[str, dict[str, Any]] = {
    "--no-refit": {
        "dest": "refit",
        "action": "store_false",
        "help": "publish the network that was tested. By default, a second network is trained on all data, and this "
        "second network is published",
    }
}
BEFORE_REFIT = "measured before the refit"  # at the end of the descriptions of the metrics
# Prefixes of the metrics of other methods, which the second training does not change.
OTHER_METHODS = ("untuned_", "naive_", "autoets_", "autotheta_")


def is_planned(options: Options) -> bool:
    """Return whether the command trains a second time before it publishes; False if it does not publish."""
    return options.publish and bool(options.data_options["refit"])


def seen_data(card: store.Card, data: dict[str, str]) -> list[str]:
    """Return the names of the data on which a version was trained a second time, validation and test parts included.

    Data are the same if they have the same SHA-256. A file or folder with the same name also counts as the same,
    because files and folders grow.

    Args:
        card: the card of the version.
        data: the SHA-256 by key, as in the field ``data`` of a card. A key ``text:...`` may also name one of the files.
    """
    if card.refit_steps is None:
        return []
    seen = []
    for key, digest in data.items():
        kind, _, name = key.partition(":")
        same = digest in card.data.values() or key in card.data
        if kind == "text":  # a version may have several texts, such as text:a.txt b.txt
            texts = [other.removeprefix("text:") for other in card.data if other.startswith("text:")]
            same |= any(f" {name} " in f" {names} " for names in texts)
        if same:
            seen.append(name or key)
    return seen


def reject_seen(card: store.Card, option: str, data: dict[str, str]) -> None:
    """Raise DataError if the version in ``option`` has seen the validation and test parts of the data.

    The metrics of a network that learns from such a version would be too good.

    Args:
        card: the card of the version.
        option: the option that names the version, with its value.
        data: see ``seen_data``.
    """
    if names := ", ".join(seen_data(card, data)):
        raise DataError(
            f"{option}: this version of {card.name} was trained on all of {names}, also on the validation and test "
            f"parts, so the metrics of the new network would be too good. Omit {option.split()[0]}, or name a version "
            f"that was trained with --no-refit. If your {names} now has other content, give it another name"
        )


def reject_other_size(card: store.Card, option: str, data: dict[str, str], side: int) -> None:
    """Raise DataError if a version was trained on the same images with another side length in pixels.

    The split depends on the resized pixels. So the version may have learned from images that are now in the test part.

    Args:
        card: the card of an image classifier.
        option: the option that names the version, with its value.
        data: see ``seen_data``.
        side: the side length to which the images are resized now.
    """
    size = card.sizes["image"]
    if size != side and (names := ", ".join(key.partition(":")[2] for key in data if key in card.data)):
        raise DataError(
            f"{option}: this version of {card.name} was trained on images of {names} with --size {size}. With --size "
            f"{side}, the images are divided into other parts, so the version may know the new test images. Use "
            f"--size {size}"
        )


def describe(card: dict[str, Any], steps: int, how: str = "after which the first network was best") -> dict[str, Any]:
    """Return the model card of a network that was trained again for ``steps`` steps on all data.

    The card keeps the metrics of the first network, and their descriptions say so. ``how``: text after the number of
    steps in the notes.
    """
    metrics = {
        name: metric if name.startswith(OTHER_METHODS) else {**metric, "split": f"{metric['split']}; {BEFORE_REFIT}"}
        for name, metric in card["metrics"].items()
    }
    notes = (
        f"{card['notes']} The metrics are those of a first network, which was trained without the held-out data. The "
        f"published weights were then trained in the same way on all data, for the {steps:,} steps {how}. "
        "They were not measured, because no data are left for it."
    )
    return {**card, "metrics": metrics, "notes": notes, "refit_steps": steps}
