"""Publishing of a trained network to the model store."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

from torch import nn

from app import store
from app.store import rollout


def publish_once(models: Path, card: dict[str, Any], network: nn.Module, pictures: dict[str, Path]) -> None:
    """Publish the network unless a version with the same weights exists; print whether the version is active.

    A run that was killed after publishing and is resumed does not publish a second time.
    """
    name = str(card["name"])
    number = find_version(models, name, store.weights_digest(network.state_dict()))
    if number is None:
        version = store.publish(models, card, network.state_dict(), pictures)
        number = version.card.version
        print(f"published {version.folder}")
    else:
        print(f"{name}@{number} already has these weights")
    active = rollout.serving(models, name, rollout.read(models, name))
    if active != number:
        option = "" if models == Path("models_store") else f" --store {shlex.quote(str(models))}"
        command = f"python -m app.models activate {name} {number}{option}"
        print(f"{name}@{number} is not active; {name}@{active} is. To activate the new version: {command}")


def find_version(models: Path, name: str, digest: str) -> int | None:
    """The newest version of a model whose weights have this digest; None if there is none."""
    numbers = [number for other, number in store.all_versions(models) if other == name] if models.is_dir() else []
    for number in reversed(numbers):
        with contextlib.suppress(store.StoreError):  # a damaged version has no readable card
            if store.read_card(models / name / str(number)).weights_sha256 == digest:
                return number
    return None
