"""What the engines report, and the account of each request that they fill in. Whoever watches gives it the meaning."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

VersionKey = tuple[str, int]  # a name and the number of a version


@dataclass(eq=False, slots=True)
class RequestTrace:
    """What a request asked of the engines and had from them. Times are those of ``time.monotonic``, 0 before they come.

    ``span`` is for whoever traces requests, ``reason`` the code of the failure that was told.
    """

    id: str = ""
    model: str = ""
    version: int = 0
    rows: int = 0
    queued_at: float = 0.0
    started_at: float = 0.0  # the first of its rows to be computed
    ended_at: float = 0.0  # the last of them
    time_to_first_token: float = 0.0  # seconds to the first character of its first text
    error_code: str = ""
    span: Any = None


current_trace: ContextVar[RequestTrace | None] = ContextVar(
    "account", default=None
)  # of the request that a task works on


class BatchMember(Protocol):
    """What is queued and then computed with others: rows of a request, and when (``time.monotonic``)."""

    rows: int
    queued_at: float
    started_at: float
    ended_at: float
    trace: RequestTrace | None


class EngineObserver(Protocol):
    """Told of the engines of one version."""

    @property
    def key(self) -> VersionKey: ...

    def on_dequeued(self, members: Sequence[Any]) -> None:
        """Members left the queue to be computed: they have ``begun``."""

    def on_batch(self, rows: int, seconds: float) -> None:
        """A forward of ``rows`` rows took so long."""

    def on_completed(self, members: Sequence[Any]) -> None:
        """Members were computed together, and have ``ended``."""

    def on_first_token(self, member: Any, seconds: float) -> None:
        """The first character of a text came so long after it was queued."""

    def on_inter_token(self, seconds: float) -> None:
        """The mean time between two characters of a text that is finished."""

    def on_rejected(self, reason: str) -> None:
        """A request was not let into the queue: ``queue_full`` or ``stopping``."""

    def on_failure(self, error: Exception) -> None:
        """The network failed on an input that was good."""

    def on_loaded(self, size: int) -> None:
        """The version holds so many bytes of weights here; 0: it is gone."""

    def on_load(self, queued: int, running: int) -> None:
        """So many rows wait, and so many are computed."""


class ObserverFactory(Protocol):
    """Has a watch for each version."""

    def for_version(self, model: str, version: int) -> EngineObserver: ...

    def on_versions(self, live: int, broken: int, there: frozenset[VersionKey]) -> None:
        """So many versions are in memory, and so many cannot be served; ``there`` are all that may yet be told of."""
