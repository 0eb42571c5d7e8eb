"""Fuzz test: Schemathesis checks every operation of the OpenAPI document against a running service.

python -m benchmarks fuzz                       # 100 examples of each kind for each operation
python -m benchmarks fuzz --max-examples 5
"""

from __future__ import annotations

import argparse
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.support import report, servers
from benchmarks.support.servers import ROOT

# The service cannot pass these checks. They need details that the OpenAPI document does not contain: the existing
# models, the files that are valid images, and the defaults of an empty body. The admin key is a header of all requests,
# so that none is without it.
EXCLUDED_CHECKS = "positive_data_acceptance,negative_data_rejection,ignored_auth"
# A request may set a deadline that passes before the service has read the request. Then 504 is the right status.
CONFIGURATION = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-examples", type=int, default=100, help="examples of each kind (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    key, store = secrets.token_hex(16), folder / "store"
    shutil.copytree(ROOT / "models_store", store)
    models, records = "cifar10-whitened,series-lstm,shakespeare-rnn", folder / "records"
    service = servers.ours(folder, store, admin_key=key, records_folder=records, capture=models)
    with service.running() as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        arguments = f"--checks all --exclude-checks {EXCLUDED_CHECKS} --seed 0 --no-color --request-timeout 60".split()
        arguments += ["-H", f"authorization: Bearer {key}", "--max-examples", str(options.max_examples)]
        arguments += ["--exclude-path", "/v1/admin/import"]  # Schemathesis makes no ZIP files
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", url, *arguments]
        result = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    (generated,) = re.findall(r"(\d+) generated", result.stdout) or ["0"]
    failed = re.findall(r"(\d+) found|(\d+) unique failures", result.stdout)
    table = report.figures(("generated requests", int(generated), "requests"), ("failures", len(failed), "failures"))
    return [table], ["Schemathesis found failures"] if result.returncode else []
