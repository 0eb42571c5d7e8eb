"""Publish a trained network to the model store, read the network of a run, and identify the code that trained it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from app import store
from app.store import Store
from app.store.version import Version, weights_digest

# Fields of a card that, with the weights, determine all answers. Fine-tuning may keep the weights, while the
# coefficients of known covariates are fitted again.
FIELDS_OF_SAME_VERSION = ("task", "kind", "sizes", "labels", "thresholds", "vocabulary", "residuals", "series")


def publish_once(models: Path, card: dict[str, Any], network: nn.Module, pictures: dict[str, Path]) -> None:
    """Publish the network unless the same version exists; print whether the version is active.

    So a run that was killed after publishing and is then resumed does not publish a second time.
    """
    name = str(card["name"])
    content = {**card, "version": 1, "weights_sha256": weights_digest(network.state_dict())}
    number = find_version(models, store.parse_card(store.card_text(content), f"the card of {name!r}"))
    if number is None:
        version = Store(models).publish(card, network.state_dict(), pictures)
        number = version.card.version
        print(f"published {version.folder}")
    else:
        print(f"{name}@{number} already has these weights")
    active = Store(models, Version.network).roles(name).active
    if active != number:
        command = runnable(f"python -m app.models activate {name} {number}", models)
        print(f"{name}@{number} is not active; {name}@{active} is. To activate the new version: {command}")


def read_run(folder: Path, option: str) -> tuple[store.Card, Any, dict[str, Any]]:
    """Return the card, the network and the config of a finished run. ``option`` is the option that names its folder.

    The folder may also be the folder of a published version. Then the config is empty.

    Raises:
        ValueError: the folder has no card or weights, or a file is damaged.
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
        raise ValueError(f"{option} {folder}: not the folder of a finished run ({error})") from error


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
