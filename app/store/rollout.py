"""Read and change the rollout of a model: its active version, its canary and its retired versions.

The rollout is stored in ``<name>/active.json``. Without this file, the newest valid version is active. The file is
replaced by one rename, so every process sees either the old or the new rollout. It has these keys:

    active      the version that serves requests without a version number; null means the newest valid version that is
                not retired
    previous    the version that was active before; ``rollback`` activates it if there is no canary
    latest      the version that ``activate latest`` made active; once a newer version is active, ``previous`` is not
                used any more
    canary      a version that serves a share of the requests without a version number, in per cent
    retired     versions that are not served any more, even to requests with their number; their files stay
    unloaded    true if no version is served until the model is loaded or a version is activated
    changed     time of the last change
    by          command of the last change

While ``active`` is a number, a newly published version serves only requests with its number, until it is activated. No
function here deletes a version.

``app.serving.version_set`` chooses the version that serves a request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from app import store
from app.store import Check, ModelName, StoreError, StrictModel, VersionNumber
from app.store.atomic_files import folder_lock, replace_file

FILE = store.ROLLOUT
LATEST: Literal["latest"] = "latest"
PINNED: Literal["pinned"] = "pinned"
Share = Annotated[float, Field(gt=0, lt=100)]
_name: TypeAdapter[str] = TypeAdapter(ModelName)


class VersionNotFound(StoreError):
    """The model or the version does not exist."""


class RolloutRefused(StoreError):
    """The model exists, but its current rollout does not allow the change."""


class Canary(StrictModel):
    """A version that serves ``share`` per cent of the requests without a version number."""

    version: VersionNumber
    share: Share


class Rollout(StrictModel):
    """The content of ``active.json``."""

    active: VersionNumber | None = None
    previous: VersionNumber | None = None
    latest: VersionNumber | None = None
    canary: Canary | None = None
    retired: list[VersionNumber] = Field(default_factory=list)
    unloaded: bool = False
    changed: str = ""
    by: str = ""

    def preference(self, numbers: Iterable[int]) -> list[int]:
        """Return the candidates for the active version, best first. The first valid candidate is active."""
        candidates = [number for number in sorted(numbers, reverse=True) if number not in self.retired]
        preferred = [number for number in (self.active, self.previous) if number in candidates] if self.active else []
        return list(dict.fromkeys([*preferred, *candidates]))

    def previous_versions(self, active: int | None, numbers: Iterable[int]) -> list[int]:
        """Return the versions that ``rollback`` may activate, best first.

        If ``active.json`` gives the number of the active version, the result is at most one version, ``previous``.
        This also holds after ``activate latest``, until a newer version is published. Otherwise, the result is all
        versions that are older than ``active`` and not retired.
        """
        if self.active is not None:
            return [] if self.previous is None else [self.previous]
        is_latest = active is not None and self.latest is not None and active <= self.latest
        if is_latest and self.previous is not None and self.previous != active:
            return [self.previous]
        return [number for number in self.preference(numbers) if active is not None and number < active]


def read(models: Path, name: str) -> Rollout:
    """Read the rollout of a model. Without a file, the newest version is active. Raises StoreError for a bad file."""
    try:
        content = (models / name / FILE).read_bytes()
    except FileNotFoundError:
        return Rollout()
    except OSError as error:
        raise StoreError(f"{name}/{FILE} cannot be read: {error.strerror}") from error
    try:
        return Rollout.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise StoreError(f"{name}/{FILE}: {key}: {first['msg']}, found {str(first['input'])[:80]!r}") from error


def stored_versions(models: Path) -> dict[str, list[int]]:
    """Return the sorted version numbers of each model in the store. The versions may be invalid.

    Unreadable folders are skipped.
    """
    versions: dict[str, list[int]] = {}
    for name, number in store.all_versions(models):
        versions.setdefault(name, []).append(number)
    return versions


def name_problem(name: str) -> str | None:
    """Return the error message for the name of a model that is not allowed, or None for an allowed name."""
    try:
        _name.validate_python(name)
    except ValidationError:
        return (
            f"{shorten(name)} is not a model name; a name has 1 to 64 lower-case letters, digits and hyphens, does not "
            "begin with a hyphen, and is not reserved"
        )
    return None


def numbers(models: Path, name: str) -> list[int]:
    """Return the sorted version numbers of a model. The versions may be invalid.

    Raises VersionNotFound if there is no such model, or if the name is not allowed, and StoreError for an unreadable
    folder.
    """
    if problem := name_problem(name):
        raise VersionNotFound(problem)
    found = store.version_numbers(models, name)
    if not found:
        names = ", ".join(stored_versions(models)) or "none"
        raise VersionNotFound(f"there is no model {name!r} in the store; models in the store: {names}")
    return found


def servable(models: Path, name: str) -> list[int]:
    """Return the version numbers of a model that are not retired, in the order of ``preference``.

    Raises VersionNotFound, and StoreError for an unreadable rollout.
    """
    known = numbers(models, name)  # checks the name before it becomes a path
    return read(models, name).preference(known)


def shorten(value: object) -> str:
    """Return a value for an error message: quoted, and cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _no_version(name: str, version: int, known: Iterable[int]) -> VersionNotFound:
    return VersionNotFound(
        f"there is no {name}@{version} in the store; versions in the store: {', '.join(map(str, known))}"
    )


