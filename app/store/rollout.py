"""Which version of a name serves: the newest whole one, until somebody chooses.

A choice is one small file, ``<name>/active.json``, replaced by one rename, so that every process sees the old choice or
the new one:

    active      the version that serves when the caller names none; null: the newest whole one that is not retired
    previous    the one that served before it, for ``rollback``
    canary      a version that is tried on a share of the requests, in per cent
    retired     versions that are no longer served, not even by their number; their files stay
    unloaded    none of its versions is served or in memory until it is loaded or a version activated
    changed by  when, and by what

While ``active`` is a number, what is published waits: it is served by its number, and to nobody else until somebody
activates it. Nothing here removes a version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from app import store
from app.store import ModelName, StoreError, StrictModel, VersionNumber
from app.store.files import file_lock, replace_file

FILE = "active.json"
NEWEST: Literal["newest"] = "newest"
Share = Annotated[float, Field(gt=0, lt=100)]
_name: TypeAdapter[str] = TypeAdapter(ModelName)


class VersionNotFound(StoreError):
    """There is no such name or version."""


class RolloutRefused(StoreError):
    """It is there, but what was asked for does not fit to what is served."""


class Canary(StrictModel):
    """A version that gets ``share`` per cent of the requests that name no version."""

    version: VersionNumber
    share: Share


class Rollout(StrictModel):
    """What was chosen for a name."""

    active: VersionNumber | None = None
    previous: VersionNumber | None = None
    canary: Canary | None = None
    retired: list[VersionNumber] = Field(default_factory=list)
    unloaded: bool = False
    changed: str = ""
    by: str = ""

    def preference(self, numbers: Iterable[int]) -> list[int]:
        """The versions that may serve when the caller names none: the first whole one of them does."""
        left = [number for number in sorted(numbers, reverse=True) if number not in self.retired]
        chosen = [number for number in (self.active, self.previous) if number in left] if self.active else []
        return list(dict.fromkeys([*chosen, *left]))

    def previous_versions(self, active: int | None, numbers: Iterable[int]) -> list[int]:
        """The versions that ``rollback`` may go to, best first: the previous one, or else those below the newest."""
        if self.active is not None:
            return [] if self.previous is None else [self.previous]
        return [number for number in self.preference(numbers) if active is not None and number < active]


def read(models: Path, name: str) -> Rollout:
    """What was chosen for a name; where nothing was, the newest serves. Raises StoreError for a file that is broken."""
    try:
        content = (models / name / FILE).read_bytes()
    except FileNotFoundError:
        return Rollout()
    except OSError as error:
        raise StoreError(f"{name}/{FILE} cannot be read: {error.strerror}") from error
    try:
        return Rollout.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise StoreError(f"{name}/{FILE}: {key}: {first['msg']}, found {str(first['input'])[:80]!r}") from error


def stored_versions(models: Path) -> dict[str, list[int]]:
    """All names and their versions, in order, whole or not."""
    found: dict[str, list[int]] = {}
    for name, number in store.all_versions(models):
        found.setdefault(name, []).append(number)
    return found


def numbers(models: Path, name: str) -> list[int]:
    """The versions of a name, in order, whole or not. Raises Missing, also for what cannot be a name."""
    try:
        _name.validate_python(name)
    except ValidationError:
        raise VersionNotFound(f"{shorten(name)} cannot be a model's name: small letters, digits and hyphens") from None
    found = stored_versions(models)
    if name not in found:
        raise VersionNotFound(f"there is no model {name!r} in the store; there are: {', '.join(found) or 'none'}")
    return found[name]


def shorten(value: object) -> str:
    """A value as it may stand in a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def check_version(models: Path, name: str, version: int) -> store.Version:
    """A version that is there and whole. Raises Missing, and StoreError with what is wrong."""
    known = numbers(models, name)
    if version not in known:
        raise VersionNotFound(f"there is no {name}@{version} in the store; there are: {', '.join(map(str, known))}")
    found = store.read_version(models, name, version)
    found.network()
    return found


def is_whole(models: Path, name: str, version: int) -> bool:
    """Whether a version could be served."""
    try:
        check_version(models, name, version)
    except StoreError:
        return False
    return True


def serving(models: Path, name: str, rollout: Rollout) -> int | None:
    """The version that serves when the caller names none; None when no version is whole."""
    return next((one for one in rollout.preference(numbers(models, name)) if is_whole(models, name, one)), None)


def activate(models: Path, name: str, version: int | Literal["newest"], share: float = 100) -> Rollout:
    """Have a version serve all requests that name none, or with a smaller ``share`` so many per cent of them.

    "newest" follows the newest version again. Raises Missing, Refused for a retired version or a share that is none,
    and StoreError for a version that is not whole.
    """
    if not 0 < share <= 100:
        raise RolloutRefused(f"the share is {share:g}; it should be more than 0 and at most 100 per cent")
    if version == NEWEST:
        if share < 100:
            raise RolloutRefused("the newest version cannot be a canary; name one by its number")
        return _change(models, name, "activate newest", lambda old: Rollout(retired=old.retired))
    command = f"activate {version}" + (f" --share {share:g}" if share < 100 else "")
    return _change(models, name, command, lambda old: _activated(models, name, old, version, share))


