"""Train a second time, on all of the user's data, after a first network (the twin) was measured on held-out data.

Usage, in a training on the user's data:

    run = ...; network = ...  # the twin: trained on one part of the data, validated and tested on the other parts
    card = refit.describe({..., "metrics": ...}, steps)
    run.begin_refit()
    run.track(...)
    for step in run.steps(steps): ...  # trains on all data; ``steps``: the number that was best for the twin
"""

from __future__ import annotations

from typing import Any

from training.options import Options

OPTION: dict[str, dict[str, Any]] = {
    "--no-refit": {
        "dest": "refit",
        "action": "store_false",
        "help": "publish the network that was tested. By default, a second network is trained on all data for the same "
        "number of steps, and this second network is published",
    }
}
COMPARED = ("untuned_", "naive_")  # prefixes of metrics of other methods, which the second training does not change


def is_planned(options: Options) -> bool:
    """Return whether the command trains a second time before it publishes; False if it does not publish."""
    return options.publish and bool(options.data_options["refit"])


def describe(card: dict[str, Any], steps: int, how: str = "after which the twin was best") -> dict[str, Any]:
    """Return the model card of a network that was trained again for ``steps`` steps on all data.

    The card keeps the metrics of the twin, and their descriptions say so. ``how``: text after the number of steps in
    the notes.
    """
    metrics = {
        name: metric if name.startswith(COMPARED) else {**metric, "split": f"{metric['split']}; measured on a twin"}
        for name, metric in card["metrics"].items()
    }
    notes = (
        f"{card['notes']} The metrics are those of a twin, which was trained without the held-out data. The published "
        f"weights were then trained in the same way on all data, for the {steps:,} steps {how}. "
        "They were not measured, because no data are left for it."
    )
    return {**card, "metrics": metrics, "notes": notes, "refit_steps": steps}
