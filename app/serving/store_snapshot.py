"""What lies in the store at one moment, as the registry of a process wants to know it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app import store
from app.engine.observer import VersionKey
from app.serving.loader import LoadFailure, file_stamps
from app.store import Card, StoreError, rollout
from app.store.rollout import Rollout


def is_unloaded(folder: Path, name: str) -> bool | None:
    """Whether a model is unloaded, by what was chosen for it alone; None where that cannot be read."""
    try:
        return rollout.read(folder, name).unloaded
    except StoreError:
        return None


@dataclass(frozen=True)
class StoreSnapshot:
    """The versions of each name, what was chosen for it, and the cards; what cannot be read is ``broken``."""

    numbers: dict[str, list[int]] = field(default_factory=dict)
    rollouts: dict[str, Rollout] = field(default_factory=dict)
    cards: dict[VersionKey, Card] = field(default_factory=dict)
    failures: list[LoadFailure] = field(default_factory=list)
    load_failures: dict[VersionKey, LoadFailure] = field(
        default_factory=dict
    )  # could not be loaded, and lie there as they did then

    @classmethod
    def scan(cls, folder: Path, previous: StoreSnapshot, failed: Mapping[VersionKey, LoadFailure]) -> StoreSnapshot:
        """Look at the store. A card is read once, for a version never changes; those that are broken, each time.

        A choice that cannot be read leaves the one ``before``. Of the versions that have ``failed`` to load, those
        whose files have changed are not in it any more, for they may have been half copied, nor those whose time has
        come to be tried again.
        """
        found = cls()
        for name in store.model_names(folder):
            try:
                if numbers := store.version_numbers(folder, name):
                    found.numbers[name] = numbers
            except StoreError as error:  # what was there still is, and all others are followed
                found.failures.append(LoadFailure(name, 0, str(error)))
                if name in previous.numbers:
                    found.numbers[name] = previous.numbers[name]
        for name, numbers in found.numbers.items():
            try:
                found.rollouts[name] = rollout.read(folder, name)
            except StoreError as error:
                found.rollouts[name] = previous.rollouts.get(name, Rollout())
                found.failures.append(LoadFailure(f"{name}/{rollout.FILE}", 0, str(error)))
            for number in numbers:
                found._add(folder, previous, name, number)
        now = time.monotonic()
        there = (entry for key, entry in failed.items() if key in found.cards and now < entry.retry_at)
        found.load_failures.update(
            {(one.name, one.version): one for one in there if file_stamps(folder, one.name, one.version) == one.files}
        )
        return found

    def _add(self, folder: Path, before: StoreSnapshot, name: str, number: int) -> None:
        try:
            self.cards[name, number] = before.cards.get((name, number)) or store.read_card(folder / name / str(number))
        except StoreError as error:
            if number not in self.rollouts[name].retired:
                self.failures.append(LoadFailure(name, number, str(error)))
