"""Determine which versions of each model should be served.

To serve these versions, `Models` loads, publishes and evicts versions. This module chooses the versions for each of
these three actions.

To publish a version set means to use it for requests. A resident version stays in memory even without requests. The
active version, the canary, and the version that ``active.json`` names as ``previous`` are resident. All functions here
are pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

from app.engine.observer import VersionKey
from app.errors import TooManyVersions
from app.serving.model import Model
from app.serving.store_snapshot import StoreSnapshot
from app.serving.version_set import VersionSet
from app.store import Card, TaskName
from app.store.catalogue import unserved_defaults

IDLE_SECONDS = 300.0  # a version that is not resident is evicted after this many seconds without a request

IN_USE_SECONDS = 10.0  # for this many seconds after a request, other requests cannot evict its version

VersionSets = Mapping[str, VersionSet]  # by model name


def desired_versions(snapshot: StoreSnapshot, failed: Collection[VersionKey]) -> dict[str, VersionSet]:
    """Return the desired version set of each model in the store.

    The sets do not contain the versions in ``failed``, which could not be loaded.
    """
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
    served: VersionSets,
    loaded: Mapping[VersionKey, int],
    defaults: Collection[str],
    max_bytes: int,
    weights_bytes: Mapping[VersionKey, int],
    loading: Collection[VersionKey] = (),
) -> list[VersionKey]:
    """Return the resident versions that are not in memory and should be loaded now, most important first.

    The list begins with the most important resident version of each model. The other resident versions follow. In both
    parts, the models in ``defaults`` (names) come first. ``loaded`` maps each version in memory to its size in bytes.

    If the memory limit ``max_bytes`` is not 0, a version is loaded in only three cases: it is the active version of a
    default model, it replaces an active version in memory, or it fits beside the versions that are in memory or being
    loaded. ``weights_bytes`` maps each version in the store to its size. ``loading`` are the versions being loaded. If
    such a version should be loaded, it is returned too.
    """
    used_bytes = sum(loaded.values())

    def is_due(name: str, number: int) -> bool:
        if (name, number) in loaded:
            return False
        if not max_bytes:
            return True
        if number == desired[name].active:
            current = served.get(name)
            if name in defaults or (current and current.active and (name, current.active) in loaded):
                return True
        others = [key for key in loading if key != (name, number)]
        coming_bytes = sum(weights_bytes[key] for key in others if key in weights_bytes)  # files may have been removed
        return used_bytes + coming_bytes + weights_bytes[name, number] <= max_bytes

    names = sorted(desired, key=lambda name: (name not in defaults, name))
    residents = {name: desired[name].resident for name in names}
    ordered = [(name, number) for name in names for number in residents[name][:1]]
    ordered += [(name, number) for name in names for number in residents[name][1:]]
    return [key for key in ordered if is_due(*key)]


def sets_to_serve(desired: VersionSets, served: VersionSets, pending: Collection[VersionKey]) -> Iterable[VersionSet]:
    """Yield the version sets that can serve requests now.

    The active version and the canary of such a set are not ``pending``, which means that they do not wait to be loaded.
    An unloaded model answers no requests now. Its new set is yielded even if a version in the set is pending.
    """
    for name, version_set in desired.items():
        current = served.get(name)
        is_pending = any((name, number) in pending for number in (version_set.active, version_set.canary) if number)
        if not is_pending or (current and current.unloaded):
            yield version_set


def versions_to_evict(models: Iterable[Model], served: VersionSets, now: float) -> Iterable[tuple[Model, str]]:
    """Yield the versions that should be evicted from memory, each with the reason.

    A version is evicted when it is not served any more, or when it is not resident and has had no request for
    ``IDLE_SECONDS``. ``now`` is the current time on ``time.monotonic``'s clock.
    """
    for model in models:
        version_set = served.get(model.card.name)
        if version_set is None or model.card.version not in version_set.numbers:
            yield model, "it is not served any more"
        elif model.card.version not in version_set.resident and now - model.last_used_at > IDLE_SECONDS:
            yield model, f"no request for {IDLE_SECONDS:g} s"


def versions_to_replace(
    others: Iterable[Model],
    surplus: int,
    surplus_bytes: int,
    is_resident: Callable[[VersionKey], bool],
    now: float,
    loading: Collection[VersionKey] = (),
) -> list[Model]:
    """Return the versions to evict from memory, to make room for a version that a request asks for.

    ``others`` are the versions that may be evicted. First, ``surplus`` versions that are not resident are chosen. Then
    further versions are chosen until the weights of the chosen versions have ``surplus_bytes`` bytes in total. The
    least recently used versions are chosen first. ``now`` is the current time on ``time.monotonic``'s clock.

    ``loading`` are the versions being loaded, which cannot be evicted. If there are none, a version may exceed the
    memory limit. So a version that needs more memory than the limit allows can be served, but only one at a time.

    Raises:
        TooManyVersions: a chosen version is in use, fewer than ``surplus`` versions can be evicted, or other versions
            are being loaded and fewer than ``surplus_bytes`` bytes can be freed.
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
    exceeds_limit = bool(loading) and sum(model.bytes for model in replaced) < surplus_bytes
    if len(replaced) < surplus or exceeds_limit or any(seconds > 0 for seconds in in_use):
        raise TooManyVersions(
            "this version cannot be loaded now: all versions that it could replace are in use; retry later",
            math.ceil(max([1.0, *in_use])),
        )
    return replaced


def check_defaults(
    defaults: Mapping[TaskName, str],
    card: Callable[[str], Card | None],
    stored: Collection[str],
    unloaded: Collection[str],
) -> tuple[dict[TaskName, str], list[str]]:
    """Return two values: the default model of each task, and the reasons why default models cannot be used.

    A default model for another task is left out. A default model that is not in the store, or is unloaded, is only
    reported, because it can return. ``card`` returns the card of a model's active version. ``stored`` are the names of
    the models in the store, and ``unloaded`` those of the unloaded models.
    """
    valid, reasons = dict(defaults), []
    for task, name in defaults.items():
        model_card = card(name)
        if model_card and model_card.task != task:
            del valid[task]
            reasons.append(f"defaults.json: {name!r} is for {model_card.task!r}, expected one for {task!r}")
    reasons += unserved_defaults(defaults, stored, unloaded)
    return valid, reasons
