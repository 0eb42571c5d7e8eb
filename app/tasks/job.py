"""What a request asks for, in terms of its task. All protocols make jobs, and a predictor computes them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from app.errors import BadValue, quote_value
from app.limits import Limits


@dataclass
class Job:
    """The input of ``Predictor.prepare``.

    Attributes:
        names: for error messages, the protocol's names of the fields whose names differ from those of the job.
        streamed: whether the answer is sent while it is computed.
        request_id: the id of the request in the protocol, which the answer repeats.
        created: Unix time in seconds.
    """

    _: KW_ONLY
    names: Mapping[str, str] = field(default_factory=dict)
    streamed: bool = False
    request_id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def rows(self) -> int:
        """The number of rows that the job adds to the queue of its model."""
        return 1

    @property
    def prepare_size(self) -> int:
        """The cost of ``prepare``, in characters or values."""
        return 0

    def answer_size(self, outputs: Sequence[Any]) -> int:
        """Return the cost of finishing and encoding the answer, in values. ``outputs`` are those of the network."""
        return 0

    def check(self, limits: Limits) -> None:
        """Raise BadValue if the job exceeds a limit. This is the only place that checks them."""

    def memory_bytes(self, items: Sequence[Any]) -> int:
        """Return the bytes that ``items``, the result of ``prepare``, hold until the answer is complete."""
        return 0

    def name(self, field_name: str) -> str:
        """Return the name of a field in error messages."""
        return self.names.get(field_name, field_name)

    def check_at_most(self, field_name: str, limit: int) -> None:
        """Raise BadValue if the number in a field is above ``limit``."""
        value, name = getattr(self, field_name), self.name(field_name)
        if value > limit:
            raise BadValue(f"{name} is {quote_value(value)}; it should be less than or equal to {limit}", name)
