"""Determine which versions of a model are served, and choose the version that serves a request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from app.engine.observer import VersionKey
from app.errors import RetiredModel, UnknownModel, UnloadedModel, quote_value
from app.store import Card, TaskName
from app.store.rollout import Rollout

SHARE_PARTS = 10_000  # a canary's share is applied in steps of 0.01 %


@dataclass(frozen=True)
class VersionSet:
    """The served versions of one model. A change replaces the whole set, so that no request sees half of a change."""

    name: str
    numbers: tuple[int, ...]  # versions that requests may ask for: not retired, and not known to be damaged
    retired: tuple[int, ...]
    active: int | None  # serves requests without a version number, except the share of the canary
    previous: int | None  # becomes active after a rollback if there is no canary
    canary: int | None = None
    share: float = 0.0  # per cent of the requests without a version number that the canary gets
    unloaded: tuple[int, ...] = ()  # versions of an unloaded model, served when it is loaded again
    keeps_previous: bool = False  # whether the previous version stays in memory: it does if ``active.json`` names it

    @classmethod
    def build(cls, name: str, stored: Sequence[int], rollout: Rollout, failed: Collection[int]) -> VersionSet:
        """Return the version set of a model.

        ``stored`` are the versions in the store. ``failed`` are the versions that could not be loaded.
        """
        available = [number for number in stored if number not in failed and number not in rollout.retired]
        retired = tuple(rollout.retired)
        if rollout.unloaded:
            return cls(name, (), retired, None, None, unloaded=tuple(available))
        roles = rollout.roles(available)
        return cls(
            name,
            tuple(available),
            retired,
            roles.active,
            roles.previous,
            roles.canary.version if roles.canary else None,
            roles.canary.share if roles.canary else 0.0,
            keeps_previous=roles.previous in rollout.history,
        )

    @property
    def resident(self) -> list[int]:
        """The versions that stay in memory, most important first."""
        candidates = (self.active, self.canary, self.previous if self.keeps_previous else None)
        return list(dict.fromkeys(number for number in candidates if number is not None))

    def without(self, number: int) -> VersionSet:
        """Return the set without version ``number``, which must not be the active version."""
        numbers = tuple(other for other in self.numbers if other != number)
        canary = None if self.canary == number else self.canary
        return replace(
            self, numbers=numbers, canary=canary, previous=None if self.previous == number else self.previous
        )

    def labels(self) -> list[str]:
        """Return the versions that requests may ask for, as ``name@version``."""
        return [f"{self.name}@{number}" for number in self.numbers]

    def describe(self) -> str:
        """Return a text for the log that says which versions answer requests."""
        if self.unloaded:
            return "it is unloaded"
        canary = f", version {self.canary} is the canary ({self.share:g} %)" if self.canary else ""
        return f"version {self.active} is active{canary}" if self.active else "no version is active"

    def version_for(self, request_id: str) -> int | None:
        """Return the version that serves a request without a version number, or None if no version is active.

        The same request id always gets the same version of a set.
        """
        if self.canary is None:
            return self.active
        digest = hashlib.blake2b(f"{self.name} {request_id}".encode(), digest_size=8).digest()
        part = int.from_bytes(digest) % SHARE_PARTS
        return self.canary if part < self.share * SHARE_PARTS / 100 else self.active


def served_names(version_sets: Mapping[str, VersionSet]) -> list[str]:
    """Return the names of the models that have served versions, for error messages."""
    return [name for name, version_set in version_sets.items() if version_set.numbers]


def models_for(task: TaskName, names: Iterable[str], card: Callable[[str], Card | None]) -> str:
    """Return those of the models that are for a task, separated by commas, for error messages.

    ``card`` returns the card of a model's active version, or None if no version is active.
    """
    return ", ".join(name for name in names if (known := card(name)) and known.task == task)


def resolve_name(version_sets: Mapping[str, VersionSet], model: str, request_id: str, param: str) -> VersionKey:
    """Return the model name and the version number for ``model``, which is ``name`` or ``name@version``.

    If ``model`` gives no version, ``request_id`` decides between the active version and the canary. ``param`` is the
    name of the request field or path parameter that contained ``model``, for error messages.

    Raises:
        UnknownModel: no such model or version.
        RetiredModel, UnloadedModel: the version is retired, or the model is unloaded.
    """
    name, at, version = model.partition("@")
    version_set = version_sets.get(name)
    if version_set is None:
        raise UnknownModel(model, served_names(version_sets), param)
    if version_set.unloaded:
        raise UnloadedModel(f"model {quote_value(name)} is unloaded and must be loaded first", param)
    number = version_set.version_for(request_id)
    if at:
        number = int(version) if re.fullmatch(r"[1-9][0-9]{0,8}", version) else None
        if number in version_set.retired:
            served = ", ".join(version_set.labels()) or "none"
            raise RetiredModel(f"model {quote_value(model)} is retired; served models: {served}", param)
    if number is None or number not in version_set.numbers:
        raise UnknownModel(model, version_set.labels() or served_names(version_sets), param)
    return name, number
