"""The metrics of several workers: their sums, restarts of workers, and a full /dev/shm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from support.processes import TIMEOUT_SECONDS, ServiceProcess, serving
from support.responses import metric_samples
from support.waiting import wait_until

LIVE = ("quartet_requests_total", ("method", "GET"), ("route", "/health/live"), ("status", "200"))
LAST_BATCH = ("quartet_last_batch_timestamp_seconds", ("model", "tiny-gan"), ("version", "1"))


def samples(service: ServiceProcess) -> dict[tuple[object, ...], float]:
    with httpx.Client(base_url=service.url, timeout=TIMEOUT_SECONDS) as client:
        return metric_samples(client)


def live(service: ServiceProcess) -> int:
    return httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code


def metrics_folder(service: ServiceProcess) -> Path:
    (folder,) = Path("/dev/shm").glob(f"quartet-{service.process.pid}-*")
    return folder


@pytest.mark.slow
def test_counts_of_replaced_workers_are_kept_and_their_gauges_are_removed(tiny_store: Path) -> None:
    with serving(tiny_store, log_level="error") as service:
        body = {"count": 1}
        assert httpx.post(f"{service.url}/v1/images/sample", json=body, timeout=TIMEOUT_SECONDS).status_code == 200
        last_batch = samples(service)[LAST_BATCH]
        for round in range(1, 4):
            assert {live(service) for _ in range(6)} == {200}
            victim = min(service.workers)
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda victim=victim: victim not in service.workers and len(service.workers) == 2)
            found = samples(service)
            assert (found[LIVE], found[LAST_BATCH], found["quartet_planned_workers",]) == (6 * round, last_batch, 2)
            wait_until(lambda: samples(service)["quartet_workers",] == 2)


@pytest.mark.slow
def test_metrics_survive_the_removal_of_their_folder(tiny_store: Path) -> None:
    """systemd removes the folder when the last session of a login user ends."""
    with serving(tiny_store, log_level="error") as service:
        assert live(service) == 200
        shutil.rmtree(metrics_folder(service))
        assert samples(service)[LIVE] == 1
        os.kill(min(service.workers), signal.SIGKILL)
        wait_until(lambda: samples(service)["quartet_workers",] == 2)
        assert samples(service)[LIVE] == 1


def test_the_service_leaves_no_folder(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        folder = metrics_folder(service)
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
        assert {live(service) for _ in range(20)} == {200}
        assert samples(service)[LIVE] == 20
        assert service.workers == workers
