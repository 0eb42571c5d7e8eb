"""Tiny networks with random weights, published to a store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from app import store
from app.networks import KINDS, build
from app.store import Store
from app.store.version import Version

VOCABULARY = [*"\n abcdefghij", store.UNKNOWN_CHARACTER]


CONDITIONAL: dict[str, Any] = {"latent": 4, "classes": 3, "widths": [4, 3, 2]}

LABELS: dict[str, Any] = {"labels": list("abcdefghij")}

FORECASTER: dict[str, Any] = {"context": 24, "patch": 12, "horizon": 6, "hidden": 8, "lags": 2, "members": 2}


SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # sizes of a small network of each kind, fields of its card
    "lenet": ({"conv": [2, 3], "hidden": [8, 8]}, LABELS),
    "digit-net": ({"conv": [2, 3], "features": 4}, LABELS),
    "whitened-net": ({"widths": [4, 4, 4]}, LABELS),
    "efficientnet-lite": ({"classes": 10, "image": 64, "widths": [4] * 9, "blocks": [1] * 7}, LABELS),
    "character-rnn": ({"vocabulary": len(VOCABULARY), "hidden": 8}, {"vocabulary": VOCABULARY}),
    "gated-rnn": ({"vocabulary": len(VOCABULARY), "hidden": 8, "layers": 2}, {"vocabulary": VOCABULARY}),
    "series-lstm": ({"window": 10, "hidden": 4}, {"residuals": [0.1, 0.2, 0.3]}),
    "forecaster": ({**FORECASTER, "smoothings": 3, "lag_forecasts": True}, {}),
    "gan-generator": ({"latent": 4, "hidden": [8]}, {}),
    "conditional-generator": (CONDITIONAL, {"labels": ["x", "y", "z"]}),
}

TINY = {"tiny-cnn": "lenet", "tiny-rnn": "character-rnn", "tiny-lstm": "series-lstm", "tiny-gan": "gan-generator"}

SECOND_NETWORKS = {"tiny-cgan": "conditional-generator", "tiny-forecaster": "forecaster"}


def tiny_card(name: str, task: str, kind: str, sizes: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return a complete model card; ``fields`` are added to it."""
    return {
        "name": name,
        "task": task,
        "title": "untrained, for tests",
        "kind": kind,
        "sizes": asdict(KINDS[kind][1](**sizes)),
        "inputs": [],
        "outputs": [],
        "metrics": {},
        "data": {},
        "seed": 0,
        "command": "none",
        "commit": "none",
        "versions": {"torch": torch.__version__},
        "hardware": "none",
        "minutes": 0.0,
        "created": "2026-01-01T00:00:00+00:00",
        "notes": "",
        **fields,
    }


def tiny_version(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the card and the tensors of a tiny network with new random weights."""
    kind = {**TINY, **SECOND_NETWORKS}[name]
    sizes, fields = SMALL[kind]
    sizes = FORECASTER if kind == "forecaster" else sizes
    return tiny_card(name, str(KINDS[kind].task), kind, sizes, fields), build(kind, sizes).state_dict()


def publish_tiny(folder: Path, name: str) -> Version:
    """Publish a further version of a tiny network, with new random weights."""
    torch.manual_seed(len(list(Store(folder).versions())) if folder.exists() else 0)
    return Store(folder).publish(*tiny_version(name))


def publish_network(
    folder: Path,
    name: str,
    kind: str = "forecaster",
    sizes: dict[str, Any] = FORECASTER,
    seed: int | None = None,
    **fields: Any,
) -> Version:
    """Publish a network with random weights. ``fields`` are added to its card."""
    if seed is not None:
        torch.manual_seed(seed)
    card = tiny_card(name, str(KINDS[kind].task), kind, sizes, fields)
    return Store(folder).publish(card, build(kind, sizes).state_dict())


def publish_small(folder: Path, kind: str, name: str) -> Version:
    """Publish a small network of a kind, with random weights that are always the same."""
    sizes, fields = SMALL[kind]
    return publish_network(folder, name, kind, sizes, 0, **fields)


def rewrite_card(folder: Path, **changes: object) -> None:
    card = json.loads((folder / store.CARD).read_text())
    card.update(changes)
    (folder / store.CARD).write_text(json.dumps({key: value for key, value in card.items() if value != "drop"}))


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights of a published version, and update the hash of the weights on its card."""
    tensors = load_file(folder / store.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / store.WEIGHTS)
    digest = hashlib.sha256((folder / store.WEIGHTS).read_bytes()).hexdigest()
    rewrite_card(folder, weights_sha256=digest)


def make_invalid(folder: Path) -> None:
    """Give a published version of tiny-gan weights that are not finite."""
    rewrite_weights(folder, lambda tensors: tensors["layers.0.bias"].fill_(torch.nan))
