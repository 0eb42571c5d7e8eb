"""The fields of a model card that follow from the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from app.networks.forecaster import QUANTILES


def classifier(kind: str, network: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Return the fields of an image classifier."""
    sizes = network.sizes
    inputs = [("image", "uint8", [-1, sizes.channels, sizes.image, sizes.image])]
    return _card("classify", kind, network, inputs, [("probabilities", "float64", [-1, sizes.classes])]) | {
        "labels": labels
    }


def generator(kind: str, network: Any, labels: Sequence[str] | None) -> dict[str, Any]:
    """Return the fields of an image generator. ``labels``: None if it takes no labels."""
    sizes = network.sizes
    inputs = [("latents", "float64", [-1, sizes.latent])] + ([("classes", "int64", [-1])] if labels else [])
    outputs = [("images", "uint8", [-1, sizes.channels, sizes.image, sizes.image])]
    return _card("sample", kind, network, inputs, outputs) | {"labels": labels}


def language_model(kind: str, network: Any, vocabulary: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a network that continues texts."""
    outputs = [("logits", "float32", [-1, -1, len(vocabulary)])]
    return _card("continue", kind, network, [("characters", "int64", [-1, -1])], outputs) | {"vocabulary": vocabulary}


def forecaster(network: Any) -> dict[str, Any]:
    """Return the fields of a forecaster of any series."""
    outputs = [("mean", "float64", [-1, -1]), ("quantiles", "float64", [-1, -1, len(QUANTILES)])]
    return _card("forecast", "forecaster", network, [("values", "float64", [-1, -1])], outputs)


def window_forecaster(network: Any) -> dict[str, Any]:
    """Return the fields of a forecaster that reads a window of fixed length."""
    inputs = [("values", "float64", [-1, network.sizes.window])]
    return _card("forecast", "series-lstm", network, inputs, [("mean", "float64", [-1, -1])])


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


Tensors = Sequence[tuple[str, str, list[int]]]  # name, type and shape of each input or output


def _card(task: str, kind: str, network: Any, inputs: Tensors, outputs: Tensors) -> dict[str, Any]:
    interface = {
        key: [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in tensors]
        for key, tensors in (("inputs", inputs), ("outputs", outputs))
    }
    return {"task": task, "kind": kind, "sizes": asdict(network.sizes), **interface}
