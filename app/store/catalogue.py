"""Describe the content of the store as rows that can be written as JSON, for the command line and the admin API."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from app.store.card import StoreError, is_worse, main_figures
from app.store.rollout import FILE, LATEST, PINNED
from app.store.snapshot import Snapshot
from app.store.store import DEFAULTS, Store


def list_models(store: Store, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return one row for each of these models, by default for all. Raises VersionNotFound.

    A row has the task, the rollout and the versions of a model. ``problem`` names what cannot be read.
    """
    for name in names:
        store.find(name)
    snapshot = Snapshot.read(store)
    return [row(snapshot, name) for name in names or snapshot.versions]


def row(snapshot: Snapshot, name: str, damaged: Collection[tuple[str, int]] = ()) -> dict[str, Any]:
    """Return the row of a model. ``damaged`` are versions that have readable cards, but cannot be loaded."""
    rollout, (roles, card) = snapshot.rollouts[name], snapshot.roles(name, damaged)
    problems = (snapshot.problems.get(place) for place in (name, f"{name}/{FILE}", DEFAULTS))
    return {
        "name": name,
        "state": rollout.state(name, roles),
        "task": card.task if card else None,
        "default": card is not None and snapshot.defaults.get(card.task) == name,
        "active": roles.active,
        "update_policy": LATEST if rollout.active is None else PINNED,
        "canary": roles.canary.model_dump() if roles.canary else None,
        "shadow": roles.shadow.model_dump() if roles.shadow else None,
        "previous": roles.previous,
        "retired": rollout.retired,
        "unloaded": rollout.unloaded,
        "versions": list(snapshot.versions[name]),
        "changed": rollout.changed,
        "by": rollout.by,
        "problem": "; ".join(filter(None, problems)),
    }


def publication(store: Store, name: str, number: int) -> str:
    """Return ``name@number`` with a clause: whether it is active, what it replaces, and the command that changes that.

    The main figure, the first one on a card, is stated for both versions if both were measured on the same data. A
    second sentence says if the version is worse.
    """
    roles, store_option = store.roles(name), f" --store {shlex.quote(str(store.folder))}"
    is_active = roles.active == number
    clause = f"{name}@{number}, which is {'' if is_active else 'not '}active"
    other = roles.previous if is_active else roles.active
    if other is None:
        return clause
    card, before = (store.card(name, each) for each in (number, other))
    figures = main_figures(card, before)
    compared = f" ({figures[0]} {figures[1].value:g}, {name}@{other} has {figures[2].value:g})" if figures else ""
    command, argument = ("rollback", "") if is_active else ("activate", f" {number}")
    clause += f" and replaces {name}@{other}" if is_active else f"; {name}@{other} is"
    option = "" if store.folder == Path("models_store") else store_option
    verb = "undo" if is_active else "activate"
    worse = f"\n{name}@{number} is worse than {name}@{other} by more than its uncertainty"
    compared += worse if is_worse(card, before) else ""
    return f"{clause}{compared}\nto {verb} it: quartet models {command} {name}{argument}{option}"


def describe_model(store: Store, name: str) -> dict[str, Any]:
    """Return the row of a model, in which ``versions`` has one row for each version. Raises VersionNotFound."""
    store.find(name)
    snapshot = Snapshot.read(store)
    model = row(snapshot, name)
    roles = {model["previous"]: "previous"}
    roles |= {model[role]["version"]: role for role in ("shadow", "canary") if model[role]}
    roles |= {model["active"]: "active"}
    roles |= dict.fromkeys(model["retired"], "retired")
    versions = []
    for number, stored in snapshot.versions[name].items():
        version = {"version": number, "role": roles.get(number, ""), "problem": stored.problem}
        if card := stored.card:
            version |= {
                "bytes": store.size(name, number),
                "title": card.title,
                "created": card.created,
                "metrics": {key: metric.value for key, metric in card.metrics.items()},
                "notes": card.notes,
            }
        versions.append(version)
    return {**model, "versions": versions}


def verify(store: Store) -> Iterator[dict[str, Any]]:
    """Check the default models, rollouts and all files of the versions, and apply the check of the store.

    Yields one row for each of them, and one for each folder that cannot be read. ``problem`` is empty if no problem was
    found.
    """
    snapshot = Snapshot.read(store)
    defaults = snapshot.problems.get(DEFAULTS) or "; ".join(default_problems(snapshot))
    yield {"what": DEFAULTS, "problem": defaults}
    for name, versions in snapshot.versions.items():
        if name in snapshot.problems:
            yield {"what": name, "problem": snapshot.problems[name]}
            continue
        yield {"what": f"{name}/{FILE}", "problem": snapshot.problems.get(f"{name}/{FILE}", "")}
        for number in versions:
            problem = ""
            try:
                store.verify(name, number)
            except StoreError as error:
                problem = str(error)
            yield {"what": f"{name}@{number}", "problem": problem}


def default_problems(snapshot: Snapshot) -> list[str]:
    """Return an error message for each default model that cannot answer, and for each task that could have one."""
    cards = {name: snapshot.roles(name)[1] for name in snapshot.versions}
    tasks = {name: card.task for name, card in cards.items() if card}
    problems = snapshot.default_problems(tasks)
    for task in dict.fromkeys(tasks.values()):
        fitting = [name for name in tasks if tasks[name] == task and not snapshot.rollouts[name].unloaded]
        if task not in (*snapshot.defaults, "infer") and fitting:
            names = ", ".join(fitting)
            problems.append(f"{DEFAULTS} names no model for the task {task!r}; `default` chooses one of: {names}")
    return problems
