"""Install, start and call other model servers, to compare their speed with Quartet.

All servers serve the workshop's CNN. Mosec also serves texts, forecasts and digits. Each server has a module in this
folder, which follows the documentation of the server. Each server also has a virtual environment, created on first use.
All servers classify images in batches of up to 64. If possible, they use one worker and no batching delay. Only the
variants of mosec and Triton use two workers or a longer delay. Programs in these virtual environments also import this
file, so it imports only the standard library and modules of this project.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.support.load import Request
from benchmarks.support.servers import ROOT, Server, free_port

SHARED = ("torch>=2.6", "numpy>=1.26", "pillow>=10.3", "safetensors>=0.4.5")
CLASSIFY = "/v1/images/classify"
INSTALL_SECONDS = 1200


@dataclass(frozen=True)
class Peer:
    """Describes how to install, start and call one competing server.

    ``paths`` maps Quartet's paths to the server's paths. ``request`` returns the JSON body that the server expects for
    an image file. If ``request`` is None, the server takes the same bodies as Quartet. ``convert`` converts the
    server's answer to Quartet's format. ``python`` is the interpreter that creates the virtual environment.
    """

    packages: Sequence[str]
    command: Sequence[str]
    ready: str
    paths: Mapping[str, str]
    request: Callable[[bytes], Any] | None = None
    convert: Callable[[Any], Any] = lambda answer: answer
    workloads: Sequence[str] = ("cnn",)
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable


def text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def tensor(picture: bytes) -> Any:
    """Return an image file as a tensor in the format of the Open Inference Protocol."""
    parameters = {"content_type": "base64"}
    data = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [text(picture)], "parameters": parameters}
    return {"inputs": [data]}


def mosec(workers: int, wait: int) -> Peer:
    """Return mosec with ``workers`` processes for each route, and a batching delay of ``wait`` milliseconds."""
    paths = {
        CLASSIFY: "/classify",
        "/v1/series/forecast": "/forecast",
        "/v1/text/continue": "/text",
        "/v1/images/sample": "/digits",
    }
    environment = {"PEER_WORKERS": str(workers), "PEER_WAIT": str(wait)}
    command = ["-m", "benchmarks.peers.mosec_server"]
    workloads = ("cnn", "forecast", "text", "sample")
    return Peer(["mosec>=0.9"], command, "/", paths, workloads=workloads, environment=environment)


def triton(workers: int) -> Peer:
    """Return the server Triton with ``workers`` Python processes.

    PyTriton contains a Python interpreter. It needs a standard library of the same version, such as Debian's 3.11.2.
    """
    return Peer(
        ["nvidia-pytriton==0.7.0"],
        ["-m", "benchmarks.peers.triton"],
        "/v2/models/cnn/ready",
        {CLASSIFY: "/v2/models/cnn/infer"},
        tensor,
        lambda answer: json.loads(answer["outputs"][0]["data"][0]),
        environment={"PEER_WORKERS": str(workers)},
        python="/usr/bin/python3.11",
    )


PEERS = {
    "litserve": Peer(
        ["litserve>=0.2.5"],
        ["-m", "benchmarks.peers.lit"],
        "/health",
        {CLASSIFY: "/predict"},
        lambda picture: {"image": text(picture)},
    ),
    "bentoml": Peer(
        ["bentoml>=1.4"],
        ["-m", "bentoml", "serve", "benchmarks.peers.bento:Classifier", "--host", "127.0.0.1"],
        "/readyz",
        {CLASSIFY: "/classify"},
        lambda picture: {"images": [text(picture)]},
        lambda answer: answer[0],
    ),
    "mlserver": Peer(
        ["mlserver>=1.6"],
        ["-m", "benchmarks.peers.seldon"],
        "/v2/health/ready",
        {CLASSIFY: "/v2/models/cnn/infer"},
        tensor,
        lambda answer: json.loads(answer["outputs"][0]["data"][0]),
    ),
    "torchserve": Peer(
        # TorchServe does not declare its dependencies setuptools and pyyaml.
        ["torchserve>=0.12", "torch-model-archiver>=0.12", "setuptools<81", "pyyaml"],
        ["-m", "benchmarks.peers.torch_serve"],
        "/ping",
        {CLASSIFY: "/predictions/cnn"},
    ),
    "mosec": mosec(1, 0),
    "mosec-1ms": mosec(1, 1),
    "mosec-x2": mosec(2, 0),
    "mosec-x2-1ms": mosec(2, 1),
    "triton": triton(1),
    "triton-x2": triton(2),
}


class NotInstallable(Exception):
    """Raised if a server cannot be installed on this machine. The message contains the reason."""


def install(name: str, folder: Path) -> Path:
    """Install a server if necessary, and return the Python interpreter of its environment. Raises NotInstallable."""
    home = folder / name.partition("-")[0]  # variants of a server share its environment
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        try:
            subprocess.run([PEERS[name].python, "-m", "venv", home], check=True, capture_output=True, text=True)
            command = [str(python), "-m", "pip", "install", "-q", *SHARED, *PEERS[name].packages]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise NotInstallable(f"{name} was not installed in {INSTALL_SECONDS} seconds") from error
        except OSError as error:
            raise NotInstallable(f"{name} cannot be installed: {error}") from error
        except subprocess.CalledProcessError as error:
            raise NotInstallable(f"{name} cannot be installed: {error.stderr.strip()[-500:]}") from error
        done.touch()
    return python


def server(name: str, python: Path, folder: Path, store: Path) -> Server:
    peer, port = PEERS[name], free_port()
    environment = {
        "PYTHONPATH": str(ROOT),
        "PEER_STORE": str(store),
        "PEER_FOLDER": str(folder),
        "PEER_PORT": str(port),
        "BENTOML_PORT": str(port),
        "BENTOML_DO_NOT_TRACK": "1",
        **peer.environment,
    }

    def adapt(request: Request) -> Request:
        path = peer.paths[request.path.partition("?")[0]]
        if peer.request is None:
            return replace(request, path=path)
        return Request(path, json.dumps(peer.request(request.body)).encode())

    log = folder / f"{name}.log"
    command = [str(python), *peer.command]
    return Server(name, command, port, log, environment, peer.ready, adapt, peer.convert, peer.workloads)
