"""The metrics of several workers: their sums, restarts of workers, removed versions, and a full /dev/shm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from support.networks import publish_tiny
from support.processes import TIMEOUT_SECONDS, ServiceProcess, serving
from support.responses import SAMPLE, metric_samples
from support.waiting import wait_until

LIVE = ("quartet_requests_total", ("method", "GET"), ("route", "/health/live"), ("status", "200"))
SUMS = ("quartet_batch_rows_sum", "quartet_last_batch_timestamp_seconds")


def samples(service: ServiceProcess) -> dict[tuple[object, ...], float]:
    with httpx.Client(base_url=service.url, timeout=TIMEOUT_SECONDS) as client:
        return metric_samples(client)


def of_version(service: ServiceProcess, number: int) -> dict[object, float]:
    """Return the metrics of a version of tiny-gan."""
    key = (("model", "tiny-gan"), ("version", str(number)))
    return {name: value for (name, *labels), value in samples(service).items() if tuple(labels) == key}


def generate(service: ServiceProcess, count: int = 1) -> int:
    """Generate images over a new connection. Return the version."""
    answer = httpx.post(f"{service.url}{SAMPLE}", json={"count": count}, timeout=TIMEOUT_SECONDS)
    return int(answer.raise_for_status().json()["version"])


def test_metrics_of_workers_are_added_up_and_those_of_dead_workers_and_removed_versions_are_hidden(
    tiny_store: Path,
) -> None:
    with serving(tiny_store, store_poll_seconds=0.02) as service:
        (folder,) = Path("/dev/shm").glob(f"quartet-{service.process.pid}-*")
        wait_until(lambda: samples(service).get(("quartet_workers",)) == 2)
        size = of_version(service, 1)["quartet_loaded_bytes"]
        assert {generate(service, count=3) for _ in range(6)} == {1}  # new connections reach both workers
        before = of_version(service, 1)
        assert (before["quartet_batch_rows_sum"], size) == (18, 2 * 4 * (4 * 8 + 8 + 8 * 784 + 784))
        running = service.connect()  # a request that never ends
        running.sendall(b"POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        wait_until(lambda: samples(service)["quartet_requests_running",] == 2)
        shutil.rmtree(folder)  # as systemd does when the last session of a login user ends
        for _ in range(2):
            old = min(service.workers)
            os.kill(old, signal.SIGKILL)
            wait_until(lambda old=old: old not in service.workers and len(service.workers) == 2)
            found = of_version(service, 1)
            assert [found[name] for name in SUMS] == [before[name] for name in SUMS]
            assert samples(service)["quartet_planned_workers",] == 2
            wait_until(lambda: samples(service)["quartet_workers",] == 2)
        running.close()
        assert samples(service)["quartet_requests_running",] == 1  # the one for /metrics
        for number in (2, 3):
            version = publish_tiny(tiny_store, "tiny-gan")
            wait_until(lambda number=number: {generate(service) for _ in range(4)} == {number})
            if number == 2:
                second = version.folder
        second.rename(tiny_store / ".gone")
        wait_until(lambda: not of_version(service, 2))
        wait_until(lambda: of_version(service, 3).get("quartet_loaded_bytes") == size)
    assert not folder.exists()


FULL_SHM = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && dd if=/dev/zero of=/dev/shm/full bs=4k 2>/dev/null; exec "$@"'


@pytest.mark.slow
def test_a_full_dev_shm_kills_nothing(tiny_store: Path) -> None:
    command = ["unshare", "--mount", "bash", "-c", FULL_SHM, "bash"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare is missing or not permitted")
    with serving(tiny_store, wrapper=command) as service:
        workers = service.workers
        for i in range(200):  # each route, method and status has counts of its own
            assert httpx.request(["GET", "POST", "PUT"][i % 3], f"{service.url}/v1/models", timeout=TIMEOUT_SECONDS)
        for _ in range(20):
            assert httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code == 200
        assert samples(service)[LIVE] == 20
        assert service.workers == workers
