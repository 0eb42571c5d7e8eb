"""Fuzz test: Schemathesis checks every operation of the OpenAPI document against a running service.

    python -m benchmarks.reliability.fuzz                               # 100 examples of each kind for each operation
    python -m benchmarks.reliability.fuzz --max-examples 20 --phases fuzzing

Further arguments are passed to ``schemathesis run``. The exit status is that of Schemathesis.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.support import servers
from benchmarks.support.servers import ROOT

# The service cannot pass these checks. They need details that the OpenAPI document does not contain: the existing
# models, the files that are valid images, and the defaults of an empty body.
EXCLUDED_CHECKS = ("positive_data_acceptance", "negative_data_rejection")
# A request may set a deadline that passes before the service has read the request. Then 504 is the right status.
CONFIGURATION = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "schemathesis.toml").write_text(CONFIGURATION)
        server = servers.ours(Path(folder), ROOT / "models_store")
        with server.running():
            url = f"http://127.0.0.1:{server.port}/openapi.json"
            options = ["--checks", "all", "--exclude-checks", ",".join(EXCLUDED_CHECKS), "--max-examples", "100"]
            command = [str(Path(sys.executable).with_name("schemathesis")), "run", url, *options, "--seed", "0"]
            sys.exit(subprocess.run([*command, *sys.argv[1:]], cwd=folder, check=False).returncode)


if __name__ == "__main__":
    main()
