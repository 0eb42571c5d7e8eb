"""The interfaces through which engines report measurements, and a class for the measurements of one request.

``app/observability`` implements the interfaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

VersionKey = tuple[str, int]  # model name and version number


@dataclass(eq=False, slots=True)
class RequestTrace:
    """Measurements of one request.

    ``model`` and ``version`` are empty until the version that answers the request is known. Times are on
    ``time.monotonic``'s clock. 0 means that the event has not happened yet. ``span`` is an object of the tracing
    library. ``error_code`` is the code of the error response, or empty without an error.
    """

    id: str = ""
    model: str = ""
    version: int = 0
    rows: int = 0
    queued_at: float = 0.0
    started_at: float = 0.0  # when the computation of its first row began
    ended_at: float = 0.0  # when its last row was computed
    time_to_first_token: float = 0.0  # seconds until the first character of its first text
    error_code: str = ""
    span: Any = None


# The trace of the request that the current asyncio task handles.
current_trace: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)


class BatchMember(Protocol):
    """Rows of one request that are queued and then computed in a batch. Times are on ``time.monotonic``'s clock."""

    rows: int
    queued_at: float
    started_at: float
    ended_at: float
    trace: RequestTrace | None


class EngineObserver(Protocol):
    """Receives the measurements of one version's engines. The items of ``members`` are ``BatchMember`` objects."""

    @property
    def key(self) -> VersionKey:
        """The model name and the number of the version."""

    def on_dequeued(self, members: Sequence[Any]) -> None:
        """Record that members have left the queue and that their computation began at ``started_at``."""

    def on_batch(self, rows: int, seconds: float) -> None:
        """Record that one batch of ``rows`` rows was computed in ``seconds`` seconds."""

    def on_completed(self, members: Sequence[Any]) -> None:
        """Record that the computation of members ended at ``ended_at``."""

    def on_first_token(self, member: Any, seconds: float) -> None:
        """Record that the first character of a text was generated ``seconds`` seconds after the text was queued."""

    def on_inter_token(self, seconds: float) -> None:
        """Record the mean time between two characters of a finished text, in seconds."""

    def on_rejected(self, reason: str) -> None:
        """Record that a request was rejected before queueing. ``reason`` is ``queue_full`` or ``stopping``."""

    def on_failure(self, error: Exception) -> None:
        """Record that the network failed on a valid input that was computed alone, or that the engine failed."""

    def on_memory(self, size: int) -> None:
        """Record that the weights of the version now occupy ``size`` bytes of memory. 0 means that it is unloaded."""

    def on_queue(self, queued: int, running: int) -> None:
        """Record that ``queued`` rows wait and that ``running`` rows are being computed."""


class ObserverFactory(Protocol):
    """Creates one observer for each version."""

    def for_version(self, model: str, version: int) -> EngineObserver:
        """Return the observer of a version. The observers of one version are equal."""

    def on_versions(self, ready: int, failed: int, known: frozenset[VersionKey], scan_age: float) -> None:
        """Record that ``ready`` versions are in memory, and that ``failed`` versions or files cannot be served.

        ``scan_age`` is the number of seconds since the last scan of the store, or 0 if it is scanned only once.
        Measurements of versions that are not in ``known`` may be discarded.
        """
