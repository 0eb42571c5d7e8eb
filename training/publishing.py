"""Publish a trained network to the model store, read the network of a run, and identify the code that trained it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from app import store
from app.store import Store, catalogue
from app.store.version import Version, weights_digest
from training.data.datasets import DataError

# Fields of a card that, with the weights, determine all answers. Fine-tuning may keep the weights, while the
# coefficients of known covariates are fitted again.
FIELDS_OF_SAME_VERSION = ("task", "kind", "sizes", "labels", "thresholds", "vocabulary", "residuals", "series")


def publish_once(
    models: Path, card: dict[str, Any], tensors: Mapping[str, Tensor], pictures: Sequence[Path], activate: bool | None
) -> None:
    """Publish the network unless the same version exists; print what it replaces, and the command that undoes this.

    So a run that was killed after publishing and is then resumed does not publish a second time.

    Args:
        models: the store.
        card: the card, without the version and the digest.
        tensors: the weights.
        pictures: the pictures of the training.
        activate: see ``Store.add``.
    """
    name, published = str(card["name"]), Store(models, Version.network)
    content = {**card, "version": 1, "weights_sha256": weights_digest(tensors)}
    parsed = store.parse_card(store.card_text(content), f"the card of {name!r}")
    number, verb = find_version(models, parsed), "already published:"
    if number is None:
        files = {path.name: path for path in pictures}
        number, verb = published.publish(card, tensors, files, activate).card.version, "published"
    elif activate and published.roles(name).active != number:
        published.activate(name, number)
    print(f"{verb} {catalogue.publication(published, name, number)}")


def read_run(folder: Path, option: str) -> tuple[store.Card, Any, dict[str, Any]]:
    """Return the card, the network and the config of a finished run. ``option`` is the option that names its folder.

    The folder may also be the folder of a published version. Then the config is empty.

    Raises:
        DataError: the folder has no card or weights, or a file is damaged.
    """
    path = folder / "config.json"
    try:
        config = dict(json.loads(path.read_bytes())) if path.exists() else {}
        weights = (folder / store.WEIGHTS).read_bytes()
        fields = json.loads((folder / store.CARD).read_bytes())  # the card of a run has neither version nor digest
        digest = hashlib.sha256(weights).hexdigest()
        card = store.Card.model_validate({"version": 1, **fields, "weights_sha256": digest})
        return card, Version(folder, card, load(weights)).network(), config
    except (OSError, ValueError, TypeError, SafetensorError, store.StoreError) as error:
        raise DataError(f"{option} {folder}: not the folder of a finished run ({error})") from error


def find_version(models: Path, card: store.Card) -> int | None:
    """Return the newest version of a model with the same weights and ``FIELDS_OF_SAME_VERSION``, or None."""
    numbers = Store(models).numbers(card.name)
    for number in reversed(numbers):
        with contextlib.suppress(store.StoreError):  # a damaged version has no readable card
            other = Store(models).card(card.name, number)
            fields = (*FIELDS_OF_SAME_VERSION, "weights_sha256")
            if all(getattr(other, field) == getattr(card, field) for field in fields):
                return number
    return None


def runnable(command: str, models: Path = Path("models_store")) -> str:
    """Return a command of a model card as a user can run it: with this process's Python.

    The path of Python is relative to the current folder if it is below this folder, such as ``.venv/bin/python``.
    ``models``: the store that the command shall use. It becomes an option unless it is the default.
    """
    arguments = command.removeprefix("python ")
    python, here = Path(sys.executable or "python"), Path.cwd()
    if here in python.parents and python.parent != here:
        python = python.relative_to(here)
    option = "" if models == Path("models_store") else f" --store {shlex.quote(str(models))}"
    return f"{shlex.quote(str(python))} {arguments}{option}"


def commit() -> str:
    """Return a text with the commit of the git checkout. The text also says if the code differs from the commit.

    Without git or a git checkout, return ``unknown``.
    """
    root = Path(__file__).parents[1]  # the current folder may belong to another repository

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # git is not installed
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "app", "training")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")
