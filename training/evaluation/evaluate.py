"""Measure what lies in ``models_store/`` again, with the code that serves it, and compare with the cards.

    python -m training.evaluation.evaluate [--store DIR] [NAME ...]

Ends with status 1 when a figure is off by more than its rounding, or the data are not those of the card. Networks that
are computed in bfloat16 where the processor can may be off by 0.002: half of their figures are off by 0.0001 to 0.001.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from app import store
from app.networks import KINDS
from app.tasks import PREDICTORS
from training import cnn, gan, lstm, rnn
from training.data import datasets, image_folders, texts
from training.data.datasets import DataError
from training.gan import JUDGE, load_judge
from training.loops import cnn_finetune, forecaster_finetune, gan_finetune

HALVED = 0.002  # by which a figure may differ between processors with and without products in bfloat16
LEARNT = {"samples_only_accuracy": 0.004}  # what a training ends at that measures: processors round it elsewhere
SCRIPTS: dict[str, Any] = {"classify": cnn, "continue": rnn, "forecast": lstm, "sample": gan}
OWN: dict[str, Any] = {
    "classify": cnn_finetune,
    "continue": rnn,
    "forecast": forecaster_finetune,
    "sample": gan_finetune,
}


def own_data(card: store.Card, models: Path) -> Any:
    """The caller's own data that a version was trained on, read as its command says; None for a data set of ours.

    Those of series come with the version that the training began with.

    Raises DataError when they are not there any more.
    """
    if not any(":" in name for name in card.data):
        return None
    words = shlex.split(card.command)
    chosen, config = SCRIPTS[card.task].arguments(words[words.index("-m") + 2 :])
    own = chosen.own
    if card.task == "continue":
        return texts.read(own["text"])
    if card.task == "forecast":
        base = next(name for name in card.data if "@" in name and ":" not in name)
        return forecaster_finetune.read(replace(chosen, store=models, own={**own, "origin": base}), config.horizon)
    if card.task == "sample":
        return gan_finetune.read(own["images"], own["size"], own["colour"], chosen.name)
    return image_folders.read(own["images"], own["size"])


def measure(version: store.Version, models: Path, device: str, own: Any = None) -> dict[str, Any]:
    """All metrics of a version, from its stored weights; ``own``: the caller's data it was trained on."""
    predictor: Any = PREDICTORS[version.card.task](version, torch.device(device))
    if own is not None:
        found: dict[str, Any] = OWN[version.card.task].measure(predictor, own)
    elif version.card.task == "sample":
        judge = next(int(name.partition("@")[2]) for name in version.card.data if name.startswith(JUDGE))
        found = gan.evaluate(predictor, load_judge(models, device, judge))
    else:
        found = SCRIPTS[version.card.task].evaluate(predictor)
    return found


def sha256_of(name: str, models: Path, own: Any = None) -> str:
    """The sha256 of a data set as it lies here, or of the weights of a model by which others are judged."""
    if ":" in name:
        return str(own.sha256)
    if "@" in name:
        model, _, number = name.partition("@")
        return store.read_card(models / model / number).weights_sha256
    found: str = getattr(datasets, name)().sha256
    return found


def compare(card: store.Card, measured: dict[str, Any]) -> list[str]:
    """A line for each figure; where it is off by more than one of its last digit, ``HALVED`` or ``LEARNT``, a cross."""
    halved = hasattr(KINDS[card.kind][0], "halve")
    lines = []
    for name in sorted(card.metrics.keys() | measured.keys()):
        if name not in card.metrics or name not in measured:
            lines.append(f"  {name:34} {'on the card only' if name in card.metrics else 'not on the card'} ✗")
            continue
        stated, now = card.metrics[name].value, measured[name]["value"]
        decimals = card.metrics[name].decimals
        same = abs(stated - now) <= max(1.01 * 10**-decimals, HALVED if halved else 0, LEARNT.get(name, 0))
        lines.append(f"  {name:34} {stated:.{decimals}f}  measured {now:.{decimals}f} {'✓' if same else '✗'}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to measure (default: all)")
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args(argv)
    wrong = found = absent = 0
    for name, number in store.all_versions(chosen.store):
        if chosen.names and name not in chosen.names:
            continue
        version = store.read_version(chosen.store, name, number)
        try:
            own = own_data(version.card, chosen.store)
        except DataError as error:
            print(
                f"{name}@{number}\n  its data are not here, so its figures are not measured again: {error}", flush=True
            )
            absent += 1
            continue
        found += 1
        stated = version.card.data.items()
        lines = [
            f"  {name:34} is not that of the card ✗"
            for name, sha in stated
            if sha256_of(name, chosen.store, own) != sha
        ]
        lines += compare(version.card, measure(version, chosen.store, chosen.device, own))
        wrong += sum(line.endswith("✗") for line in lines)
        print(f"{name}@{number}", *lines, sep="\n", flush=True)
    if not found and not absent:
        parser.error(f"nothing to measure in {chosen.store}")
    told = f"{wrong} figures are off" if wrong else f"all figures of {found} versions are as their cards say"
    print(f"{told}; {absent} not measured" if absent else told)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
