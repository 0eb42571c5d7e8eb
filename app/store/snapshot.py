"""The content of the model store at one point in time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from app.store.card import CARD, Card, StoreError, TaskName
from app.store.rollout import FILE, Roles, Rollout
from app.store.store import DEFAULTS, WEIGHTS, Store

T = TypeVar("T")
Stamp = tuple[tuple[int, int, int], ...]


def read_stamp(folder: Path) -> Stamp:
    """Return size and times of a version's folder, card and weights. They differ after each change of a file.

    The times are those of the last change of the content, and of the inode, for example of its permissions.
    """
    stamp = []
    for path in (folder, folder / CARD, folder / WEIGHTS):
        with suppress(OSError):
            status = path.stat()
            stamp.append((status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(stamp)


@dataclass(frozen=True)
class StoredVersion:
    """A version in the store. If its card cannot be read, ``card`` is None and ``problem`` says why."""

    stamp: Stamp = ()
    card: Card | None = None
    problem: str = ""
    pictures: tuple[str, ...] = ()

    @classmethod
    def read(cls, store: Store, name: str, number: int, known: StoredVersion | None) -> StoredVersion:
        """Read a version, or return ``known`` if its card was readable and no file has changed since."""
        stamp = read_stamp(store.path(name, number))
        if known and known.card and known.stamp == stamp:
            return known
        try:
            return cls(stamp, store.card(name, number), pictures=tuple(store.pictures(name, number)))
        except StoreError as error:
            return cls(stamp, None, str(error))


@dataclass
class Snapshot:
    """The versions, rollouts and default models in the store. ``problems`` are error messages by file or folder."""

    versions: dict[str, dict[int, StoredVersion]] = field(default_factory=dict)
    rollouts: dict[str, Rollout] = field(default_factory=dict)
    defaults: dict[TaskName, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, store: Store, previous: Snapshot | None = None) -> Snapshot:
        """Read the store. What cannot be read is taken from ``previous``.

        Raises OSError for an unreadable store.

        The rollout of a model is read before its versions. Otherwise, a version that was published and activated in
        between would be missing.
        """
        snapshot, previous = cls(), previous or cls()

        def attempt(place: str, read: Callable[[], T], otherwise: T) -> T:
            try:
                return read()
            except StoreError as error:
                snapshot.problems[place] = str(error)
                return otherwise

        for name in store.names():
            known = previous.versions.get(name, {})
            rollout = attempt(f"{name}/{FILE}", partial(store.rollout, name), previous.rollouts.get(name, Rollout()))
            numbers = attempt(name, partial(store.numbers, name), list(known))
            if numbers or name in snapshot.problems:
                snapshot.rollouts[name] = rollout
                snapshot.versions[name] = {
                    number: StoredVersion.read(store, name, number, known.get(number)) for number in numbers
                }
                if missing := [
                    f"{name}/{FILE} names version {number}, which is not in the store"
                    for number in rollout.in_use
                    if number not in numbers
                ]:
                    snapshot.problems[f"{name}/{FILE}"] = "; ".join(missing)
        snapshot.defaults = attempt(DEFAULTS, store.defaults, previous.defaults)
        return snapshot

    def roles(self, name: str, damaged: Collection[tuple[str, int]] = ()) -> tuple[Roles, Card | None]:
        """Return the roles of a model's versions, and the card of the active version.

        Versions without a readable card, and those in ``damaged``, have no role.
        """
        versions = self.versions[name]
        roles = self.rollouts[name].roles([n for n in versions if versions[n].card and (name, n) not in damaged])
        return roles, versions[roles.active].card if roles.active else None

    def default_problems(self, tasks: Mapping[str, str]) -> list[str]:
        """Return an error message for each default model that cannot answer.

        ``tasks`` has the task of the active version of each model.
        """
        problems = []
        for task, name in self.defaults.items():
            if name not in self.versions:
                problems.append(f"{DEFAULTS} names {name!r}, which is not in the store")
            elif self.rollouts[name].unloaded:
                problems.append(f"{DEFAULTS} names {name!r}, which is unloaded")
            elif tasks.get(name, task) != task:
                problems.append(f"{DEFAULTS}: {name!r} is for {tasks[name]!r}, expected one for {task!r}")
        return list(dict.fromkeys(problems))
