"""Determinism test: check that a request gets the same answer alone and under load.

    python -m benchmarks.reliability.determinism                 # 2,000 requests, with 1 and with 64 callers
    python -m benchmarks.reliability.determinism --requests 200 --callers 16

The two answers to a request must be equal. Texts, streams, generated images and error answers must be equal bit by bit.
Probabilities and forecasts may differ by 1e-4. The program prints a table and a JSON line. For each kind of request,
the table counts the answers that are equal within these limits, and the answers that are equal bit by bit. If two
answers are not equal, the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.support import mix, servers
from benchmarks.support.servers import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="number of requests (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=64, help="callers in the second run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: %(default)s)")
    options = parser.parse_args()
    requests = mix.requests(options.requests, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        server = servers.ours(Path(folder), ROOT / "models_store")
        with server.running():
            alone = asyncio.run(mix.expected_answers(server.port, requests))
            concurrent = asyncio.run(mix.answers(server.port, requests, options.callers))
    counts, equal, identical = Counter[str](), Counter[str](), Counter[str]()
    for request, single, other in zip(requests, alone, concurrent, strict=True):
        counts[request.kind] += 1
        equal[request.kind] += mix.same(request.kind, other, single)
        identical[request.kind] += single == other
    print("| kind | requests | equal | bit by bit |\n|---|--:|--:|--:|")
    for kind in mix.KINDS:
        print(f"| {kind} | {counts[kind]:,} | {equal[kind]:,} | {identical[kind]:,} |")
    print(json.dumps({"callers": options.callers, "requests": counts, "equal": equal, "identical": identical}))
    sys.exit(equal != counts)


if __name__ == "__main__":
    main()
