"""Load versions in the supervisor before it forks the workers, so that all workers share the memory of the networks."""

from __future__ import annotations

import gc

import torch

from app.engine.observer import VersionKey
from app.networks import is_imported
from app.serving.device import find_device
from app.serving.model import PreparedModel, PreparedModels
from app.serving.reconcile import desired_versions, versions_to_load
from app.serving.store_snapshot import StoreSnapshot
from app.settings import Settings
from app.store import Store


def preload(settings: Settings) -> PreparedModels:
    """Load the versions that stay in memory, for workers that are forked later.

    ``settings`` are the settings of a worker. Returns an empty dictionary if ``settings.threads`` is not 1, because a
    forked process cannot use the compute threads of its parent. Imported networks are left out, because their runtimes
    may start threads, but they count towards ``settings.model_bytes``. Versions that cannot be loaded are left out too.
    Each worker tries to load them again and reports the reason.
    """
    prepared: PreparedModels = {}
    if settings.threads != 1:
        return prepared
    torch.set_num_threads(1)
    device = find_device(settings.device)
    snapshot = StoreSnapshot.scan(Store(settings.store), StoreSnapshot(), {})
    sizes = snapshot.weights_bytes
    desired, defaults = desired_versions(snapshot, ()), set((snapshot.defaults or {}).values())
    loaded: dict[VersionKey, int] = {}  # as in a worker, the versions that are in memory limit what is loaded next
    failed: set[VersionKey] = set()

    def next_version() -> VersionKey | None:
        due = versions_to_load(desired, {}, loaded, defaults, settings.model_bytes, sizes)
        return next((key for key in due if key not in failed), None)

    while key := next_version():
        try:
            if not is_imported(snapshot.cards[key].kind):
                prepared[key] = PreparedModel.load(settings, device, *key)
            loaded[key] = sizes[key]
        except Exception:
            failed.add(key)
    gc.collect()
    gc.freeze()  # otherwise garbage collection in a worker would write to each object, and copy the shared memory
    return prepared
