"""Decide which versions are served, loaded and evicted. All functions are pure.

The active version, the canary, the shadow, and a previous version that ``active.json`` names stay in memory even
without requests: they are resident. Other versions are loaded on demand, when a request names their number.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from app.engine.observer import VersionKey
from app.errors import TooManyVersions
from app.limits import Limits
from app.serving.model import Model
from app.store import Roles, Rollout
from app.store.snapshot import Snapshot, StoredVersion

SHARE_PARTS = 10_000  # a canary's share is applied in steps of 0.01 %


class State(Enum):
    """The state of a version in this process."""

    UNLOADED = "unloaded"  # in the store but not in memory
    LOADING = "loading"
    READY = "ready"  # in memory
    FAILED = "failed"  # cannot be used, for example because its files are damaged


@dataclass(eq=False)
class Entry:
    """A version in the table of this process. An entry with version 0 is a file that cannot be used.

    Attributes:
        stored: its files at the last scan. If they change, a failed version is loaded again.
        reason: why a failed version cannot be used.
        retry_at: time on the clock after which a failed version is loaded again even if its files are the same.
        model: the version in memory, if it is ready.
        used_at: time on the clock of the last request, or of loading.
        loading: the task that loads the version, while its state is loading.
    """

    name: str
    version: int
    stored: StoredVersion = field(default_factory=StoredVersion)
    state: State = State.UNLOADED
    reason: str = ""
    retry_at: float = math.inf
    model: Model | None = None
    used_at: float = 0.0
    loading: asyncio.Task[None] = field(init=False, repr=False)

    @property
    def label(self) -> str:
        """The version as ``name@version``, or the path of the file."""
        return f"{self.name}@{self.version}" if self.version else self.name


Table = Mapping[VersionKey, Entry]


@dataclass(frozen=True, kw_only=True)
class VersionSet(Roles):
    """The versions of one model that requests may ask for. Those of an unloaded model have no roles.

    Attributes:
        numbers: the served versions: not retired, not known to be damaged.
        unloaded: the versions of an unloaded model, which are served after it is loaded again.
        resident: the versions that stay in memory, most important first.
        state: see ``Rollout.state``.
    """

    name: str
    numbers: tuple[int, ...] = ()
    retired: tuple[int, ...] = ()
    unloaded: tuple[int, ...] = ()
    resident: tuple[int, ...] = ()
    state: str = ""

    @classmethod
    def build(cls, name: str, usable: Iterable[int], rollout: Rollout) -> VersionSet:
        """Return the version set of a model. ``usable`` are the versions that are not known to be damaged."""
        numbers, retired = tuple(number for number in usable if number not in rollout.retired), tuple(rollout.retired)
        roles = rollout.roles(numbers)
        state = rollout.state(name, roles)
        if rollout.unloaded:
            return cls(name=name, retired=retired, unloaded=numbers, state=state)
        kept = roles.previous if roles.previous in rollout.history else None
        canary, shadow = (each.version if each else None for each in (roles.canary, roles.shadow))
        wanted = (roles.active, canary, kept, shadow)
        resident = tuple(dict.fromkeys(number for number in wanted if number is not None))
        return cls(name=name, numbers=numbers, retired=retired, resident=resident, state=state, **vars(roles))

    def version_for(self, request_id: str) -> int | None:
        """Return the version for a request without a version number, or None if no version is active.

        The same request id always gets the same version of a set.
        """
        if self.canary is None:
            return self.active
        digest = hashlib.blake2b(f"{self.name} {request_id}".encode(), digest_size=8).digest()
        part = int.from_bytes(digest) % SHARE_PARTS
        return self.canary.version if part < self.canary.share * SHARE_PARTS / 100 else self.active


VersionSets = Mapping[str, VersionSet]  # by model name


@dataclass(frozen=True)
class Plan:
    """What to do now: the version sets to serve, the versions to load (most important first) and those to evict."""

    serve: dict[str, VersionSet]
    load: list[VersionKey]
    evict: dict[VersionKey, str]  # with the reason
    desired: dict[str, VersionSet]


def plan(
    snapshot: Snapshot,
    table: Table,
    served: VersionSets,
    now: float,
    idle_seconds: float,
) -> Plan:
    """Compare the store with the versions in memory.

    A model gets its desired version set when the active version and the canary of the set are in memory. Until then,
    it keeps its ``served`` set, unless the served active version is not in memory either.

    Active versions are loaded before others, and those of default models first. A version that is not resident is
    evicted if it has had no request for ``idle_seconds`` and all resident versions of its model are in memory: if one
    of these cannot be loaded, the version may replace it. ``now`` is the time on the clock of the table.
    """
    ready = {key for key, entry in table.items() if entry.state is State.READY}
    usable = {key for key, entry in table.items() if entry.state is not State.FAILED}
    desired = {
        name: VersionSet.build(name, [n for n in numbers if (name, n) in usable], snapshot.rollouts[name])
        for name, numbers in snapshot.versions.items()
        if numbers
    }
    serve = {}
    for name, wanted in desired.items():
        current = served.get(name)
        used = (wanted.active, wanted.canary and wanted.canary.version)
        is_ready = {(name, number) for number in used if number} <= ready
        if is_ready or (current and (name, current.active) not in ready):
            serve[name] = wanted
        elif current:
            serve[name] = current
    load = [(name, n) for name, wanted in desired.items() for n in wanted.resident if (name, n) not in ready]
    default_names = snapshot.defaults.values()
    load.sort(key=lambda key: (key[1] != desired[key[0]].active, key[0] not in default_names))
    incomplete = {name for name, _ in load}
    evict = {}
    for name, number in ready:
        sets = [version_sets[name] for version_sets in (desired, serve) if name in version_sets]
        if not any(number in version_set.numbers for version_set in sets):
            evict[name, number] = "it is not served any more"
        elif name in incomplete or any(number in each.resident for each in sets):
            continue
        elif now - table[name, number].used_at > idle_seconds:
            evict[name, number] = f"no request for {idle_seconds:g} s"
    return Plan(serve, load, evict, desired)


def versions_to_replace(others: Iterable[Entry], limits: Limits, now: float) -> list[Entry]:
    """Return the versions to evict before a version is loaded on demand. The least recently used ones come first.

    At most ``max_on_demand_versions`` may be in memory or being loaded. ``others`` are all that are not resident.

    Raises:
        TooManyVersions: a version that would be replaced is being loaded, or had a request in the last
            ``model_in_use_seconds``.
    """
    busy = sorted(
        (each for each in others if each.state in (State.READY, State.LOADING)), key=lambda each: each.used_at
    )
    surplus = max(0, len(busy) + 1 - limits.max_on_demand_versions)
    replaced = [each for each in busy if each.model][:surplus]
    in_use = [each.used_at + limits.model_in_use_seconds - now for each in replaced]
    if len(replaced) < surplus or any(seconds > 0 for seconds in in_use):
        raise TooManyVersions(
            "this version cannot be loaded now: all versions that it could replace are in use; retry later",
            math.ceil(max([1.0, *in_use])),
        )
    return replaced
