"""What the engines report, and the account of each request that they fill in. Whoever watches gives it the meaning."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

Key = tuple[str, int]  # a name and the number of a version


@dataclass(eq=False, slots=True)
class Account:
    """What a request asked of the engines and had from them. Times are those of ``time.monotonic``, 0 before they come.

    ``span`` is for whoever traces requests, ``reason`` the code of the failure that was told.
    """

    id: str = ""
    model: str = ""
    version: int = 0
    rows: int = 0
    queued: float = 0.0
    begun: float = 0.0  # the first of its rows to be computed
    ended: float = 0.0  # the last of them
    first: float = 0.0  # seconds to the first character of its first text
    reason: str = ""
    span: Any = None


ACCOUNT: ContextVar[Account | None] = ContextVar("account", default=None)  # of the request that a task works on


class Member(Protocol):
    """What is queued and then computed with others: rows of a request, and when (``time.monotonic``)."""

    rows: int
    queued: float
    begun: float
    ended: float
    account: Account | None


class Watch(Protocol):
    """Told of the engines of one version."""

    @property
    def key(self) -> Key: ...

    def waited(self, members: Sequence[Any]) -> None:
        """Members left the queue to be computed: they have ``begun``."""

    def computed(self, rows: int, seconds: float) -> None:
        """A forward of ``rows`` rows took so long."""

    def served(self, members: Sequence[Any]) -> None:
        """Members were computed together, and have ``ended``."""

    def first(self, member: Any, seconds: float) -> None:
        """The first character of a text came so long after it was queued."""

    def between(self, seconds: float) -> None:
        """The mean time between two characters of a text that is finished."""

    def refused(self, reason: str) -> None:
        """A request was not let into the queue: ``queue_full`` or ``stopping``."""

    def failed(self, error: Exception) -> None:
        """The network failed on an input that was good."""

    def loaded(self, size: int) -> None:
        """The version holds so many bytes of weights here; 0: it is gone."""

    def load(self, queued: int, running: int) -> None:
        """So many rows wait, and so many are computed."""


class Watcher(Protocol):
    """Has a watch for each version."""

    def of(self, model: str, version: int) -> Watch: ...

    def versions(self, live: int, broken: int, there: frozenset[Key]) -> None:
        """So many versions are in memory, and so many cannot be served; ``there`` are all that may yet be told of."""