def check_version(models: Path, name: str, version: int, check: Check | None = None) -> store.Version:
    """Read and verify a version and its network. ``check`` is a further check, which raises StoreError.

    Raises VersionNotFound, and StoreError for an invalid version.
    """
    known = numbers(models, name)
    if version not in known:
        raise _no_version(name, version, known)
    checked = store.read_version(models, name, version)
    checked.network()
    if check:
        check(checked)
    return checked


def first_valid(models: Path, name: str, candidates: Iterable[int], check: Check | None = None) -> store.Version | None:
    """Return the first of the candidates that passes ``check_version``, or None."""
    for number in candidates:
        with suppress(StoreError):
            return check_version(models, name, number, check)
    return None


def active_or_none(models: Path, name: str, rollout: Rollout, check: Check | None = None) -> int | None:
    """Return the active version, or None if no version is valid."""
    version = first_valid(models, name, rollout.preference(numbers(models, name)), check)
    return None if version is None else version.card.version


def active_version(models: Path, name: str, check: Check | None = None) -> int:
    """Return the active version of a model. Raises VersionNotFound, and RolloutRefused if no version is active."""
    numbers(models, name)  # checks the name before it becomes a path
    active = active_or_none(models, name, read(models, name), check)
    if active is None:
        raise RolloutRefused(f"no version of {name} is active; state a version, such as {name}@1")
    return active


def activate(
    models: Path, name: str, version: int | Literal["latest"], share: float = 100, check: Check | None = None
) -> Rollout:
    """Make a version the active version, or make it the canary if ``share`` (in per cent) is below 100.

    If ``version`` is "latest", the newest version becomes active. Each version that is published later also becomes
    active. ``check`` raises StoreError for a version that the service cannot load.

    Raises:
        VersionNotFound: the model or the version does not exist.
        RolloutRefused: the version is retired or for another task than the other versions, the share is out of range,
            or the requested canary is "latest" or the active version.
        StoreError: the version is invalid.
    """
    if not 0 < share <= 100:
        raise RolloutRefused(f"the share is {share:g}; it should be more than 0 and at most 100 per cent")
    if version == LATEST:
        if share < 100:
            raise RolloutRefused("the newest version cannot be a canary; use a version number")
        return _change(models, name, "activate latest", lambda old: _with_latest(models, name, old, check))
    command = f"activate {version}" + (f" --share {share:g}" if share < 100 else "")
    return _change(models, name, command, lambda old: _activated(models, name, old, version, share, check))


def _with_latest(models: Path, name: str, old: Rollout, check: Check | None) -> Rollout:
    candidates = Rollout(retired=old.retired).preference(numbers(models, name))
    newest = first_valid(models, name, candidates, check)
    _refuse_other_task(models, newest, old.retired)
    latest = newest.card.version if newest else None
    now = active_or_none(models, name, old, check)
    return Rollout(previous=_previous(models, name, old, now, latest, check), latest=latest, retired=old.retired)


def _previous(
    models: Path, name: str, old: Rollout, now: int | None, active: int | None, check: Check | None
) -> int | None:
    """Return the previous version after ``active`` has replaced ``now``, which may be the same version."""
    if now != active:
        return now
    # if ``old.active`` is damaged, ``now`` may be ``old.previous``
    others = [number for number in old.previous_versions(now, numbers(models, name)) if number != now]
    valid = first_valid(models, name, others, check)
    # without a valid version, keep the number, because the version may be repaired
    return valid.card.version if valid else next(iter(others), None)


def _refuse_other_task(models: Path, version: store.Version | None, retired: list[int]) -> None:
    """Raise RolloutRefused if other valid versions, except those in ``retired``, have another task than ``version``."""
    if version is None:
        return
    card = version.card
    if problem := store.task_problem(models, card.name, card.version, card.task, retired):
        raise RolloutRefused(problem)


def _activated(models: Path, name: str, old: Rollout, version: int, share: float, check: Check | None) -> Rollout:
    checked = check_version(models, name, version, check)
    if version in old.retired:
        raise RolloutRefused(f"{name}@{version} is retired; `retire` with `undo` restores it")
    _refuse_other_task(models, checked, old.retired)
    now = active_or_none(models, name, old, check)
    if now == version and share < 100:
        raise RolloutRefused(f"{name}@{version} is already active; a canary must be another version")
    active = version if share == 100 else now
    previous = _previous(models, name, old, now, active, check)
    canary = Canary(version=version, share=share) if share < 100 else None
    return Rollout(active=active, previous=previous, canary=canary, retired=old.retired)


