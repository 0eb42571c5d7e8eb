"""Read the content of the model store at one point in time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app.engine.observer import VersionKey
from app.serving.model import LoadFailure, file_stamps
from app.serving.version_set import VersionSet
from app.store import Card, Store, StoreError, TaskName, rollout
from app.store.rollout import Rollout
from app.store.weights_size import weights_size


def is_unloaded(store: Store, name: str) -> bool | None:
    """Return whether a model is unloaded, or None if its rollout file cannot be read. No other file is read."""
    try:
        return store.rollout(name).unloaded
    except StoreError:
        return None


@dataclass(frozen=True)
class VersionFiles:
    """Properties of the files in a version's folder, besides the content of the card.

    Attributes:
        changed_ns: modification time of the folder, in ns since the epoch; 0 if it cannot be read.
        weights_bytes: size that the weights will have in memory; 0 if they are missing.
        pictures: file names of the pictures that the training has made.
    """

    changed_ns: int
    weights_bytes: int
    pictures: tuple[str, ...]

    @classmethod
    def read(cls, store: Store, card: Card, known: VersionFiles | None) -> VersionFiles:
        """Read the modification time, the size of the weights, and the names of the pictures.

        The names of the pictures are copied from ``known`` if the folder has not changed.
        """
        changed_ns = 0
        with contextlib.suppress(OSError):
            changed_ns = store.path(card.name, card.version).stat().st_mtime_ns
        unchanged = known if known and known.changed_ns == changed_ns else None
        pictures = unchanged.pictures if unchanged else tuple(store.pictures(card.name, card.version))
        return cls(changed_ns, weights_size(store.folder, card), pictures)


@dataclass
class StoreSnapshot:
    """The content of the store at one time: versions, cards, files, rollouts and default models."""

    numbers: dict[str, list[int]] = field(default_factory=dict)  # version numbers by model name
    rollouts: dict[str, Rollout] = field(default_factory=dict)
    cards: dict[VersionKey, Card] = field(default_factory=dict)  # readable cards only
    files: dict[VersionKey, VersionFiles] = field(default_factory=dict)  # of versions with readable cards
    failures: list[LoadFailure] = field(default_factory=list)  # cards and other files that cannot be read
    retry: frozenset[VersionKey] = frozenset()  # versions that failed to load and should be loaded again
    defaults: dict[TaskName, str] | None = None  # content of defaults.json; None if it cannot be read
    defaults_error: str = ""

    @property
    def names(self) -> set[str]:
        """The names of the models in the store, including those whose folders cannot be read."""
        return {*self.numbers, *(failure.name for failure in self.failures)}

    @property
    def unloaded(self) -> set[str]:
        """The names of the unloaded models."""
        return {name for name, current in self.rollouts.items() if current.unloaded}

    @property
    def weights_bytes(self) -> dict[VersionKey, int]:
        """The size that the weights of each version with a readable card will have in memory, in bytes."""
        return {key: files.weights_bytes for key, files in self.files.items()}

    @classmethod
    def scan(cls, store: Store, previous: StoreSnapshot, failed: Mapping[VersionKey, LoadFailure]) -> StoreSnapshot:
        """Read the store. ``previous`` is the last snapshot, and ``failed`` are the versions that could not be loaded.

        A card in ``previous`` is read again only if the version has failed and its files have changed. The files of
        other versions never change. If the folder of a model or a rollout file cannot be read, its content in
        ``previous`` is kept. A failed version is put into ``retry`` in three cases: its files have changed, its
        ``retry_at`` has passed, or its card is not in the store any more. Files may change because they were still
        being copied at the last scan, or because an operator has repaired them.
        """
        snapshot = cls()
        changed = {key for key, failure in failed.items() if file_stamps(store.folder, *key) != failure.files}
        for name in store.names():
            try:
                if numbers := store.numbers(name):
                    snapshot.numbers[name] = numbers
            except StoreError as error:
                snapshot.failures.append(LoadFailure(name, 0, str(error)))
                if name in previous.numbers:
                    snapshot.numbers[name] = previous.numbers[name]
        for name in snapshot.numbers:
            snapshot._read_rollout(store, previous, name)
            for number in snapshot.numbers[name]:
                known = None if (name, number) in changed else previous.cards.get((name, number))
                snapshot._read_card(store, previous, known, name, number)
        try:
            snapshot.defaults = store.defaults()
        except StoreError as error:
            snapshot.defaults_error = str(error)
        now = time.monotonic()
        snapshot.retry = frozenset(
            key
            for key, failure in failed.items()
            if key not in snapshot.cards or now >= failure.retry_at or key in changed
        )
        return snapshot

    def _read_rollout(self, store: Store, previous: StoreSnapshot, name: str) -> None:
        """Add the rollout of a model. If it has changed since the last scan, read the version numbers again.

        Otherwise, a version that was published and activated after the numbers were read would be missing. If the
        rollout retires all older versions, no version of the model would then be served.
        """
        known = previous.rollouts.get(name)
        try:
            while (current := store.rollout(name)) != known:
                known = current
                with contextlib.suppress(StoreError):
                    self.numbers[name] = store.numbers(name) or self.numbers[name]
            self.rollouts[name] = current
            for problem in current.missing(name, self.numbers[name]):
                self.failures.append(LoadFailure(f"{name}/{rollout.FILE}", 0, problem))
        except StoreError as error:
            self.rollouts[name] = previous.rollouts.get(name, Rollout())
            self.failures.append(LoadFailure(f"{name}/{rollout.FILE}", 0, str(error)))

    def _read_card(self, store: Store, previous: StoreSnapshot, known: Card | None, name: str, number: int) -> None:
        """Add the card and the files of a version. The card is read unless it is ``known``."""
        key = name, number
        try:
            card = self.cards[key] = known or store.card(name, number)
            self.files[key] = VersionFiles.read(store, card, previous.files.get(key))
        except StoreError as error:
            if number not in self.rollouts[name].retired:
                self.failures.append(LoadFailure(name, number, str(error)))


def worker_bytes(folder: Path, max_bytes: int = 0) -> int:
    """Estimate the memory of a worker in bytes, without the memory that workers share.

    The estimate is 100 MiB for torch (measured), plus twice the weights of the versions that stay in memory. The factor
    is 2 because some weights are copied when they are prepared for computing. ``max_bytes`` limits the weights in
    memory. 0 means no limit.
    """
    weights = 0
    store = Store(folder)
    for name in store.names():
        try:
            current = store.rollout(name)
        except StoreError:
            current = Rollout()
        resident = VersionSet.build(name, store.numbers(name), current, failed=()).resident
        for number in resident:
            with contextlib.suppress(StoreError):  # a version without a valid card is not loaded
                weights += weights_size(folder, store.card(name, number))
    return 100 * 2**20 + 2 * (min(weights, max_bytes) if max_bytes else weights)
