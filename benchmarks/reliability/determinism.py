"""Whether a request is answered alike alone and in a crowd.

    python -m benchmarks.reliability.determinism                 # 2,000 requests of all kinds, alone and among 64
    python -m benchmarks.reliability.determinism --requests 200 --callers 16

Texts, streams, images and refusals must be equal to the last bit, probabilities and forecasts to 1e-4 (how many of
those are equal to the last bit too is told). Prints a table and a JSON line; ends with 1 when an answer differs.
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
    asked, equal, bits = Counter[str](), Counter[str](), Counter[str]()
    for ask, one, other in zip(wanted, alone, crowd, strict=True):
        asked[ask.kind] += 1
        equal[ask.kind] += mix.same(ask.kind, other, one)
        bits[ask.kind] += one == other
    print("| kind | requests | equal | to the bit |\n|---|--:|--:|--:|")
    for kind in mix.KINDS:
        print(f"| {kind} | {asked[kind]:,} | {equal[kind]:,} | {bits[kind]:,} |")
    print(json.dumps({"callers": options.callers, "asked": asked, "equal": equal, "bits": bits}))
    sys.exit(equal != asked)


if __name__ == "__main__":
    main()