def rollback(models: Path, name: str, check: Check | None = None) -> Rollout:
    """End the canary if there is one. Otherwise, activate the previous version.

    If no version was activated, or if a newer version was published after ``activate latest``, the previous version is
    the newest valid version that is older than the active version.
    After a rollback to the previous version, a second rollback undoes the first. Raises VersionNotFound, and
    RolloutRefused if there is no valid previous version.
    """
    return _change(models, name, "rollback", lambda old: _rolled_back(models, name, old, check))


def _rolled_back(models: Path, name: str, old: Rollout, check: Check | None) -> Rollout:
    if old.canary is not None:
        return old.model_copy(update={"canary": None})
    now = active_or_none(models, name, old, check)
    candidates = old.previous_versions(now, numbers(models, name))
    target = first_valid(models, name, candidates, check)
    if target is None:
        reason = f"; {name}@{candidates[0]} is invalid" if candidates else ""
        raise RolloutRefused(f"{name} has no previous version{reason}; activate one by its number")
    return Rollout(active=target.card.version, previous=old.active or now, retired=old.retired, unloaded=old.unloaded)


def retire(models: Path, name: str, version: int, undo: bool = False, check: Check | None = None) -> Rollout:
    """Stop serving a version, even to requests with its number. Its files stay, and ``undo`` serves it again.

    Raises VersionNotFound. Raises RolloutRefused for the active version, for the canary, and if ``undo`` is true and
    the version is not retired or is for another task than the other versions.
    """
    command = f"retire {version}" + (" --undo" if undo else "")
    return _change(models, name, command, lambda old: _retired(models, name, old, version, undo, check))


def _retired(models: Path, name: str, old: Rollout, version: int, undo: bool, check: Check | None) -> Rollout:
    known = numbers(models, name)
    if version not in known:
        raise _no_version(name, version, known)
    if undo:
        if version not in old.retired:
            raise RolloutRefused(f"{name}@{version} is not retired")
        remaining = [number for number in old.retired if number != version]
        _refuse_other_task(models, first_valid(models, name, [version]), remaining)
        return old.model_copy(update={"retired": remaining})
    if version == old.active or version == active_or_none(models, name, old, check):
        raise RolloutRefused(f"{name}@{version} is the active version; activate another one first")
    if old.canary and version == old.canary.version:
        raise RolloutRefused(f"{name}@{version} is the canary; `rollback` ends it")
    previous = None if old.previous == version else old.previous
    return old.model_copy(update={"previous": previous, "retired": sorted({*old.retired, version})})


def unload(models: Path, name: str) -> Rollout:
    """Stop serving all versions of a model until it is loaded again. The rest of the rollout stays.

    Raises VersionNotFound, and RolloutRefused for the default model of a task.
    """
    return _change(models, name, "unload", lambda old: _unloaded(models, name, old))


def _unloaded(models: Path, name: str, old: Rollout) -> Rollout:
    for task, known in store.read_defaults(models).items():
        if known == name:
            raise RolloutRefused(f"{name} is the default for the task {task!r}; make another model the default first")
    return old.model_copy(update={"unloaded": True})


def load(models: Path, name: str) -> Rollout:
    """Serve an unloaded model again. If the model is not unloaded, nothing is changed.

    Raises VersionNotFound, and StoreError for an unreadable rollout.
    """
    numbers(models, name)  # checks the name before it becomes a path
    present = read(models, name)
    if not present.unloaded:
        return present
    return _change(models, name, "load", lambda old: old.model_copy(update={"unloaded": False}))


def make_default(models: Path, name: str, check: Check | None = None) -> None:
    """Make a model the default model of its task. The rollout does not change.

    Raises:
        VersionNotFound: the model does not exist.
        RolloutRefused: the model is unloaded, no version is valid, or the task ``infer`` has no default.
        StoreError: the rollout or ``defaults.json`` is unreadable.
    """
    numbers(models, name)  # checks the name before it becomes a path
    with folder_lock(models / name):  # so that the model is not unloaded at the same time
        current = read(models, name)
        if current.unloaded:
            raise RolloutRefused(f"{name} is unloaded; `load` serves it again")
        version = first_valid(models, name, current.preference(numbers(models, name)), check)
        if version is None:
            raise RolloutRefused(f"{name} has no valid version; `verify` prints the reasons")
        if version.card.task == "infer":
            raise RolloutRefused(f"{name} is for the task 'infer', which has no default model")
        store.set_default(models, version.card.task, name)


def _change(models: Path, name: str, command: str, choose: Callable[[Rollout], Rollout]) -> Rollout:
    """Replace a rollout by ``choose(rollout)``, under a lock and with one rename."""
    numbers(models, name)  # checks the name before it becomes a path
    with folder_lock(models / name):
        changed = choose(read(models, name)).model_copy(
            update={"changed": datetime.now(UTC).isoformat(timespec="seconds"), "by": command}
        )
        replace_file(models / name / FILE, json.dumps(changed.model_dump(), indent=2) + "\n")
    return changed
