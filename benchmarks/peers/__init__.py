"""Install, start and call other model servers, to compare their speed with Quartet.

All servers serve the workshop's CNN. Mosec also serves texts, forecasts and digits. Each server has a module in this
folder, which follows the documentation of the server, and a virtual environment, created on first use. It adds the
server to the packages of this project, so all servers use the same PyTorch. All servers classify images in batches of
up to 64, if possible with one worker and without a batching delay. Programs in these virtual environments also import
this file.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.support.load import Request
from benchmarks.support.servers import ROOT, Server, free_port

CLASSIFY = "/v1/images/classify"
FOLDER = Path.home() / ".cache" / "quartet-peers"


@dataclass(frozen=True)
class Peer:
    """Describes how to install, start and call one server.

    ``paths`` maps Quartet's paths to the server's paths. ``request`` returns the JSON body that the server expects for
    an image file. If ``request`` is None, the server takes the same bodies as Quartet.
    """

    packages: Sequence[str]
    module: str
    ready: str
    paths: Mapping[str, str]
    request: Callable[[bytes], Any] | None = None
    workloads: Sequence[str] = ("cnn",)
    environment: Mapping[str, str] = field(default_factory=dict)


def mosec(workers: int) -> Peer:
    """Return mosec with ``workers`` processes for each route."""
    paths = {
        CLASSIFY: "/classify",
        "/v1/series/forecast": "/forecast",
        "/v1/text/continue": "/text",
        "/v1/images/sample": "/digits",
    }
    workloads = ("cnn", "forecast", "text", "sample")
    return Peer(["mosec>=0.9"], "mosec_server", "/", paths, None, workloads, {"PEER_WORKERS": str(workers)})


PEERS = {
    "litserve": Peer(
        ["litserve>=0.2.5"],
        "lit",
        "/health",
        {CLASSIFY: "/predict"},
        lambda picture: {"image": base64.b64encode(picture).decode()},
    ),
    "torchserve": Peer(
        # TorchServe does not declare its dependencies setuptools and pyyaml.
        ["torchserve>=0.12", "torch-model-archiver>=0.12", "setuptools<81", "pyyaml"],
        "torch_serve",
        "/ping",
        {CLASSIFY: "/predictions/cnn"},
    ),
    "mosec": mosec(1),
    "mosec-x2": mosec(2),
}


def install(name: str) -> Path:
    """Install a server if necessary, and return the Python interpreter of its environment."""
    home = FOLDER / name.partition("-")[0]  # variants of a server share its environment
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        print(f"installing {name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[name].packages], check=True)
        (home / "installed").touch()
    (site,) = home.glob("lib/python*/site-packages")
    (site / "quartet.pth").write_text(sysconfig.get_paths()["purelib"])  # the packages of this environment
    return python


def server(name: str, folder: Path, store: Path) -> Server:
    peer, port = PEERS[name], free_port()
    environment = {"PYTHONPATH": ROOT, "QUARTET_STORE": store, "PEER_FOLDER": folder, "PEER_PORT": port}

    def adapt(request: Request) -> Request:
        path = peer.paths[request.path.partition("?")[0]]
        if peer.request is None:
            return replace(request, path=path)
        return Request(path, json.dumps(peer.request(request.body)).encode())

    return Server(
        name,
        [str(install(name)), "-m", f"benchmarks.peers.{peer.module}"],
        port,
        folder / f"{name}.log",
        {key: str(value) for key, value in environment.items()} | dict(peer.environment),
        peer.ready,
        adapt,
        peer.workloads,
    )
