"""The versions that are in memory, and which of them go when there is no room for all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from app.engine.observer import ObserverFactory
from app.serving.loader import Live

log = logging.getLogger("quartet")


@dataclass
class Memory:
    """Holds versions of at most so many bytes of weights, where ``most`` is not 0."""

    watch: ObserverFactory
    most: int = 0
    live: dict[str, dict[int, Live]] = field(default_factory=dict)

    def get(self, name: str, number: int) -> Live | None:
        versions = self.live.get(name)
        return versions.get(number) if versions else None

    def all(self) -> list[Live]:
        return [live for _, versions in sorted(self.live.items()) for _, live in sorted(versions.items())]

    def bytes(self) -> int:
        return sum(live.bytes for live in self.all())

    def add(self, live: Live, stays: Callable[[Live], bool]) -> None:
        """Hold one more. Past the limit others go, those asked for longest ago first, but none that ``stays``."""
        self.live.setdefault(live.card.name, {})[live.card.version] = live
        self.watch.for_version(live.card.name, live.card.version).on_loaded(live.bytes)
        log.info("%s is in memory", live.id)
        while self.most and self.bytes() > self.most:
            others = [other for other in self.all() if other is not live and not stays(other)]
            if not others:
                log.warning("QUARTET_MODEL_BYTES is %s: %s are needed all the same", self.most, self.bytes())
                return
            self.drop(min(others, key=lambda other: other.used), "unloaded: others need its room")

    def drop(self, live: Live, why: str) -> None:
        """Hold a version no longer; what it was asked already, it still answers."""
        versions = self.live[live.card.name]
        del versions[live.card.version]
        if not versions:
            del self.live[live.card.name]
        self.watch.for_version(live.card.name, live.card.version).on_loaded(0)
        log.info("%s is %s", live.id, why)
