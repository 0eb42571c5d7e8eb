"""What there is of a name, and which version serves a request that names none."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from app.store.rollout import Rollout

SHARE_PARTS = 10_000  # a share is measured in hundredths of a per cent


@dataclass(frozen=True)
class VersionSet:
    """A name as it is served; replaced as a whole, so that no request sees half of a change."""

    name: str
    numbers: tuple[int, ...]  # that may be asked for: whole as far as known, and not retired
    retired: tuple[int, ...]
    active: int | None
    previous: int | None
    canary: int | None = None
    share: float = 0.0  # of the canary, in per cent
    unloaded: tuple[int, ...] = ()  # that may be asked for once the model is loaded again

    @classmethod
    def build(cls, name: str, stored: Sequence[int], rollout: Rollout, broken: Collection[int]) -> VersionSet:
        """What follows from the versions in the store, from what was chosen, and from what cannot be served."""
        left = [number for number in stored if number not in broken and number not in rollout.retired]
        if rollout.unloaded:
            return cls(name, (), tuple(rollout.retired), None, None, unloaded=tuple(left))
        active = next(iter(rollout.preference(left)), None)
        back = [number for number in rollout.previous_versions(active, left) if number in left]
        canary = rollout.canary if rollout.canary and rollout.canary.version in left else None
        if canary is None or canary.version == active:
            return cls(name, tuple(left), tuple(rollout.retired), active, next(iter(back), None))
        previous = next(iter(back), None)
        return cls(name, tuple(left), tuple(rollout.retired), active, previous, canary.version, canary.share)

    @property
    def resident(self) -> list[int]:
        """The versions that stay in memory, the most wanted first."""
        wanted = (self.active, self.canary, self.previous)
        return list(dict.fromkeys(number for number in wanted if number is not None))

    def without(self, number: int) -> VersionSet:
        """The same once a version has turned out to be broken that does not serve."""
        left = tuple(known for known in self.numbers if known != number)
        canary = None if self.canary == number else self.canary
        return replace(self, numbers=left, canary=canary, previous=None if self.previous == number else self.previous)

    def labels(self) -> list[str]:
        """What may be asked for, as ``name@version``."""
        return [f"{self.name}@{number}" for number in self.numbers]

    def describe(self) -> str:
        """Which versions serve, for the log."""
        if self.unloaded:
            return "it is unloaded"
        canary = f", {self.canary} for {self.share:g} % of the requests" if self.canary else ""
        return f"version {self.active} serves{canary}" if self.active else "no version serves"

    def version_for(self, request_id: str) -> int | None:
        """The version for a request that names none: the same one each time that the request comes."""
        if self.canary is None:
            return self.active
        digest = hashlib.blake2b(f"{self.name} {request_id}".encode(), digest_size=8).digest()
        lot = int.from_bytes(digest, "big") % SHARE_PARTS
        return self.canary if lot < self.share * SHARE_PARTS / 100 else self.active
