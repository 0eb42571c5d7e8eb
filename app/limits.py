"""The tuned constants of the service, in one place.

A setting in ``app/settings.py`` is for the owner of a service. A constant here is for developers: nobody can choose it
well without measuring. Each field has its unit in its name, and a comment with the reason for its value.
"""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Limits:
    """Constants that tests change with ``replace(Limits(), ...)``, or with ``QUARTET_LIMITS`` for other processes."""
