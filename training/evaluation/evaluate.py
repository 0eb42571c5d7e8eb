"""Measure all versions in a model store again with the serving code, and compare the metrics with the cards.

    python -m training.evaluation.evaluate [--store DIR] [NAME or NAME@VERSION ...]

It also prints the speed of each version on one thread of the CPU. Use an idle machine for this figure.

The exit status is 1 if a metric differs by more than its rounding, or if the data differ from those on the card. The
command does not measure versions that were trained a second time on all data, because no held-out data are left for
them. It only compares their data with the card.

Differences that come from the processor do not change the exit status. The command prints these differences with their
size and reason. These differences may be up to 0.002 for networks that some processors compute in bfloat16. For metrics
whose measurement includes the training of a network, they may be up to 0.004 if the card states another processor.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app import store
from app.networks import KINDS, is_imported
from app.store import Store
from app.store.version import Version
from app.tasks import TASKS
from training import cnn, gan, lstm, rnn
from training.data import datasets
from training.data.datasets import DataError
from training.evaluation import generation, speed
from training.limits import limits
from training.options import STORE, STORE_HELP, HelpFormatter, store_of

# Largest difference between processors with and without bfloat16. Usual differences are 0.0001 to 0.001.
MAX_BFLOAT16_DIFFERENCE = 0.002
# Metric -> largest difference between processors. Its measurement trains a network, which amplifies rounding errors.
TRAINED = {"samples_only_accuracy": 0.004}
DIFFERS = "≈ differs by"  # marks a metric that differs because of the processor


class EvaluationError(Exception):
    """Raised for a version that cannot be measured again."""


# The keys are the modules in the commands on the cards. Add one line here for each new training script. Its function
# ``evaluate`` returns the metrics of a predictor on a data set of ``training.data.datasets``. Scripts for users' own
# data also have ``arguments``, ``read_own`` and ``measure_own``.
SCRIPTS: dict[str, Any] = {
    "training.cnn": cnn,
    "training.recalibrate": cnn,  # on the card of cifar10-accurate@2; now an option of training.cnn
    "training.rnn": rnn,
    "training.lstm": lstm,
    "training.gan": gan,
}


def script_of(card: store.Card) -> tuple[Any, list[str]]:
    """Return the training script of the command on a card, and its arguments. Raises EvaluationError."""
    words = shlex.split(card.command)
    if "-m" not in words[:-1]:
        raise EvaluationError(f"command is {card.command!r}; expected one such as 'python -m training.cnn'")
    at = words.index("-m") + 1
    if words[at] not in SCRIPTS:
        raise EvaluationError(f"command names the module {words[at]!r}; allowed are {', '.join(SCRIPTS)}")
    return SCRIPTS[words[at]], words[at + 1 :]


def own_data(card: store.Card, models: Path) -> Any:
    """Return the user's own data that a version was trained on, or None for a built-in data set.

    The device of the command is replaced by the CPU, because this machine may not have the device.

    Raises DataError if the data are no longer there, and EvaluationError for an unknown training script or a command
    that is rejected.
    """
    if not any(":" in name for name in card.data):
        return None
    script, words = script_of(card)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            options, config = script.arguments([*words, "--device", "cpu"])
    except SystemExit as error:
        reason = error.code if isinstance(error.code, str) else messages.getvalue().rpartition("error: ")[2].strip()
        raise EvaluationError(f"command {card.command!r} is rejected: {reason}") from error
    options.store = models
    return script.read_own(options, config, card)


def measure(version: Version, models: Path, device: str, own: Any = None) -> dict[str, Any]:
    """Return all metrics of a version, measured with its stored weights. ``own`` is the result of ``own_data``.

    Raises EvaluationError for an unknown training script.
    """
    card = version.card
    (script, _), predictor = script_of(card), TASKS[card.task].load(version, torch.device(device))
    if own is not None:
        return script.measure_own(predictor, own)
    # A generator is rated by a version of the reference classifier.
    numbers = [int(name.partition("@")[2]) for name in card.data if "@" in name]
    return script.evaluate(predictor, *(generation.load_reference_classifier(models, device, n) for n in numbers))


def sha256_of(name: str, models: Path, own: Any) -> str:
    """Return the SHA-256 of a data set, of the user's own data, or of the weights of a reference classifier."""
    if ":" in name:
        return str(own.sha256)
    if "@" in name:
        model, _, number = name.partition("@")
        return Store(store_of(models, model, int(number))).card(model, int(number)).weights_sha256
    digest: str = getattr(datasets, name)().sha256
    return digest


