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

    # app/engine
    part_rows: int = 16  # small requests wait this long for a large one; more rows are hardly faster for each row
    max_retry_after_seconds: int = 60  # estimates of more than a minute are unreliable
    round_seconds: float = 0.001  # a round of text steps; the work of the event loop between rounds takes about 0.1 ms
    max_round_seconds: float = 0.05  # a longer round would be noticed in streams
    preempt_after_seconds: float = 1.0  # shorter texts finish sooner if they are not preempted
    preempt_ratio: float = 4.0  # texts of similar length finish sooner, on average, one after the other
    preempt_check_seconds: float = 0.05  # a search takes up to 1 ms
    breaker_failures: int = 3  # one bad input must not open the breaker
    breaker_reset_seconds: float = 10.0  # health checks of load balancers come every few seconds

    # app/serving
    model_idle_seconds: float = 300.0  # a version that is not resident is evicted after this time without a request
    model_in_use_seconds: float = 10.0  # after a request, other requests cannot evict its version for this time
    load_retry_seconds: float = 30.0  # a failure for lack of memory may pass by itself
    rollout_check_seconds: float = 0.5  # to read one small file; shorter than the timeout of a readiness probe
    scan_stall_seconds: float = 10.0  # a scan takes less than 0.1 s on a local disk
    recovery_check_seconds: float = 1.0  # the restart of a broken process should not take much longer

    # app/api
    min_read_bytes_per_second: float = 65_536.0  # lowest average speed at which a client must read a large response
    slow_read_seconds: float = 60.0  # added to the time of a response at that speed, for clients that pause
