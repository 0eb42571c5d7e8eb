"""The second training of own data: on all rows, after a twin was measured on held-out ones.

Usage, in a training on own data:

    run = ...; network = ...  # the twin: trained, validated and tested on held-out rows
    card = refit.describe({..., "metrics": ...}, steps)
    run.begin_refit()
    run.track(...)
    for step in run.steps(steps): ...  # the same training on all rows, for as many steps as the twin was best after
"""

from __future__ import annotations

from typing import Any

from training.options import Options

OPTION: dict[str, dict[str, Any]] = {
    "--no-refit": {
        "dest": "refit",
        "action": "store_false",
        "help": "publish the measured weights; by default they are trained again on all data, for as many steps",
    }
}
COMPARED = ("untuned_", "naive_")  # prefixes of the metrics of other methods, which no training changes


def is_planned(options: Options) -> bool:
    """Whether the command trains a second time before it publishes. Without publishing, it does not."""
    return options.publish and bool(options.data_options["refit"])


def describe(card: dict[str, Any], steps: int, how: str = "after which the twin was best") -> dict[str, Any]:
    """The card of weights that were trained again for ``steps`` steps on all data.

    Its metrics stay those of the measured twin, and say so. ``how`` says where the number of steps comes from.
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
