"""The versions that are in memory, and which of them go when there is no room for all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from app.engine.observer import ObserverFactory
from app.serving.loader import LoadedModel

log = logging.getLogger("quartet")


@dataclass
class ModelCache:
    """Holds versions of at most so many bytes of weights, where ``most`` is not 0."""

    observers: ObserverFactory
    max_bytes: int = 0
    models: dict[str, dict[int, LoadedModel]] = field(default_factory=dict)

    def get(self, name: str, number: int) -> LoadedModel | None:
        versions = self.models.get(name)
        return versions.get(number) if versions else None

    def all(self) -> list[LoadedModel]:
        return [live for _, versions in sorted(self.models.items()) for _, live in sorted(versions.items())]

    def bytes(self) -> int:
        return sum(live.bytes for live in self.all())

    def add(self, live: LoadedModel, is_pinned: Callable[[LoadedModel], bool]) -> None:
        """Hold one more. Past the limit others go, those asked for longest ago first, but none that ``stays``."""
        self.models.setdefault(live.card.name, {})[live.card.version] = live
        self.observers.for_version(live.card.name, live.card.version).on_loaded(live.bytes)
        log.info("%s is in memory", live.id)
        while self.max_bytes and self.bytes() > self.max_bytes:
            others = [other for other in self.all() if other is not live and not is_pinned(other)]
            if not others:
                log.warning("QUARTET_MODEL_BYTES is %s: %s are needed all the same", self.max_bytes, self.bytes())
                return
            self.evict(min(others, key=lambda other: other.last_used_at), "unloaded: others need its room")

    def evict(self, live: LoadedModel, reason: str) -> None:
        """Hold a version no longer; what it was asked already, it still answers."""
        versions = self.models[live.card.name]
        del versions[live.card.version]
        if not versions:
            del self.models[live.card.name]
        self.observers.for_version(live.card.name, live.card.version).on_loaded(0)
        log.info("%s is %s", live.id, reason)
