"""Describe the content of the store as rows that can be written as JSON, for the command line and the admin API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from app import store
from app.store import Check, StoreError, rollout
from app.store.rollout import LATEST, PINNED, Rollout, check_version, first_valid


def list_models(folder: Path, check: Check | None = None) -> list[dict[str, Any]]:
    """Return one row per model: its task, rollout and versions. ``problem`` names what cannot be read.

    ``check`` raises StoreError for a version that the service cannot load. Such a version is not active.
    """
    defaults, problem = _defaults(folder)
    stored, unreadable = _read_folders(folder)
    rows = [_row(folder, name, numbers, defaults, problem, check) for name, numbers in stored.items()]
    rows += [_row(folder, name, [], defaults, reason, check) for name, reason in unreadable.items()]
    return sorted(rows, key=itemgetter("name"))


def model_row(folder: Path, name: str, check: Check | None = None) -> dict[str, Any]:
    """Return the row of one model. Raises VersionNotFound."""
    return _row(folder, name, rollout.numbers(folder, name), *_defaults(folder), check)


def _defaults(folder: Path) -> tuple[dict[store.TaskName, str], str]:
    """Return the default models, and an error message if ``defaults.json`` cannot be read.

    An error is not raised, because callers describe a model after they have changed it.
    """
    try:
        return store.read_defaults(folder), ""
    except StoreError as error:
        return {}, str(error)


def _row(
    folder: Path,
    name: str,
    numbers: list[int],
    defaults: dict[store.TaskName, str],
    problem: str,
    check: Check | None,
) -> dict[str, Any]:
    current = Rollout()
    try:
        current = rollout.read(folder, name)
    except StoreError as error:
        problem = "; ".join(filter(None, (str(error), problem)))
    version = first_valid(folder, name, current.preference(numbers), check)
    active, task = (version.card.version, version.card.task) if version else (None, None)
    previous = [number for number in current.previous_versions(active, numbers) if number in numbers]
    return {
        "name": name,
        "task": task,
        "default": task is not None and defaults.get(task) == name,
        "active": active,
        "update_policy": LATEST if current.active is None else PINNED,
        "canary": current.canary.model_dump() if current.canary else None,
        "previous": previous[0] if previous else None,
        "retired": current.retired,
        "unloaded": current.unloaded,
        "versions": numbers,
        "changed": current.changed,
        "by": current.by,
        "problem": problem,
    }


def describe_model(folder: Path, name: str, check: Check | None = None) -> dict[str, Any]:
    """Return the row of a model, in which ``versions`` has one row for each version. Raises VersionNotFound."""
    row = model_row(folder, name, check)
    return {**row, "versions": [_version(folder, row, number, check) for number in row["versions"]]}


def _version(folder: Path, row: dict[str, Any], number: int, check: Check | None) -> dict[str, Any]:
    name, role = row["name"], ""
    if number in row["retired"]:
        role = "retired"
    elif number == row["active"]:
        role = "active"
    elif row["canary"] and number == row["canary"]["version"]:
        role = "canary"
    elif number == row["previous"]:
        role = "previous"
    try:
        card = check_version(folder, name, number, check).card
        total_bytes = size(folder, name, number)
    except StoreError as error:
        return {"version": number, "role": role, "problem": str(error)}
    return {
        "version": number,
        "role": role,
        "problem": "",
        "bytes": total_bytes,
        "title": card.title,
        "created": card.created,
        "metrics": {key: metric.value for key, metric in card.metrics.items()},
        "notes": card.notes,
    }


def size(folder: Path, name: str, number: int) -> int:
    """Return the total size of a version's files in bytes. Raises StoreError if the size of a file cannot be read."""
    try:
        return sum(path.stat().st_size for path in (folder / name / str(number)).iterdir())
    except OSError as error:
        raise StoreError(f"{name}/{number} cannot be read: {error.strerror}") from error


