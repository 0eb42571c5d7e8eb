"""Build the container image and run it, either with Docker or with buildah and chroot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGE = "localhost/quartet-check"
EXIT_SECONDS = 45.0  # the stop_grace_period in docker-compose.yml


class CheckError(Exception):
    """Raised if a check of the image fails, or if a command that the check needs fails."""


def run(*command: str, timeout: float | None = None, check: bool = True) -> str:
    """Run a command, and return what it wrote to standard output.

    Raises:
        CheckError: the command failed.
    """
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if check and result.returncode:
        lines = "\n".join((result.stdout + result.stderr).splitlines()[-30:])
        raise CheckError(f"{' '.join(command)}: exit status {result.returncode}\n{lines}")
    return result.stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Docker:
    """Builds and runs the image with Docker."""

    tool = "docker"

    def build(self, options: Sequence[str]) -> None:
        run("docker", "build", "--tag", IMAGE, *options, str(ROOT))

    def megabytes(self) -> float:
        return int(run("docker", "image", "inspect", "--format", "{{.Size}}", IMAGE)) / 1e6

    @contextmanager
    def container(self) -> Iterator[DockerContainer]:
        container = DockerContainer(free_port())
        try:
            yield container
        finally:
            run("docker", "rm", "--force", container.name, check=False)


class DockerContainer:
    """A running container of the image. Its service listens on ``port`` of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.name = f"quartet-check-{os.getpid()}"
        publish = f"127.0.0.1:{port}:8000"
        hardening = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true")
        run("docker", "run", "--detach", "--name", self.name, "--publish", publish, *hardening, IMAGE)

    def is_healthy(self) -> bool:
        """Return whether the image's health check succeeds."""
        return run("docker", "inspect", "--format", "{{.State.Health.Status}}", self.name).strip() == "healthy"

    def succeeds(self, *command: str) -> bool:
        """Run a command in the container, and return whether its exit status is 0."""
        return subprocess.run(("docker", "exec", self.name, *command), capture_output=True, check=False).returncode == 0

    def stop(self) -> int:
        """Send SIGTERM to the service, and return its exit status."""
        run("docker", "stop", "--time", str(int(EXIT_SECONDS)), self.name)
        return int(run("docker", "inspect", "--format", "{{.State.ExitCode}}", self.name))

    def output(self) -> str:
        """Return the last lines that the service wrote."""
        result = subprocess.run(
            ("docker", "logs", "--tail", "30", self.name), capture_output=True, text=True, check=False
        )
        return result.stdout + result.stderr


@dataclass
class Buildah:
    """Builds the image with buildah, and runs its service with chroot."""

    tool = "buildah"
    # vfs works without overlay file systems and user namespaces, which may be missing inside a container.
    storage = ("buildah", "--storage-driver", "vfs")

    def build(self, options: Sequence[str]) -> None:
        # The image is stored in the Docker format, because the OCI format cannot contain a health check.
        limits = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=96000:96000")
        run(
            *self.storage,
            "bud",
            "--isolation",
            "chroot",
            "--format",
            "docker",
            *limits,
            "--tag",
            IMAGE,
            *options,
            str(ROOT),
        )

    def megabytes(self) -> float:
        with self._mounted() as folder:
            return int(run("du", "-sb", "--one-file-system", str(folder)).split()[0]) / 1e6

    @contextmanager
    def container(self) -> Iterator[ChrootContainer]:
        details = json.loads(run(*self.storage, "inspect", "--type", "image", IMAGE))
        with self._mounted() as folder, tempfile.TemporaryFile("w+") as log:
            container = ChrootContainer(folder, details["Docker"]["config"], log)
            try:
                yield container
            finally:
                container.process.kill()
                container.process.wait()

    @contextmanager
    def _mounted(self) -> Iterator[Path]:
        """Mount the image's file system, and yield its folder."""
        name = run(*self.storage, "from", "--pull=false", IMAGE).strip()
        try:
            yield Path(run(*self.storage, "mount", name).strip())
        finally:
            run(*self.storage, "umount", name, check=False)
            run(*self.storage, "rm", name, check=False)


# A shell script that mounts the file system read-only, as ``docker run --read-only`` does, and then runs a command.
ENTER = """
set -e
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t tmpfs -o size=64m tmpfs "$1/dev/shm"
mount -o remount,ro,bind "$1"
user=$2
root=$1
shift 2
exec chroot --userspec="$user" "$root" "$@"
"""


class ChrootContainer:
    """The same for a service that runs with chroot."""

    def __init__(self, folder: Path, config: dict[str, Any], log: Any) -> None:
        self.port = free_port()
        self._log = log
        variables = [*config["Env"], f"QUARTET_PORT={self.port}", "QUARTET_HOST=127.0.0.1"]
        inside = ("env", "-i", "-C", config["WorkingDir"], *variables)
        self._enter = ("unshare", "--mount", "sh", "-c", ENTER, "enter", str(folder), config["User"], *inside)
        self._health_check = config["Healthcheck"]["Test"][1:]  # after "CMD"
        self.process = subprocess.Popen((*self._enter, *config["Cmd"]), stdout=log, stderr=subprocess.STDOUT)

    def is_healthy(self) -> bool:
        if (status := self.process.poll()) is not None:
            raise CheckError(f"the service ended with exit status {status}")
        return self.succeeds(*self._health_check)

    def succeeds(self, *command: str) -> bool:
        return subprocess.run((*self._enter, *command), capture_output=True, check=False).returncode == 0

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(EXIT_SECONDS)

    def output(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-30:])
