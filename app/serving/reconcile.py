"""The desired versions of each model, and what to load, publish and evict to reach them. All functions are pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

from app.engine.observer import VersionKey
from app.errors import TooManyVersions
from app.serving.loader import LoadedModel
from app.serving.store_snapshot import StoreSnapshot
from app.serving.version_choice import VersionSet
from app.store import Card, TaskName

IDLE_SECONDS = 300.0  # seconds without a request after which a version is evicted that is not resident

IN_USE_SECONDS = 10.0  # seconds after a request in which other requests cannot evict its version

VersionSets = Mapping[str, VersionSet]  # by model name


def desired_versions(snapshot: StoreSnapshot, failed: Collection[VersionKey]) -> dict[str, VersionSet]:
    """Return the version set of each model in the store, without versions that ``failed`` to load."""
    failed_numbers: dict[str, set[int]] = {}
    for name, number in failed:
        failed_numbers.setdefault(name, set()).add(number)
    return {
        name: VersionSet.build(
            name,
            [number for number in numbers if (name, number) in snapshot.cards],
            snapshot.rollouts[name],
            failed_numbers.get(name, ()),
        )
        for name, numbers in snapshot.numbers.items()
    }


def versions_to_load(
    desired: VersionSets,
    published: VersionSets,
    loaded: Mapping[VersionKey, int],
    defaults: Collection[str],
    max_bytes: int,
    weights_bytes: Mapping[VersionKey, int],
) -> list[VersionKey]:
    """Return the resident versions to load without a request, most important first.

    The first resident version of each model comes before all others, and ``defaults`` (names of models) come before
    other models. ``loaded`` maps the versions in memory to their bytes.

    If the memory limit ``max_bytes`` is not 0, a version is loaded only if it is the active one of a default model,
    replaces an active version in memory, or fits beside the versions in memory. ``weights_bytes`` are the sizes of the
    versions in the store.
    """
    used_bytes = sum(loaded.values())

    def is_due(name: str, number: int) -> bool:
        if (name, number) in loaded:
            return False
        if not max_bytes:
            return True
        if number == desired[name].active:
            current = published.get(name)
            if name in defaults or (current and current.active and (name, current.active) in loaded):
                return True
        return used_bytes + weights_bytes[name, number] <= max_bytes

    names = sorted(desired, key=lambda name: (name not in defaults, name))
    residents = {name: desired[name].resident for name in names}
    ordered = [(name, number) for name in names for number in residents[name][:1]]
    ordered += [(name, number) for name in names for number in residents[name][1:]]
    return [key for key in ordered if is_due(*key)]


def sets_to_publish(
    desired: VersionSets, published: VersionSets, pending: Collection[VersionKey]
) -> Iterable[VersionSet]:
    """Return the version sets that can be served now: those whose active and canary version are not ``pending``.

    ``pending`` are the versions still to be loaded. A model that was unloaded before is published at once, because no
    version of it serves meanwhile.
    """
    for name, version_set in desired.items():
        current = published.get(name)
        is_pending = any((name, number) in pending for number in (version_set.active, version_set.canary) if number)
        if not is_pending or (current and current.unloaded):
            yield version_set


def versions_to_evict(
    models: Iterable[LoadedModel], published: VersionSets, now: float
) -> Iterable[tuple[LoadedModel, str]]:
    """Return the versions in memory to evict, each with the reason.

    A version is evicted when it is not served any more, or when it is not resident and has had no request for
    ``IDLE_SECONDS``. ``now`` is on ``time.monotonic``'s clock.
    """
    for model in models:
        version_set = published.get(model.card.name)
        if version_set is None or model.card.version not in version_set.numbers:
            yield model, "it is not served any more"
        elif model.card.version not in version_set.resident and now - model.last_used_at > IDLE_SECONDS:
            yield model, f"no request for {IDLE_SECONDS:g} s"


def versions_to_replace(
    others: Iterable[LoadedModel],
    surplus: int,
    surplus_bytes: int,
    is_resident: Callable[[VersionKey], bool],
    now: float,
) -> list[LoadedModel]:
    """Return the versions in memory to evict, so that a request may load one by name; least recently used first.

    Of ``others``, the versions that may be evicted, at least ``surplus`` that are not resident and ``surplus_bytes``
    bytes must go. ``now`` is on ``time.monotonic``'s clock.

    Raises:
        TooManyVersions: one of them is in use, or there are not enough.
    """
    models = sorted(others, key=lambda model: model.last_used_at)
    on_demand = [model for model in models if not is_resident((model.card.name, model.card.version))]
    replaced = on_demand[: max(surplus, 0)]
    for model in models:
        if sum(other.bytes for other in replaced) >= surplus_bytes:
            break
        if model not in replaced:
            replaced.append(model)
    in_use = [IN_USE_SECONDS - (now - model.last_used_at) for model in replaced]
    if len(replaced) < surplus or any(seconds > 0 for seconds in in_use):
        raise TooManyVersions(
            "no more versions can be loaded by name now: as many as allowed are in use",
            math.ceil(max([1.0, *in_use])),
        )
    return replaced


def check_defaults(
    defaults: Mapping[TaskName, str], card: Callable[[str], Card | None]
) -> tuple[dict[TaskName, str], list[str]]:
    """Return the defaults without models of another task, and the reasons for those left out.

    ``card`` returns the card of a model's active version.
    """
    valid, reasons = dict(defaults), []
    for task, name in defaults.items():
        model_card = card(name)
        if model_card and model_card.task != task:
            del valid[task]
            reasons.append(f"defaults.json: {name!r} is for {model_card.task!r}, expected one for {task!r}")
    return valid, reasons
