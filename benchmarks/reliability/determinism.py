"""Determinism test: a request gets the same answer alone and under load.

    python -m benchmarks.reliability.determinism                 # 2,000 requests, with 1 and with 64 callers
    python -m benchmarks.reliability.determinism --requests 200 --callers 16

Texts, streams, images and rejections must be equal bit by bit, probabilities and forecasts up to 1e-4; the table also
counts how many of these are equal bit by bit. The program prints a table and a JSON line. The exit status is 1 if an
answer differs.
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
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wanted = mix.asks(options.requests, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        server = servers.ours(Path(folder), ROOT / "models_store")
        server.start()
        try:
            alone = asyncio.run(mix.answers(server.port, wanted, 1))
            crowd = asyncio.run(mix.answers(server.port, wanted, options.callers))
        finally:
            server.stop()
    requested, equal, bits = Counter[str](), Counter[str](), Counter[str]()
    for ask, one, other in zip(wanted, alone, crowd, strict=True):
        requested[ask.kind] += 1
        equal[ask.kind] += mix.same(ask.kind, other, one)
        bits[ask.kind] += one == other
    print("| kind | requests | equal | bit by bit |\n|---|--:|--:|--:|")
    for kind in mix.KINDS:
        print(f"| {kind} | {requested[kind]:,} | {equal[kind]:,} | {bits[kind]:,} |")
    print(json.dumps({"callers": options.callers, "asked": requested, "equal": equal, "bits": bits}))
    sys.exit(equal != requested)


if __name__ == "__main__":
    main()
