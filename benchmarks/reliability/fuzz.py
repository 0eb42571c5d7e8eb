"""Schemathesis over the OpenAPI document: every check, on every operation, against a service that it starts.

    python -m benchmarks.reliability.fuzz                               # 100 examples of each kind for each operation
    python -m benchmarks.reliability.fuzz --max-examples 20 --phases fuzzing

What follows is given to ``schemathesis run``, whose exit status is its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.support import servers
from benchmarks.support.servers import ROOT

# What a document cannot say: names of models, shapes of files, and that an empty body means the defaults.
OTHERWISE = ("positive_data_acceptance", "negative_data_rejection")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = servers.ours(Path(folder), ROOT / "models_store")
        server.start()
        try:
            url = f"http://127.0.0.1:{server.port}/openapi.json"
            options = ["--checks", "all", "--exclude-checks", ",".join(OTHERWISE), "--max-examples", "100"]
            command = [str(Path(sys.executable).with_name("schemathesis")), "run", url, *options, "--seed", "0"]
            sys.exit(subprocess.run([*command, *sys.argv[1:]], cwd=folder, check=False).returncode)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
