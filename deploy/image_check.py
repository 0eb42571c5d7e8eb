"""Build the container image, run it as a deployment would, and check it: ``make image-check``.

The container runs read-only as the image's user. The check waits for the image's health check, sends one request to
each model, sends SIGTERM and expects exit status 0. It prints the size of the image and how long each step took.

Docker builds and runs the image if it is installed. Without Docker, buildah builds it and chroot runs it; this needs
root. Where no registry can be reached, ``--make-base`` makes the base image from Debian packages and from the Python
that runs this script.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

ROOT = Path(__file__).parents[1]
IMAGE = "localhost/quartet-check"
BASE_IMAGE = "localhost/quartet-base"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PHOTO = ROOT / "tests" / "images" / "cifar10" / "0013-horse.png"
MAX_GIGABYTES = 1.2  # uncompressed, with PyTorch for CPUs
READY_SECONDS = 120.0
EXIT_SECONDS = 45.0  # docker-compose.yml's stop_grace_period

# Shared libraries of CPython and PyTorch, and the certificates for downloads during the build.
DEBIAN_PACKAGES = (
    "ca-certificates,passwd,libbz2-1.0,libffi8,libgomp1,liblzma5,libreadline8t64,libsqlite3-0,libssl3t64,zlib1g"
)
# Not needed by the service; python:slim has none of them either.
UNUSED_DEBIAN = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists")
UNUSED_PYTHON = ("test", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages", "config-*")


class CheckError(Exception):
    """The image, or a step of the check, is faulty."""


class Container(Protocol):
    """A running container of the image. The service listens on ``port`` of this machine."""

    port: int

    def is_healthy(self) -> bool:
        """Run the image's health check."""

    def succeeds(self, *command: str) -> bool:
        """Run a command in the container. Returns whether its exit status is 0."""

    def stop(self) -> int:
        """Send SIGTERM. Returns the exit status."""

    def output(self) -> str:
        """The last lines that the service wrote."""


def run(*command: str, timeout: float | None = None, check: bool = True) -> str:
    """Run a command. Returns what it wrote to standard output.

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
    """Builds and runs with Docker."""

    tool = "docker"

    def build(self, options: Sequence[str]) -> None:
        run("docker", "build", "--tag", IMAGE, *options, str(ROOT))

    def megabytes(self) -> float:
        return int(run("docker", "image", "inspect", "--format", "{{.Size}}", IMAGE)) / 1e6

    @contextmanager
    def container(self) -> Iterator[Container]:
        container = DockerContainer(free_port())
        try:
            yield container
        finally:
            run("docker", "rm", "--force", container.name, check=False)


class DockerContainer:
    def __init__(self, port: int) -> None:
        self.port = port
        self.name = f"quartet-check-{os.getpid()}"
        publish = f"127.0.0.1:{port}:8000"
        hardening = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true")
        run("docker", "run", "--detach", "--name", self.name, "--publish", publish, *hardening, IMAGE)

    def is_healthy(self) -> bool:
        return run("docker", "inspect", "--format", "{{.State.Health.Status}}", self.name).strip() == "healthy"

    def succeeds(self, *command: str) -> bool:
        return subprocess.run(("docker", "exec", self.name, *command), capture_output=True, check=False).returncode == 0

    def stop(self) -> int:
        run("docker", "stop", "--time", str(int(EXIT_SECONDS)), self.name)
        return int(run("docker", "inspect", "--format", "{{.State.ExitCode}}", self.name))

    def output(self) -> str:
        result = subprocess.run(
            ("docker", "logs", "--tail", "30", self.name), capture_output=True, text=True, check=False
        )
        return result.stdout + result.stderr


@dataclass
class Buildah:
    """Builds with buildah, and runs the image's file system with chroot."""

    tool = "buildah"
    # Neither overlay file systems nor user namespaces are available everywhere, for example inside a container.
    storage = ("buildah", "--storage-driver", "vfs")

    def build(self, options: Sequence[str]) -> None:
        # The Docker format keeps the health check; the OCI format has none.
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
    def container(self) -> Iterator[Container]:
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
        """The image's file system."""
        name = run(*self.storage, "from", "--pull=false", IMAGE).strip()
        try:
            yield Path(run(*self.storage, "mount", name).strip())
        finally:
            run(*self.storage, "umount", name, check=False)
            run(*self.storage, "rm", name, check=False)


# Mounts the root file system read-only, as ``docker run --read-only`` does, and then becomes the given command.
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


