"""Train a second time, on all of the user's data, after a first network was measured on held-out data (refit).

This is the default for series, whose last values matter most. For images and texts, --refit requests it.

Usage, in a training on the user's data:

    run = ...; network = ...  # trained on one part of the data, validated and tested on the other parts
    card = refit.describe({..., "metrics": ...}, steps)
    run.begin_refit()
    run.track(...)
    for step in run.steps(steps): ...  # trains on all data; ``steps``: the number that was best for the first network
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

from training.options import Options


def option(default: bool) -> dict[str, dict[str, Any]]:
    """Return the option --refit, with its default."""
    text = (
        "train a second network on all data, and publish it; it cannot be tested. Otherwise publish the tested network"
    )
    return {"--refit": {"action": argparse.BooleanOptionalAction, "default": default, "help": text}}


def is_planned(options: Options) -> bool:
    """Return whether the command trains a second time before it publishes; False if it does not publish."""
    return options.publish and bool(options.refit)


def describe(card: dict[str, Any], steps: int, layers: Literal["all", "last"] = "all") -> dict[str, Any]:
    """Return the model card of a network that was trained again for ``steps`` steps on all data.

    The card keeps the metrics of the first network, and says so. ``layers``: the layers that the second training
    changed.
    """
    metrics = {
        name: {**metric, "weights": "before refit"} if metric["weights"] == "published" else metric
        for name, metric in card["metrics"].items()
    }
    return {**card, "metrics": metrics, "refit_steps": steps, "refit_layers": layers}