def verify(folder: Path, check: Check | None = None) -> Iterator[dict[str, Any]]:
    """Check the default models, rollouts and versions in the store. ``check`` is a further check of each version.

    Yields one row for each of them, and one for each folder that cannot be read. ``problem`` is empty if no problem was
    found.
    """
    yield _check("defaults.json", lambda: _check_defaults(folder, check))
    stored, unreadable = _read_folders(folder)
    yield from ({"what": name, "problem": problem} for name, problem in unreadable.items())
    for name, numbers in stored.items():
        yield _check(f"{name}/{rollout.FILE}", lambda name=name: rollout.read(folder, name))
        for number in numbers:
            yield _check(f"{name}@{number}", partial(check_version, folder, name, number, check))


def _read_folders(folder: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the version numbers of each model with versions, and an error message for each unreadable folder."""
    stored, problems = {}, {}
    for name in store.model_names(folder):
        try:
            if numbers := store.version_numbers(folder, name):
                stored[name] = numbers
        except StoreError as error:
            problems[name] = str(error)
    return stored, problems


def _check_defaults(folder: Path, check: Check | None) -> None:
    defaults, (stored, unreadable) = store.read_defaults(folder), _read_folders(folder)
    reasons, unloaded = list[str](), set[str]()
    for task, name in defaults.items():
        with suppress(StoreError):  # the row of the rollout has this problem
            current = rollout.read(folder, name)
            unloaded |= {name} if current.unloaded else set()
            version = first_valid(folder, name, current.preference(stored.get(name, ())), check)
            if version and version.card.task != task:
                reasons.append(f"defaults.json: {name!r} is for {version.card.task!r}, expected one for {task!r}")
    reasons += store.unserved_defaults(defaults, {*stored, *unreadable}, unloaded)
    reasons += _tasks_without_default(folder, defaults, stored)
    if reasons:
        raise StoreError("; ".join(reasons))


def _tasks_without_default(
    folder: Path, defaults: dict[store.TaskName, str], stored: dict[str, list[int]]
) -> Iterator[str]:
    """Yield an error message for each task that has no default model, but a valid model that is not unloaded."""
    names: dict[store.TaskName, list[str]] = {}
    for name, numbers in stored.items():
        with suppress(StoreError):  # the row of the rollout has this problem
            current = rollout.read(folder, name)
            version = None if current.unloaded else first_valid(folder, name, current.preference(numbers))
            if version and version.card.task not in (*defaults, "infer"):
                names.setdefault(version.card.task, []).append(name)
    for task, fitting in names.items():
        yield f"defaults.json names no model for the task {task!r}; `default` chooses one of: {', '.join(fitting)}"


def _check(what: str, read: Any) -> dict[str, Any]:
    try:
        read()
    except StoreError as error:
        return {"what": what, "problem": str(error)}
    return {"what": what, "problem": ""}


COMPARED_KEYS = ("task", "kind", "title", "created", "seed", "command", "commit", "hardware", "minutes", "notes")


def diff(folder: Path, name: str, first: int, second: int) -> list[dict[str, Any]]:
    """Compare two versions. Returns a row for each property, such as a metric, even if both values are equal.

    Raises VersionNotFound, and StoreError for an invalid version.
    """
    versions = [check_version(folder, name, number) for number in (first, second)]
    sides = [_facts(version) | {"bytes": size(folder, name, version.card.version)} for version in versions]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    return [{"what": key, "first": sides[0].get(key), "second": sides[1].get(key)} for key in keys]


def _facts(version: store.Version) -> dict[str, Any]:
    card = version.card
    facts: dict[str, Any] = {f"metrics.{key}": metric.value for key, metric in card.metrics.items()}
    facts |= {f"sizes.{key}": value for key, value in card.sizes.items()}
    facts["parameters"] = sum(tensor.numel() for tensor in version.tensors.values())
    facts |= {f"data.{key}": value for key, value in card.data.items()}
    facts |= {key: getattr(card, key) for key in COMPARED_KEYS}
    facts |= {"labels": card.labels and len(card.labels), "vocabulary": card.vocabulary and len(card.vocabulary)}
    return {key: value for key, value in facts.items() if value is not None}
