"""A trained network into the store: once, whatever is killed when, and with a word on whether it serves."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

from torch import nn

from app import store
from app.store import rollout


def publish_once(models: Path, card: dict[str, Any], network: nn.Module, pictures: dict[str, Path]) -> None:
    """Publish a network, unless a run that was killed has done so, and say it when the version does not serve."""
    name = str(card["name"])
    number = find_version(models, name, store.weights_digest(network.state_dict()))
    if number is None:
        version = store.publish(models, card, network.state_dict(), pictures)
        number = version.card.version
        print(f"published {version.folder}")
    else:
        print(f"{name} {number} has these weights already")
    serves = rollout.serving(models, name, rollout.read(models, name))
    if serves != number:
        where = "" if models == Path("models_store") else f" --store {shlex.quote(str(models))}"
        command = f"python -m app.models activate {name} {number}{where}"
        print(f"{name}@{number} waits, for {name}@{serves} serves; to have it serve: {command}")


def find_version(models: Path, name: str, digest: str) -> int | None:
    """The newest version of a name that has weights of this digest; None when there is none."""
    known = [number for other, number in store.all_versions(models) if other == name] if models.is_dir() else []
    for number in reversed(known):
        with contextlib.suppress(store.StoreError):  # of one that is broken nothing is known
            if store.read_card(models / name / str(number)).weights_sha256 == digest:
                return number
    return None