def _activated(models: Path, name: str, old: Rollout, version: int, share: float) -> Rollout:
    check_version(models, name, version)
    if version in old.retired:
        raise RolloutRefused(f"{name}@{version} is retired; `retire --undo` brings it back")
    now = serving(models, name, old)
    previous = next(iter(old.previous_versions(now, numbers(models, name))), None)
    if share == 100:
        return Rollout(active=version, previous=previous if now == version else now, retired=old.retired)
    if now == version:
        raise RolloutRefused(f"{name}@{version} serves already; a canary is another version than the active one")
    return Rollout(active=now, previous=previous, canary=Canary(version=version, share=share), retired=old.retired)


def rollback(models: Path, name: str) -> Rollout:
    """Undo the last choice: end a canary if there is one, or else have the previous version serve again.

    Where the newest serves, that is the newest whole one before it. Twice is back where it was. Raises Missing, and
    Refused when there is nothing to go back to.
    """
    return _change(models, name, "rollback", lambda old: _rolled_back(models, name, old))


def _rolled_back(models: Path, name: str, old: Rollout) -> Rollout:
    if old.canary is not None:
        return old.model_copy(update={"canary": None})
    now = serving(models, name, old)
    candidates = old.previous_versions(now, numbers(models, name))
    target = next((one for one in candidates if is_whole(models, name, one)), None)
    if target is None:
        why = f"; {name}@{candidates[0]} is not whole" if candidates else ""
        raise RolloutRefused(f"{name} has no previous version to go back to{why}; activate one by its number")
    return Rollout(active=target, previous=old.active or now, retired=old.retired, unloaded=old.unloaded)


def retire(models: Path, name: str, version: int, undo: bool = False) -> Rollout:
    """Serve a version no longer, not even by its number; its files stay, and ``undo`` brings it back.

    Raises Missing, and Refused for a version that serves.
    """
    command = f"retire {version}" + (" --undo" if undo else "")
    return _change(models, name, command, lambda old: _retired(models, name, old, version, undo))


def _retired(models: Path, name: str, old: Rollout, version: int, undo: bool) -> Rollout:
    known = numbers(models, name)
    if version not in known:
        raise VersionNotFound(f"there is no {name}@{version} in the store; there are: {', '.join(map(str, known))}")
    if undo:
        if version not in old.retired:
            raise RolloutRefused(f"{name}@{version} is not retired")
        return old.model_copy(update={"retired": [one for one in old.retired if one != version]})
    if version == old.active or version == serving(models, name, old):
        raise RolloutRefused(f"{name}@{version} is the active version; activate another one first")
    if old.canary and version == old.canary.version:
        raise RolloutRefused(f"{name}@{version} is the canary; `rollback` ends it")
    kept = None if old.previous == version else old.previous
    return old.model_copy(update={"previous": kept, "retired": sorted({*old.retired, version})})


def unload(models: Path, name: str) -> Rollout:
    """Serve a model no longer, none of its versions, until it is loaded again; what was chosen for it stays.

    Raises Missing, and Refused for one that serves a task by default.
    """
    return _change(models, name, "unload", lambda old: _unloaded(models, name, old))


def _unloaded(models: Path, name: str, old: Rollout) -> Rollout:
    for task, known in store.read_defaults(models).items():
        if known == name:
            raise RolloutRefused(
                f"{name} is the default for the task {task!r}; it stays until defaults.json names another"
            )
    return old.model_copy(update={"unloaded": True})


def load(models: Path, name: str) -> Rollout:
    """Serve a model again that was unloaded. One that is not is left as it is, also where nothing can be written.

    Raises Missing, and StoreError for a choice that cannot be read.
    """
    numbers(models, name)  # before a name becomes a path
    found = read(models, name)
    if not found.unloaded:
        return found
    return _change(models, name, "load", lambda old: old.model_copy(update={"unloaded": False}))


def _change(models: Path, name: str, command: str, choose: Callable[[Rollout], Rollout]) -> Rollout:
    """Write another choice: one at a time, by one rename."""
    numbers(models, name)  # before a name becomes a path
    with file_lock(models / name):
        chosen = choose(read(models, name)).model_copy(
            update={"changed": datetime.now(UTC).isoformat(timespec="seconds"), "by": command}
        )
        replace_file(models / name / FILE, json.dumps(chosen.model_dump(), indent=2) + "\n")
    return chosen


def resident_versions(found: Sequence[int], rollout: Rollout, broken: Iterable[int] = ()) -> list[int]:
    """The versions that stay in memory: what serves, the canary, and where ``rollback`` leads to, in this order."""
    if rollout.unloaded:
        return []
    left = [number for number in found if number not in rollout.retired and number not in broken]
    serves = rollout.preference(left)[:1]
    canary = [rollout.canary.version] if rollout.canary and rollout.canary.version in left else []
    previous = [one for one in rollout.previous_versions(serves[0], left) if one in left][:1] if serves else []
    return list(dict.fromkeys([*serves, *canary, *previous]))


def worker_bytes(models: Path, most: int = 0) -> int:
    """About how much memory a process takes that serves a store, besides what it shares with others.

    The weights that it keeps, twice where they are prepared for computing, at most ``most`` of them unless that is 0;
    and what torch takes once it computes (measured: 100 MiB).
    """
    weights = 0
    for name, found in stored_versions(models).items():
        try:
            chosen = read(models, name)
        except StoreError:
            chosen = Rollout()
        weights += sum(store.weights_size(models, name, number) for number in resident_versions(found, chosen))
    return 100 * 2**20 + 2 * (min(weights, most) if most else weights)
