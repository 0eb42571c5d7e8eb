"""``make serve`` starts a service that classifies real images correctly."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import httpx
from support.service import IMAGES, ROOT


def test_make_serve_prints_an_address_that_answers_and_stops_cleanly() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUARTET_")}
    with subprocess.Popen(
        ["make", "serve", "PORT=0"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            lines = []
            for line in process.stdout:
                lines.append(line)
                if address := re.search(r"serves on (http://[\d.:]+)", line):
                    break
            assert address, "".join(lines)
            with httpx.Client(base_url=address[1], timeout=30) as client:
                assert client.get("/health/ready").json()["broken"] == []
                files = sorted((IMAGES / "cifar10").glob("*.png"))
                parts = [("file", (path.name, path.read_bytes())) for path in files]
                results = client.post("/v1/images/classify", files=parts).json()["results"]
            correct = sum(result["predictions"][0]["label"] in result["filename"] for result in results)
            assert correct >= 6
        finally:
            os.killpg(process.pid, signal.SIGTERM)
        output = process.stdout.read()
        process.wait(30)
    assert "Traceback" not in output
    assert "Error" not in output.replace("Error 143", "")  # make prints this after SIGTERM