def allowed_difference(card: store.Card, name: str, now_on: str) -> tuple[float, str]:
    """Return the largest difference from the card that the processor ``now_on`` may cause, and the reason for it."""
    before_on = card.hardware.partition(", ")[0]
    if name in TRAINED and now_on != before_on:
        return TRAINED[name], f"card: {before_on}, now: {now_on}"
    if hasattr(KINDS[card.kind][0], "to_bfloat16"):
        return MAX_BFLOAT16_DIFFERENCE, f"some processors use bfloat16; card: {before_on}, now: {now_on}"
    return 0.0, ""


def compare(card: store.Card, measured: dict[str, Any], now_on: str) -> list[str]:
    """Return one line per metric. Lines of wrong metrics end with a cross.

    ``now_on`` is the processor of this measurement. A metric that is not on the card was added to the code later, so it
    does not count as wrong.
    """
    lines = []
    for name in sorted(card.metrics.keys() | measured.keys()):
        if name not in measured:
            lines.append(f"  {name:34} on the card only ✗")
            continue
        now = measured[name]["value"]
        if name not in card.metrics:
            lines.append(f"  {name:34} not on the card, measured {now:.{measured[name]['decimals']}f}")
            continue
        stated, decimals = card.metrics[name].value, card.metrics[name].decimals
        allowed, reason = allowed_difference(card, name, now_on)
        if abs(now - stated) <= 1.01 * 10**-decimals:
            mark = "✓"
        else:
            within = abs(now - stated) <= allowed
            mark = f"{DIFFERS} {now - stated:+.{decimals}f} ({reason})" if within else "✗"
        lines.append(f"  {name:34} {stated:.{decimals}f}  measured {now:.{decimals}f} {mark}")
    return lines


def check(version: Version, models: Path, device: str) -> list[str]:
    """Measure a version again and return one line per metric. Lines of wrong metrics or data end with a cross.

    Raises DataError if the user's own data are no longer there, and EvaluationError for an unknown training script.
    """
    own = own_data(version.card, models)
    changed = [name for name, sha256 in version.card.data.items() if sha256_of(name, models, own) != sha256]
    lines = [f"  {name:34} differs from the card ✗" for name in changed]
    if version.card.refit_steps is not None:
        return [*lines, "  not measured: the metrics are those before the refit, of a network that is not published"]
    return [*lines, *compare(version.card, measure(version, models, device, own), speed.hardware(device))]


def measured_speed(version: Version) -> dict[str, Any]:
    """Measure the speed of a version on the CPU, as its training did."""
    predictor = TASKS[version.card.task].load(version, torch.device("cpu"))
    return speed.measure(predictor, speed.processor(), limits().speed_seconds)


def selected(parser: argparse.ArgumentParser, models: Path, names: Sequence[str]) -> list[tuple[str, int]]:
    """Return the versions in a model store, or those that ``names`` lists as NAME or NAME@VERSION.

    A store that is not a folder, or an unknown name, ends the command with a message.
    """
    if not models.is_dir():
        parser.error(f"--store is {str(models)!r}, which is not a folder")
    versions = {f"{name}@{number}": (name, number) for name, number in Store(models).versions()}
    for text in names:
        if text not in versions and text not in dict(versions.values()):
            parser.error(f"{models} has no {text}; it has {', '.join(versions) or 'nothing'}")
    return [key for label, key in versions.items() if not names or label in names or key[0] in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison of all versions; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models or versions to measure (default: all)")
    parser.add_argument("--store", metavar="DIR", type=Path, default=STORE, help=STORE_HELP)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    options = parser.parse_args(argv)
    wrong = measured = missing = different = 0
    for name, number in selected(parser, options.store, options.names):
        try:
            version = Store(options.store).read(name, number)
            if is_imported(version.card.kind):  # its card has no metrics on a data set
                continue
            lines = check(version, options.store, options.device)
            lines.append(f"  {speed.describe(measured_speed(version), version.card.task)}")
            measured += 1
        except DataError as error:
            lines = [f"  not measured, because the data are missing: {error}"]
            missing += 1
        except (EvaluationError, store.StoreError) as error:
            lines = [f"  not measured: {error} ✗"]
        wrong += sum(line.endswith("✗") for line in lines)
        different += sum(DIFFERS in line for line in lines)
        print(f"{name}@{number}", *lines, sep="\n", flush=True)
    if not measured and not missing and not wrong:
        parser.error(f"nothing to measure in {options.store}")
    summary = f"{wrong} metrics are wrong" if wrong else f"all metrics of {measured} versions agree with their cards"
    summary += f"; {different} metrics differ because of the processor" if different else ""
    print(f"{summary}; {missing} not measured" if missing else summary)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
