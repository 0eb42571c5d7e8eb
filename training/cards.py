"""The fields of a model card that follow from the network, and the data that an earlier network has seen."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from app import store
from app.networks import KINDS
from app.networks.forecaster import QUANTILES
from training.data.datasets import DataError

Tensor = tuple[str, list[int]]


def fields(kind: str, network: Any, **others: Any) -> dict[str, Any]:
    """Return the fields that follow from a network, and ``others``, such as its labels."""
    sizes, task = network.sizes, KINDS[kind].task
    inputs: dict[str, Tensor]  # name -> type and shape
    outputs: dict[str, Tensor]
    if task == "continue":
        inputs, outputs = {"characters": ("int64", [-1, -1])}, {"logits": ("float32", [-1, -1, sizes.vocabulary])}
    elif kind == "series-lstm":
        inputs, outputs = {"values": ("float64", [-1, sizes.window])}, {"mean": ("float64", [-1, -1])}
    elif task == "forecast":
        inputs = {"values": ("float64", [-1, -1])}
        outputs = {"mean": ("float64", [-1, -1]), "quantiles": ("float64", [-1, -1, len(QUANTILES)])}
    else:
        images = "uint8", [-1, sizes.channels, sizes.image, sizes.image]
        if task == "classify":
            inputs, outputs = {"image": images}, {"probabilities": ("float64", [-1, sizes.classes])}
        else:
            inputs, outputs = {"latents": ("float64", [-1, sizes.latent])}, {"images": images}
            inputs |= {"classes": ("int64", [-1])} if others["labels"] else {}
    interface = {
        key: [{"name": name, "dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()]
        for key, tensors in (("inputs", inputs), ("outputs", outputs))
    }
    return {"task": task, "kind": kind, "sizes": asdict(sizes), **interface, **others}


def after_refit(card: dict[str, Any], steps: int, layers: Literal["all", "last"] = "all") -> dict[str, Any]:
    """Return the card of a network that was trained again for ``steps`` steps on all data.

    The card keeps the metrics of the first network, and says so. ``layers``: the layers that the second training
    changed.
    """
    metrics = {
        name: {**metric, "weights": "before refit"} if metric["weights"] == "published" else metric
        for name, metric in card["metrics"].items()
    }
    return {**card, "metrics": metrics, "refit_steps": steps, "refit_layers": layers}


# --- the networks that a network learned from


def ancestors(
    card: store.Card, role: Literal["base", "teacher", "calibration"], name: str = ""
) -> list[dict[str, Any]]:
    """Return a network and all networks from which it descends, for the card of a network that learns from it.

    ``name`` describes the network. By default, it is NAME@VERSION.
    """
    own = {
        "name": name or f"{card.name}@{card.version}",
        "role": role,
        "weights_sha256": card.weights_sha256,
        "data": card.data,
        "refit_steps": None if card.refit_layers == "last" else card.refit_steps,
        "command": card.command,
        "minutes": card.minutes,
    }
    return [*(each.model_dump() for each in card.ancestors or []), own]


def seen_data(card: store.Card, data: dict[str, str]) -> list[str]:
    """Return the names of the data on which a version or one of its ancestors was trained completely.

    Their validation and test parts are then known. A new last layer replaces a last layer that knows them.

    Data are the same if they have the same SHA-256. A file or folder with the same name also counts as the same,
    because files and folders grow.

    Args:
        card: the card of the version.
        data: the SHA-256 by key, as in the field ``data`` of a card.
    """
    steps = None if card.refit_layers == "last" else card.refit_steps
    networks = [(card.data, steps), *((each.data, each.refit_steps) for each in card.ancestors or [])]
    known = [(key, digest) for own, steps in networks if steps is not None for key, digest in own.items()]
    return [
        key.partition(":")[2] or key
        for key, digest in data.items()
        if any(key == other or digest == known_digest for other, known_digest in known)
    ]


def reject_seen(card: store.Card, option: str, data: dict[str, str], side: int | None = None) -> None:
    """Raise DataError if the version in ``option`` has seen the validation and test parts of the data.

    The metrics of a network that learns from such a version would be too good. The parts of images depend on the
    resized pixels. So a version that was trained on the same images with another size may also know test images.

    Args:
        card: the card of the version.
        option: the option that names the version, with its value.
        data: see ``seen_data``.
        side: the side length to which images are resized now, in pixels.
    """
    if names := ", ".join(seen_data(card, data)):
        raise DataError(
            f"{option}: this version of {card.name}, or a network it descends from, was trained on all of {names}, "
            "also on the validation and test parts, so the metrics of the new network would be too good. Omit "
            f"{option.split()[0]}, or name a version that was trained with --no-refit. If your {names} now has other "
            "content, give it another name"
        )
    if side in (None, card.sizes.get("image")) or card.refit_layers == "last":  # a new layer replaces the last layer
        return
    if names := ", ".join(key.partition(":")[2] for key in data if key in card.data):
        size = card.sizes["image"]
        raise DataError(
            f"{option}: this version of {card.name} was trained on images of {names} with --size {size}. With --size "
            f"{side}, the images are divided into other parts, so the version may know the new test images. Use "
            f"--size {size}"
        )
