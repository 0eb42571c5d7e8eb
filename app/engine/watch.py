"""What the engines report while they run; telemetry gives the meaning. ``model`` is ``name@version``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Watch(Protocol):
    def waited(self, model: str, seconds: Sequence[float]) -> None:
        """Items left the queue after so long each."""

    def computed(self, model: str, rows: int, seconds: float) -> None:
        """A forward of ``rows`` rows took so long."""

    def refused(self, model: str) -> None:
        """A request found the queue full."""

    def failed(self, model: str, error: Exception) -> None:
        """The network failed on an input that was good."""

    def loaded(self, model: str, size: int) -> None:
        """So many bytes of its weights are in memory now."""
