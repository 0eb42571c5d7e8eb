"""What lies in the store at one moment, as the registry of a process wants to know it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app import store
from app.engine.observer import VersionKey
from app.serving.loader import Broken, look
from app.store import Card, StoreError, rollout
from app.store.rollout import Rollout


def unloaded(folder: Path, name: str) -> bool | None:
    """Whether a model is unloaded, by what was chosen for it alone; None where that cannot be read."""
    try:
        return rollout.read(folder, name).unloaded
    except StoreError:
        return None


@dataclass(frozen=True)
class Survey:
    """The versions of each name, what was chosen for it, and the cards; what cannot be read is ``broken``."""

    numbers: dict[str, list[int]] = field(default_factory=dict)
    chosen: dict[str, Rollout] = field(default_factory=dict)
    cards: dict[VersionKey, Card] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    failed: dict[VersionKey, Broken] = field(
        default_factory=dict
    )  # could not be loaded, and lie there as they did then

    @classmethod
    def of(cls, folder: Path, before: Survey, failed: Mapping[VersionKey, Broken]) -> Survey:
        """Look at the store. A card is read once, for a version never changes; those that are broken, each time.

        A choice that cannot be read leaves the one ``before``. Of the versions that have ``failed`` to load, those
        whose files have changed are not in it any more, for they may have been half copied, nor those whose time has
        come to be tried again.
        """
        found = cls()
        for name in store.names(folder):
            try:
                if numbers := store.numbers(folder, name):
                    found.numbers[name] = numbers
            except StoreError as error:  # what was there still is, and all others are followed
                found.broken.append(Broken(name, 0, str(error)))
                if name in before.numbers:
                    found.numbers[name] = before.numbers[name]
        for name, numbers in found.numbers.items():
            try:
                found.chosen[name] = rollout.read(folder, name)
            except StoreError as error:
                found.chosen[name] = before.chosen.get(name, Rollout())
                found.broken.append(Broken(f"{name}/{rollout.FILE}", 0, str(error)))
            for number in numbers:
                found._add(folder, before, name, number)
        now = time.monotonic()
        there = (entry for key, entry in failed.items() if key in found.cards and now < entry.again)
        found.failed.update(
            {(one.name, one.version): one for one in there if look(folder, one.name, one.version) == one.seen}
        )
        return found

    def _add(self, folder: Path, before: Survey, name: str, number: int) -> None:
        try:
            self.cards[name, number] = before.cards.get((name, number)) or store.read_card(folder / name / str(number))
        except StoreError as error:
            if number not in self.chosen[name].retired:
                self.broken.append(Broken(name, number, str(error)))
