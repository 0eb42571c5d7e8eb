"""The rollout of a model: which version is active, which is the canary, and which versions are retired.

The rollout is stored in ``<name>/active.json``. Without this file, the newest valid version is active. It has these
keys:

    active      the version that serves requests without a version number; null means the newest valid version that is
                not retired
    canary      a version that serves a share of the requests without a version number, in per cent
    shadow      a version that gets copies of a share of the captured requests, in per cent
    history     the versions that were active before, oldest first; ``rollback`` goes back to the last one
    retired     versions that are not served any more, even to requests with their number; their files stay
    unloaded    true if no version is served until the model is loaded or a version is activated
    changed     time of the last change
    by          command of the last change

While ``active`` is a number, a newly published version serves only requests with its number, until it is activated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.store.card import StrictModel, VersionNumber

FILE = "active.json"
LATEST: Literal["latest"] = "latest"
PINNED: Literal["pinned"] = "pinned"


class Canary(StrictModel):
    """A version that serves ``share`` per cent of the requests without a version number."""

    version: VersionNumber
    share: Annotated[float, Field(gt=0, lt=100)]


class Shadow(StrictModel):
    """A version that gets copies of ``share`` per cent of the captured requests. Its answers are only compared."""

    version: VersionNumber
    share: Annotated[float, Field(gt=0, le=100)]


@dataclass(frozen=True)
class Roles:
    """The versions of a model that serve requests without a version number, and the target of a rollback.

    Attributes:
        active: serves all these requests, except the share of the canary; None if no version is valid.
        canary: serves a share of them.
        previous: becomes active after a rollback without a canary.
        shadow: gets copies of requests that the active version answers.
    """

    active: int | None = None
    canary: Canary | None = None
    previous: int | None = None
    shadow: Shadow | None = None


class Rollout(StrictModel):
    """The content of ``active.json``."""

    active: VersionNumber | None = None
    canary: Canary | None = None
    shadow: Shadow | None = None
    history: list[VersionNumber] = Field(default_factory=list)
    retired: list[VersionNumber] = Field(default_factory=list)
    unloaded: bool = False
    changed: str = ""
    by: str = ""

    @model_validator(mode="before")
    @classmethod
    def _read_older_format(cls, content: Any) -> Any:
        """Read a file without ``history``. It has ``previous``, and ``latest``, which ``activate latest`` activated."""
        if not isinstance(content, dict) or "history" in content:
            return content
        older = [content.get(key) for key in ("previous", "latest")]
        kept = {key: value for key, value in content.items() if key not in ("previous", "latest")}
        return kept | {"history": [number for number in older if number is not None]}

    def roles(self, numbers: Iterable[int], is_valid: Callable[[int], bool] = lambda _: True) -> Roles:
        """Decide which of the stored versions are active, canary and previous.

        This is the only place of this decision. ``is_valid`` returns whether a version can be served. It is called
        only for the candidates, best first.
        """
        stored = [number for number in sorted(numbers, reverse=True) if number not in self.retired]
        chosen = [self.active, *reversed(self.history)] if self.active else []
        candidates = dict.fromkeys([*(number for number in chosen if number in stored), *stored])
        active = next(filter(is_valid, candidates), None)

        def usable(number: int) -> bool:
            return number != active and number in stored and is_valid(number)

        canary = self.canary if self.canary and usable(self.canary.version) else None
        shadow = self.shadow if self.shadow and usable(self.shadow.version) else None
        return Roles(active, canary, next(filter(is_valid, self.earlier(active, stored)), None), shadow)

    def state(self, name: str, roles: Roles) -> str:
        """Return the state of a model in words, such as ``sales@3 is active; retired: 1``."""
        if self.unloaded:
            text = f"{name} is unloaded"
        elif roles.active is None:
            text = "no version is active"
        else:
            text = f"{name}@{roles.active} is active{'' if self.active else ' (latest)'}"
            if roles.canary:
                text += f", {name}@{roles.canary.version} is the canary ({roles.canary.share:g} %)"
            if roles.shadow:
                text += f", {name}@{roles.shadow.version} is the shadow ({roles.shadow.share:g} %)"
        return text + (f"; retired: {', '.join(map(str, self.retired))}" if self.retired else "")

    def earlier(self, active: int | None, stored: Iterable[int]) -> list[int]:
        """Return the versions that ``rollback`` may activate, best first.

        These are the versions of the history. If no number was activated, versions that were published since then come
        first, and all older versions last.
        """
        stored = [number for number in sorted(stored, reverse=True) if number not in self.retired]
        candidates = list(reversed(self.history))
        if self.active is None and active is not None:
            older = [number for number in stored if number < active]
            since = [number for number in older if number > max(self.history[-1:], default=0)]
            candidates = [*since, *candidates, *older]
        return [number for number in dict.fromkeys(candidates) if number != active and number in stored]

    def after(self, *numbers: int | None) -> list[int]:
        """Return the history after these versions have been active."""
        history = list(self.history)
        for number in numbers:
            if number is not None and [number] != history[-1:]:
                history.append(number)
        return history

    def before(self, target: int) -> list[int]:
        """Return the history after a rollback to ``target``: the versions that were active before ``target``."""
        if target in self.history:
            last = len(self.history) - 1 - self.history[::-1].index(target)
            return self.history[:last]
        return [number for number in self.history if number < target]

    @property
    def in_use(self) -> list[int]:
        """The numbers of the active version, the canary and the shadow that the file names."""
        others = [each.version for each in (self.canary, self.shadow) if each]
        return [self.active, *others] if self.active else others
