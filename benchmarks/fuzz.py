"""Fuzz test: Schemathesis checks every operation of the OpenAPI document against a running service.

python -m benchmarks fuzz                       # 100 examples of each kind for each operation
python -m benchmarks fuzz --max-examples 5
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.support import report, servers

# The service cannot pass these checks. They need details that the OpenAPI document does not contain: the existing
# models, the files that are valid images, and the defaults of an empty body.
EXCLUDED_CHECKS = "positive_data_acceptance,negative_data_rejection"
# A request may set a deadline that passes before the service has read the request. Then 504 is the right status.
CONFIGURATION = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-examples", type=int, default=100, help="examples of each kind (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    with servers.ours(folder).running() as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        arguments = ["--checks", "all", "--exclude-checks", EXCLUDED_CHECKS, "--seed", "0", "--no-color"]
        arguments += ["--max-examples", str(options.max_examples)]
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", url, *arguments]
        result = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    (generated,) = re.findall(r"(\d+) generated", result.stdout) or ["0"]
    failed = re.findall(r"(\d+) found|(\d+) unique failures", result.stdout)
    table = report.figures(("generated requests", int(generated), "requests"), ("failures", len(failed), "failures"))
    return [table], ["Schemathesis found failures"] if result.returncode else []
