"""Determinism test: a request gets the same answer alone and under load.

    python -m benchmarks determinism                 # 2,000 requests, with 1 and with 64 callers
    python -m benchmarks determinism --requests 200 --callers 16

Texts, streams, generated images and error answers must be equal bit by bit. Probabilities and forecasts may differ by
1e-4. The test fails if two answers differ by more.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from pathlib import Path

from benchmarks.support import mix, report, servers


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=2000, help="number of requests (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=64, help="callers in the second run (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    requests = mix.requests(options.requests, seed=0)
    with servers.ours(folder).running() as server:
        alone = asyncio.run(mix.expected_answers(server.port, requests))
        concurrent = asyncio.run(mix.answers(server.port, requests, options.callers))
    counts, identical, different = Counter[bool](), Counter[bool](), Counter[str]()
    for request, single, other in zip(requests, alone, concurrent, strict=True):
        exact = request.kind in mix.EXACT
        counts[exact] += 1
        identical[exact] += single == other
        different[request.kind] += not mix.same(request.kind, other, single)
    table = report.figures(
        (f"requests, sent alone and {options.callers} at a time, through all protocols", len(requests), "requests"),
        ("texts, streams, images and errors that differ in a byte", counts[True] - identical[True], "answers"),
        ("probabilities and forecasts", counts[False], "answers"),
        ("probabilities and forecasts with identical bytes", identical[False], "answers"),
        (f"answers that differ by more than {mix.TOLERANCE}", different.total(), "answers"),
    )
    return [table], [f"{number} answers of the kind {kind} differ" for kind, number in different.items() if number]