def make_base(suite: str, mirror: str) -> None:
    """Make the base image from Debian packages and the Python that runs this script.

    Raises:
        CheckError: debootstrap or buildah failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        run("debootstrap", "--variant=minbase", f"--include={DEBIAN_PACKAGES}", suite, str(root), mirror)
        for name in UNUSED_DEBIAN:
            shutil.rmtree(root / name, ignore_errors=True)
        copy_python(Path(sys.base_prefix), root / "usr" / "local")
        run("chroot", str(root), "ldconfig")
        if Path(CERTIFICATES).exists():  # this machine may trust further certificates, for example a proxy's
            shutil.copyfile(CERTIFICATES, root / CERTIFICATES.lstrip("/"))
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = f"ENV PATH={path} SSL_CERT_FILE={CERTIFICATES}"
        (Path(scratch) / "Dockerfile").write_text(f"FROM scratch\nCOPY root /\n{environment}\n")
        run(*Buildah.storage, "bud", "--isolation", "chroot", "--tag", BASE_IMAGE, scratch)


def copy_python(prefix: Path, target: Path) -> None:
    """Copy the interpreter, its library and pip from ``prefix`` to ``target``."""
    version = f"python{sysconfig.get_python_version()}"
    library = target / "lib" / version
    ignored = shutil.ignore_patterns("__pycache__", *UNUSED_PYTHON)
    shutil.copytree(prefix / "lib" / version, library, ignore=ignored, symlinks=True)
    for shared in (prefix / "lib").glob("libpython*.so*"):
        shutil.copy2(shared, target / "lib", follow_symlinks=False)
    (target / "bin").mkdir(exist_ok=True)
    shutil.copy2(prefix / "bin" / version, target / "bin" / version)
    for name in ("python", "python3"):
        (target / "bin" / name).symlink_to(version)
    packages = prefix / "lib" / version / "site-packages"
    for name in ("pip", *(path.name for path in packages.glob("pip-*.dist-info"))):
        shutil.copytree(packages / name, library / "site-packages" / name)


@contextmanager
def wheel_options(folder: Path) -> Iterator[list[str]]:
    """Build options that let the build install PyTorch from the wheels in ``folder``."""
    with tempfile.TemporaryDirectory() as scratch:
        pins = [re.sub(r"^([^-]+)-([^-+]+).*", r"\1==\2", wheel.name) for wheel in folder.glob("*.whl")]
        (Path(scratch) / "constraints.txt").write_text("\n".join(pins) + "\n")
        yield [
            *("--volume", f"{folder.resolve()}:/wheels:ro", "--volume", f"{scratch}:/constraints:ro"),
            *("--env", "UV_FIND_LINKS=/wheels", "--env", "UV_CONSTRAINT=/constraints/constraints.txt"),
            *("--build-arg", "TORCH="),
        ]


def wait_until(condition: Callable[[], bool], seconds: float, description: str) -> float:
    """Wait for ``condition``. Returns how many seconds it took.

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
    """Send one request to each model. Returns the names of the models.

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
            raise CheckError(f"{model['id']} is {model['state']}: {model['broken']}")
        path, body = bodies[model["task"]]
        name = {"model": model["id"]}
        if model["task"] == "classify":  # its options are query parameters
            response = client.post(path, params=name, json=body)
        else:
            response = client.post(path, json={**body, **name})
        if response.status_code != 200:
            raise CheckError(f"{model['id']}: POST {path} returned {response.status_code}: {response.text[:300]}")
        names.append(model["id"])
    if missing := bodies.keys() - {model["task"] for model in models}:
        raise CheckError(f"the image has no model for {', '.join(sorted(missing))}")
    return names


def check_compose_file() -> None:
    """Let a Compose implementation read docker-compose.yml with all profiles.

    Raises:
        CheckError: the file is invalid, or no implementation is installed.
    """
    profiles = [option for profile in ("gpu", "monitoring", "scale") for option in ("--profile", profile)]
    for command in (("docker", "compose"), ("docker-compose",), ("podman-compose",)):
        if not shutil.which(command[0]) or (command == ("docker", "compose") and not has_compose_plugin()):
            continue
        run(*command, "--file", str(ROOT / "docker-compose.yml"), *profiles, "config")
        print(f"docker-compose.yml: valid for {' '.join(command)}", flush=True)
        return
    raise CheckError("install Docker Compose, docker-compose or podman-compose")


def has_compose_plugin() -> bool:
    return subprocess.run(("docker", "compose", "version"), capture_output=True, check=False).returncode == 0


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


def check_container(container: Container) -> None:
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
    parser.add_argument("--base", help="base image (default: that of the Dockerfile)")
    parser.add_argument("--make-base", action="store_true", help="make the base image with debootstrap")
    parser.add_argument("--suite", default="trixie", help="Debian release of --make-base (default: trixie)")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="Debian mirror of --make-base")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of PyTorch, to install instead of a download")
    options = parser.parse_args(arguments)
    builder = Docker() if shutil.which("docker") else Buildah()
    build = ["--build-arg", f"TORCH={options.torch}"]
    try:
        if not shutil.which(builder.tool):
            raise CheckError("install Docker, or buildah and debootstrap")
        if isinstance(builder, Docker) and (options.make_base or options.wheels):
            raise CheckError("--make-base and --wheels need buildah; Docker is used where it is installed")
        with ExitStack() as stack:
            if options.make_base:
                make_base(options.suite, options.mirror)
                options.base = BASE_IMAGE
            if options.base:
                build += ["--build-arg", f"BASE={options.base}"]
            if options.wheels:
                build += stack.enter_context(wheel_options(options.wheels))
            check(builder, build, options.max_gb)
    except (CheckError, httpx.HTTPError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"image-check: {error}") from None


if __name__ == "__main__":
    main()
