"""Describe the content of the store as rows that can be written as JSON, for the command line and the admin API."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from app.store.card import StoreError, TaskName, VersionNotFound
from app.store.rollout import FILE, LATEST, PINNED, Roles, Rollout
from app.store.store import DEFAULTS, Store


def list_models(store: Store) -> list[dict[str, Any]]:
    """Return one row per model: its task, rollout and versions. ``problem`` names what cannot be read."""
    rows = []
    for name in store.names():
        with suppress(VersionNotFound):
            rows.append(model_row(store, name))
    return rows


def model_row(store: Store, name: str) -> dict[str, Any]:
    """Return the row of one model. Raises VersionNotFound."""
    problems: list[str] = []

    def attempt(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except VersionNotFound:
            raise
        except StoreError as error:
            problems.append(str(error))
            return otherwise

    numbers: list[int] = attempt(lambda: store.find(name), [])
    current: Rollout = attempt(lambda: store.rollout(name), Rollout())
    defaults: dict[TaskName, str] = attempt(store.defaults, {})
    roles = store.roles(name, current) if numbers else Roles(None, None, None)
    task = attempt(partial(_task, store, name, roles.active), None)
    return row(name, numbers, current, roles, task, defaults, [*problems, *current.missing(name, numbers)])


def row(
    name: str,
    numbers: list[int],
    rollout: Rollout,
    roles: Roles,
    task: TaskName | None,
    defaults: Mapping[TaskName, str],
    problems: Iterable[str],
) -> dict[str, Any]:
    """Return the row of a model. ``task`` is that of the active version."""
    return {
        "name": name,
        "task": task,
        "default": task is not None and defaults.get(task) == name,
        "active": roles.active,
        "update_policy": LATEST if rollout.active is None else PINNED,
        "canary": roles.canary.model_dump() if roles.canary else None,
        "previous": roles.previous,
        "retired": rollout.retired,
        "unloaded": rollout.unloaded,
        "versions": numbers,
        "changed": rollout.changed,
        "by": rollout.by,
        "problem": "; ".join(problems),
    }


def _task(store: Store, name: str, active: int | None) -> TaskName | None:
    return None if active is None else store.card(name, active).task


def publication(store: Store, name: str, number: int) -> str:
    """Return ``name@number`` with a clause: whether it is active, what it replaces, and the command that changes that.

    The main figure, the first one on a card, is stated for both versions if both were measured on the same data.
    """
    roles, store_option = store.roles(name), f" --store {shlex.quote(str(store.folder))}"
    is_active = roles.active == number
    clause = f"{name}@{number}, which is {'' if is_active else 'not '}active"
    other = roles.previous if is_active else roles.active
    if other is None:
        return clause
    own, before = (store.card(name, each).metrics for each in (number, other))
    figure, compared = next(iter(own), ""), ""
    if figure in before and own[figure].split == before[figure].split:
        compared = f" ({figure} {own[figure].value:g}, {name}@{other} has {before[figure].value:g})"
    command, argument = ("rollback", "") if is_active else ("activate", f" {number}")
    clause += f" and replaces {name}@{other}" if is_active else f"; {name}@{other} is"
    option = "" if store.folder == Path("models_store") else store_option
    verb = "undo" if is_active else "activate"
    return f"{clause}{compared}\nto {verb} it: quartet models {command} {name}{argument}{option}"


def describe_model(store: Store, name: str) -> dict[str, Any]:
    """Return the row of a model, in which ``versions`` has one row for each version. Raises VersionNotFound."""
    row = model_row(store, name)
    return {**row, "versions": [_version(store, row, number) for number in row["versions"]]}


def _version(store: Store, row: dict[str, Any], number: int) -> dict[str, Any]:
    canary = row["canary"] and row["canary"]["version"]
    roles = {row["previous"]: "previous", canary: "canary", row["active"]: "active"}
    role = "retired" if number in row["retired"] else roles.get(number, "")
    try:
        card = store.card(row["name"], number)
        total_bytes = store.size(row["name"], number)
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


def verify(store: Store) -> Iterator[dict[str, Any]]:
    """Check the default models, rollouts and all files of the versions, and apply the check of the store.

    Yields one row for each of them, and one for each folder that cannot be read. ``problem`` is empty if no problem was
    found.
    """
    yield _check(DEFAULTS, lambda: default_problems(store))
    for name in store.names():
        try:
            numbers = store.numbers(name)
        except StoreError as error:
            yield {"what": name, "problem": str(error)}
            continue
        if numbers:
            yield _check(f"{name}/{FILE}", partial(_rollout_problems, store, name, numbers))
        for number in numbers:
            yield _check(f"{name}@{number}", partial(_version_problems, store, name, number))


def _check(what: str, problems: Callable[[], Iterable[str]]) -> dict[str, Any]:
    try:
        return {"what": what, "problem": "; ".join(problems())}
    except StoreError as error:
        return {"what": what, "problem": str(error)}


def _rollout_problems(store: Store, name: str, numbers: list[int]) -> list[str]:
    return store.rollout(name).missing(name, numbers)


def _version_problems(store: Store, name: str, number: int) -> list[str]:
    store.verify(name, number)
    return []


def default_problems(store: Store) -> Iterator[str]:
    """Yield an error message for each default model that cannot answer, and for each task that could have one."""
    cards = Store(store.folder, disk=store.disk)  # without a check, which would read all weights a second time
    defaults, rows = store.defaults(), {row["name"]: row for row in list_models(cards)}
    for task, name in defaults.items():
        known = rows[name]["task"] if name in rows else None
        if known not in (None, task):
            yield f"{DEFAULTS}: {name!r} is for {known!r}, expected one for {task!r}"
    yield from unserved_defaults(defaults, rows, [name for name, row in rows.items() if row["unloaded"]])
    for task in dict.fromkeys(row["task"] for row in rows.values()):
        fitting = [name for name, row in rows.items() if row["task"] == task and not row["unloaded"]]
        if task not in (*defaults, "infer", None) and fitting:
            names = ", ".join(fitting)
            yield f"{DEFAULTS} names no model for the task {task!r}; `default` chooses one of: {names}"


def unserved_defaults(
    defaults: Mapping[TaskName, str], stored: Collection[str], unloaded: Collection[str]
) -> list[str]:
    """Return an error message for each default model that is not in the store or that is unloaded."""
    names = dict.fromkeys(defaults.values())
    reasons = [f"{DEFAULTS} names {name!r}, which is not in the store" for name in names if name not in stored]
    return reasons + [f"{DEFAULTS} names {name!r}, which is unloaded" for name in names if name in unloaded]
