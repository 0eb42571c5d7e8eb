"""The tuned constants of the service, in one place.

A setting in ``app/settings.py`` is for the owner of a service. A constant here is for developers: nobody can choose it
well without measuring. Each field has its unit in its name, and a comment with the reason for its value.
"""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Limits:
    """Limits that few users change. ``QUARTET_LIMITS`` changes them, and tests use ``replace(Limits(), ...)``."""

    # One request may have at most this much. Larger requests would delay others for too long.
    max_images: int = 16  # to classify
    max_prompt_characters: int = 100_000
    max_prompt_seconds: float = 30.0  # of reading, estimated from the speed of the network; half of a request's time
    max_characters: int = 4_000  # generated for each text
    max_texts: int = 16
    max_series: int = 64
    max_series_values: int = 100_000  # in all series
    max_horizon: int = 1_000  # steps to forecast
    max_samples: int = 1_024  # generated images
    max_rows: int = 1_024  # of tensors, for imported networks

    # app/engine
    batch_rows: int = 64  # more rows are hardly faster for each row, and delay the rows that arrive meanwhile
    inline_seconds: float = 0.004  # longest batch or text step on the event loop; a thread costs up to 0.2 ms
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
    parse_threads: int = 2  # decode images and parse large bodies; most of this work holds the GIL
    unready_after_seconds: float = 5.0  # without progress of computations; the slowest batch takes less
    max_running_texts: int = 128  # of one version in a worker; a network computes all batch sizes up to it at its start
    max_on_demand_versions: int = 8  # in a worker, loaded because a request names their number; each needs memory
    model_idle_seconds: float = 300.0  # a version that is not resident is evicted after this time without a request
    model_in_use_seconds: float = 10.0  # after a request, other requests cannot evict its version for this time
    load_retry_seconds: float = 30.0  # a failure for lack of memory may pass by itself
    rollout_check_seconds: float = 0.5  # to read one small file; shorter than the timeout of a readiness probe
    recovery_check_seconds: float = 1.0  # the restart of a broken process should not take much longer

    # app/api
    body_seconds: float = 30.0  # a client may pause this long while it sends a body
    min_read_bytes_per_second: float = 65_536.0  # lowest average speed at which a client must read a large response
    slow_read_seconds: float = 60.0  # added to the time of a response at that speed, for clients that pause
    key_check_seconds: float = 1.0  # time between two checks whether the key file has changed
    rate_limit_retry_seconds: float = 5.0  # no counting after an error of the storage; an attempt may take a second
    rate_limit_counters: int = 8192  # enough for the largest key file with a few limits per key

    # app/records
    capture_bytes: int = 2**30  # of captured requests; about 300,000 small images
    captures_waiting: int = 256  # requests; each may have 16 images
    capture_days: float = 30.0  # personal data should not be kept longer without a reason
    figures_seconds: float = 2.0  # a worker sees the feedback that another one has stored after this time
    # At this interval, old requests are deleted and the drift is computed, which takes 9 ms for 100 small images.
    drift_seconds: float = 30.0
    batch_poll_seconds: float = 1.0  # an idle process looks for new batch jobs at these intervals

    # app/importing
    max_import_bytes: int = 2 * 2**30  # of an archive or a file, before and after unpacking
    speed_seconds: float = 0.5  # the measurement of the speed of an imported network takes at least this long

    # app/server: connections (SECURITY.md)
    head_bytes: int = 64 * 1024  # as in h11; httptools has no limit
    framing_bytes: int = 64 * 1024  # the framing of a body may have this much more than the body itself
    head_seconds: float = 30.0  # a slow client needs a few seconds for a head
    last_request_seconds: float = 1.0  # a request that is on its way arrives in this time when the server stops
    tls_handshake_seconds: float = 10.0
    stalled_write_seconds: float = 60.0  # in this time a client must read ``stalled_write_bytes``
    stalled_write_bytes: int = 64 * 1024
    connections: int = 4096  # of one worker; an idle connection takes about 10 KiB
    accept_pause_seconds: float = 0.001  # until a worker looks again for a connection that it leaves to the others
    accept_error_seconds: float = 1.0  # connections may be closed in this time, if too many files are open

    # app/server: processes
    liveness_timeout_seconds: float = 30.0  # without a heartbeat; at least 0.3, because there are ten in a second
    fresh_heartbeat_seconds: float = 0.5  # an older heartbeat means that the event loop of a worker is blocked
    worker_start_seconds: float = 600.0  # loading large networks from a slow disk takes minutes
    restart_seconds: float = 1.0  # between two starts of a worker; one that ends early would probably end again
