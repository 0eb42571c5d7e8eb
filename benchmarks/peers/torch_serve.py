"""The workshop's CNN in TorchServe, with one worker and a batching delay of 1 ms. Needs Java 17.

This file has two purposes. As a program, it packs itself into a model archive and starts TorchServe. The worker of
TorchServe then loads this file from the archive as the request handler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.network import Classifier

classifier = cache(Classifier)


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[dict[str, Any]]:
    """Return one answer for each request body of a batch. The first call has no bodies, and only loads the network."""
    network = classifier()
    return network.predict(torch.stack([network.pixels(row["body"]) for row in data])) if data else []


def configuration(folder: Path, port: int) -> str:
    model = {"defaultVersion": True, "marName": "cnn.mar", "minWorkers": 1, "maxWorkers": 1}
    batches = {"batchSize": 64, "maxBatchDelay": 1, "responseTimeout": 120}
    lines = {
        "inference_address": f"http://127.0.0.1:{port}",
        "management_address": f"http://127.0.0.1:{port + 1}",
        "metrics_address": f"http://127.0.0.1:{port + 2}",
        "grpc_inference_port": str(port + 3),
        "grpc_management_port": str(port + 4),
        "model_store": str(folder),
        "disable_token_authorization": "true",
        "load_models": "cnn.mar",
        "models": json.dumps({"cnn": {"1.0": {**model, **batches}}}),
    }
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def main() -> None:
    folder, binaries = Path(tempfile.mkdtemp(dir=os.environ["PEER_FOLDER"])), Path(sys.executable).parent
    names = ["--model-name", "cnn", "--version", "1.0", "--handler", __file__]
    subprocess.run([binaries / "torch-model-archiver", *names, "--export-path", folder], check=True)
    (folder / "config.properties").write_text(configuration(folder, int(os.environ["PEER_PORT"])))
    folders = {name: str(folder) for name in ("TEMP", "LOG_LOCATION", "METRICS_LOCATION")}
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"  # workers of TorchServe use the first python in PATH
    command = ["torchserve", "--foreground", "--ts-config", str(folder / "config.properties")]
    os.execve(binaries / "torchserve", command, {**os.environ, **folders, "PATH": path})


if __name__ == "__main__":
    main()
