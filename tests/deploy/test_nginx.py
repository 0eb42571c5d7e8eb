"""deploy/nginx.conf with two services: streams are not buffered, and a restart loses no request."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.processes import ServiceProcess, serving
from support.responses import metric_samples
from support.waiting import wait_until

from benchmarks.restarts import proxy_file
from benchmarks.support.servers import free_port

pytestmark = [
    pytest.mark.skipif(
        not shutil.which("nginx"), reason="nginx is not installed (Debian: apt-get install nginx-light)"
    ),
]
CONTINUE, SAMPLE = "/v1/text/continue", "/v1/images/sample"


@contextmanager
def nginx(folder: Path, port: int, upstreams: list[int]) -> Iterator[str]:
    """Run nginx with the configuration of deploy/ and test addresses and folders."""
    file = proxy_file(folder, port, upstreams)
    process = subprocess.Popen(["nginx", "-e", "stderr", "-p", folder, "-c", file, "-g", "daemon off;"])

    def answers() -> bool:
        assert process.poll() is None, "nginx did not start"
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def answer_count(service: ServiceProcess, route: str) -> float:
    """Return the number of requests to a route that a service has answered with status 200."""
    with httpx.Client(base_url=service.url, timeout=60) as client:
        return metric_samples(client).get(
            ("quartet_requests_total", ("method", "POST"), ("route", route), ("status", "200")), 0.0
        )


def test_streams_are_not_buffered_and_a_restart_loses_no_request(tiny_store: Path, tmp_path: Path) -> None:
    front, first_port, second_port = (free_port() for _ in range(3))
    statuses: list[int] = []
    stop = threading.Event()

    def send_requests(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as http_client:
            while not stop.is_set():
                statuses.append(http_client.post(SAMPLE, json={"count": 2}).status_code)

    with (
        serving(tiny_store, port=second_port, workers=1) as other,
        ThreadPoolExecutor(4) as pool,
        serving(tiny_store, port=first_port, workers=1) as first,
        nginx(tmp_path, front, [first_port, second_port]) as url,
    ):
        body = {"prompt": "a", "max_characters": 4000, "n": 16, "stream": True}
        with httpx.stream("POST", f"{url}{CONTINUE}", json=body, timeout=60) as answer:
            chunks = answer.iter_bytes()
            assert next(chunks).startswith(b"data: ")
            assert answer_count(first, CONTINUE) + answer_count(other, CONTINUE) == 0  # the answer is not complete
            assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
        assert httpx.get(f"{url}/metrics", timeout=60).status_code == 404
        tasks = [pool.submit(send_requests, url) for _ in range(4)]
        try:
            wait_until(lambda: min(answer_count(first, SAMPLE), answer_count(other, SAMPLE)) > 20)
            assert first.stop() == 0
            with serving(tiny_store, port=first_port, workers=1) as restarted:
                wait_until(lambda: answer_count(restarted, SAMPLE) > 20)
                stop.set()
                for task in tasks:
                    task.result()
        finally:
            stop.set()
    assert len(statuses) > 60
    assert set(statuses) == {200}
