"""Competing servers with the workshop's CNN: how to install, start and call them.

Each server has a file here that follows its documentation, and an environment that is created on first use. All use one
worker, batches of up to 64, and no batching delay where possible. This file also runs in those environments, so it
imports no other packages.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.support.load import Request
from benchmarks.support.servers import ROOT, Server, free_port

SHARED = ("torch>=2.6", "numpy>=1.26", "pillow>=10.3", "safetensors>=0.4.5")
INSTALL_SECONDS = 1200


@dataclass(frozen=True)
class Peer:
    """A server. ``request`` makes its JSON for an image; ``said`` converts its answer to Quartet's format."""

    packages: Sequence[str]
    command: Sequence[str]
    path: str
    ready: str
    request: Callable[[bytes], Any] | None
    said: Callable[[Any], Any] = lambda answer: answer


def text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def tensor(picture: bytes) -> Any:
    """A tensor in the format of the Open Inference Protocol."""
    parameters = {"content_type": "base64"}
    data = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [text(picture)], "parameters": parameters}
    return {"inputs": [data]}


PEERS = {
    "litserve": Peer(
        ["litserve>=0.2.5"],
        ["-m", "benchmarks.peers.lit"],
        "/predict",
        "/health",
        lambda picture: {"image": text(picture)},
    ),
    "bentoml": Peer(
        ["bentoml>=1.4"],
        ["-m", "bentoml", "serve", "benchmarks.peers.bento:Classifier", "--host", "127.0.0.1"],
        "/classify",
        "/readyz",
        lambda picture: {"images": [text(picture)]},
        lambda answer: answer[0],
    ),
    "mlserver": Peer(
        ["mlserver>=1.6"],
        ["-m", "benchmarks.peers.seldon"],
        "/v2/models/cnn/infer",
        "/v2/health/ready",
        tensor,
        lambda answer: json.loads(answer["outputs"][0]["data"][0]),
    ),
    "torchserve": Peer(
        [
            "torchserve>=0.12",
            "torch-model-archiver>=0.12",
            "setuptools<81",
            "pyyaml",
        ],  # the last two it does not ask for
        ["-m", "benchmarks.peers.torch_serve"],
        "/predictions/cnn",
        "/ping",
        request=None,  # takes the picture as it is, as ours does
    ),
}


class Missing(Exception):
    """The server cannot be installed here; the message has the reason."""


def install(name: str, folder: Path) -> Path:
    """Install a server if necessary. Returns the Python of its environment. Raises Missing."""
    python, done = folder / name / "bin" / "python", folder / name / "installed"
    if not done.exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", folder / name], check=True, capture_output=True, text=True)
            command = [str(python), "-m", "pip", "install", "-q", *SHARED, *PEERS[name].packages]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise Missing(f"{name} was not installed in {INSTALL_SECONDS} seconds") from error
        except subprocess.CalledProcessError as error:
            raise Missing(f"{name} cannot be installed: {error.stderr.strip()[-500:]}") from error
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
    }

    def adapt(request: Request) -> Request:
        if peer.request is None:
            return replace(request, path=peer.path)
        return Request(peer.path, json.dumps(peer.request(request.body)).encode())

    log = folder / f"{name}.log"
    return Server(name, [str(python), *peer.command], port, log, environment, peer.ready, adapt, peer.said, peer=True)
