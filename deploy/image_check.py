"""Build the container image, run it as a deployment would, and check it: ``make image-check``.

The container runs with a read-only file system and the user of the image. The check waits until the health check of
the image succeeds, sends one request to each model, sends SIGTERM and expects exit status 0. It prints the size of the
image and the duration of each step.

If Docker is installed, Docker builds and runs the image. Otherwise buildah builds the image and chroot runs it, which
needs root rights.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from deploy.containers import ROOT, Buildah, CheckError, ChrootContainer, Docker, DockerContainer, run

PHOTO = ROOT / "tests" / "images" / "cifar10" / "0013-horse.png"
MAX_GIGABYTES = 1.2  # limit of the uncompressed image with PyTorch for CPUs
READY_SECONDS = 120.0


def wait_until(condition: Callable[[], bool], seconds: float, description: str) -> float:
    """Wait until ``condition`` is true, and return how many seconds this took.

    Raises:
        CheckError: the condition is still false after ``seconds`` seconds.
    """
    started_at = time.monotonic()
    while not condition():
        if time.monotonic() - started_at > seconds:
            raise CheckError(f"{description}: not after {seconds:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - started_at


def send_requests(client: httpx.Client) -> list[str]:
    """Send one request to each model, and return the names of the models.

    A network without a task takes tensors of any shape, so its request only asks whether the network is ready.

    Raises:
        CheckError: a request failed.
    """
    photo = base64.b64encode(PHOTO.read_bytes()).decode()
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "classify": ("/v1/images/classify", {"images": [photo]}),
        "continue": ("/v1/text/continue", {"prompt": "ROMEO:", "max_characters": 20}),
        "forecast": ("/v1/series/forecast", {"values": [float(step % 12) for step in range(72)], "horizon": 12}),
        "sample": ("/v1/images/sample", {"count": 4}),
    }
    names = []
    models = client.get("/v1/models").raise_for_status().json()["data"]
    for model in models:
        if model["state"] != "ready":
            raise CheckError(f"{model['id']} is {model['state']}: {model['failed']}")
        path, body = bodies.get(model["task"], (f"/v2/models/{model['id']}/ready", {}))
        name = {"model": model["id"]}
        if not body:
            response = client.get(path)
        elif model["task"] == "classify":  # this endpoint takes options as query parameters
            response = client.post(path, params=name, json=body)
        else:
            response = client.post(path, json={**body, **name})
        if response.status_code != 200:
            request = f"{response.request.method} {path}"
            raise CheckError(f"{model['id']}: {request} returned {response.status_code}: {response.text[:300]}")
        names.append(model["id"])
    if missing := bodies.keys() - {model["task"] for model in models}:
        raise CheckError(f"the image has no model for {', '.join(sorted(missing))}")
    return names


def check_compose_file() -> None:
    """Validate docker-compose.yml, with all profiles, with an installed implementation of Compose.

    Raises:
        CheckError: the file is invalid, or no implementation is installed.
    """
    profiles = [option for profile in ("gpu", "monitoring", "scale") for option in ("--profile", profile)]
    for command in (("docker", "compose"), ("docker-compose",), ("podman-compose",)):
        if not shutil.which(command[0]) or subprocess.run((*command, "version"), capture_output=True).returncode:
            continue
        run(*command, "--file", str(ROOT / "docker-compose.yml"), *profiles, "config")
        print(f"docker-compose.yml: valid for {' '.join(command)}", flush=True)
        return
    raise CheckError("install Docker Compose, docker-compose or podman-compose")


def check(builder: Docker | Buildah, options: Sequence[str], max_gigabytes: float) -> None:
    """Build the image and run all checks.

    Raises:
        CheckError: a check failed.
    """
    check_compose_file()
    started_at = time.monotonic()
    builder.build(options)
    print(f"built with {builder.tool}: {time.monotonic() - started_at:.0f} s", flush=True)
    gigabytes = builder.megabytes() / 1000
    print(f"size: {gigabytes:.2f} GB", flush=True)
    with builder.container() as container:
        try:
            check_container(container)
        except CheckError as error:
            raise CheckError(f"{error}\nthe service wrote:\n{container.output()}") from None
    if gigabytes > max_gigabytes:
        raise CheckError(f"the image has {gigabytes:.2f} GB, more than {max_gigabytes} GB")


def check_container(container: DockerContainer | ChrootContainer) -> None:
    seconds = wait_until(container.is_healthy, READY_SECONDS, "healthy")
    print(f"healthy: {seconds:.1f} s after the start", flush=True)
    with httpx.Client(base_url=f"http://127.0.0.1:{container.port}", timeout=60) as client:
        wait_until(lambda: client.get("/health/ready").status_code == 200, READY_SECONDS, "ready")
        print(f"answered: {', '.join(send_requests(client))}", flush=True)
    if container.succeeds("python", "-c", "open('/srv/app/main.py', 'a')"):
        raise CheckError("the service can change its own code")
    started_at = time.monotonic()
    if status := container.stop():
        raise CheckError(f"exit status {status} after SIGTERM")
    print(f"exit status 0: {time.monotonic() - started_at:.1f} s after SIGTERM", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.image_check", description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default="cpu", help="build of PyTorch: cpu, cu128 ... (default: cpu)")
    parser.add_argument("--max-gb", type=float, default=MAX_GIGABYTES, help=f"size limit (default: {MAX_GIGABYTES})")
    parser.add_argument("--base", help="base image (default: the base image in the Dockerfile)")
    options = parser.parse_args(arguments)
    builder = Docker() if shutil.which("docker") else Buildah()
    build = ["--build-arg", f"TORCH={options.torch}"]
    if options.base:
        build += ["--build-arg", f"BASE={options.base}"]
    try:
        if not shutil.which(builder.tool):
            raise CheckError("install Docker or buildah")
        check(builder, build, options.max_gb)
    except (CheckError, httpx.HTTPError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"image-check: {error}") from None


if __name__ == "__main__":
    main()
