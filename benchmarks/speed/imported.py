"""Compare the speed of the workshop's CNN as an imported ONNX file and as a native version.

    python -m benchmarks.speed.imported                                  # about two minutes

The native version is the version that Quartet trained. The service runs with the settings of ``make serve``. Each round
measures every version once, in rotating order. The column "time" shows the time of a request relative to the native
version: the request rate of the native version divided by the rate of the imported version.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from app.exporting.files import to_onnx
from app.importing.add import Description, add
from app.store import Store
from benchmarks.speed.serving import progress, rotated
from benchmarks.support import load, servers
from benchmarks.support.load import Request
from benchmarks.support.report import Results, number, ratio
from benchmarks.support.servers import ROOT, Server

NATIVE = "cifar10-lenet"
IMPORTED = "lenet-onnx"
WORK = "image"
CALLERS = (1, 64)
MAX_BYTES = 2**24


def prepare(folder: Path) -> Path:
    """Create a store with the native version and its imported copy in ``folder``, and return its path."""
    models = folder / "store"
    shutil.copytree(ROOT / "models_store" / NATIVE, models / NATIVE)
    version = Store(models).read(NATIVE, 1)
    path = folder / "net.onnx"
    path.write_bytes(to_onnx(version))
    options = {"softmax": False, "interpolation": "bicubic"}  # the file contains the softmax
    description = Description(IMPORTED, task="classify", options=options, labels=version.card.labels)
    add(models, path, description, MAX_BYTES, speed_seconds=0.5)
    return models


def request(model: str) -> Request:
    picture = (ROOT / "tests/images/cifar10/0013-horse.png").read_bytes()
    return Request(f"/v1/images/classify?top_k=10&model={model}", picture, "image/png")


async def largest_difference(server: Server) -> dict[str, float]:
    """Return the largest difference between probabilities of the imported and of the native version."""
    answers = {}
    for model in (NATIVE, IMPORTED):
        answer = await load.send(server.port, request(model))
        if answer.status != 200:
            raise SystemExit(f"{model}: status {answer.status}: {answer.body[:300]!r}")
        predictions = json.loads(answer.body)["results"][0]["predictions"]
        answers[model] = {each["label"]: each["probability"] for each in predictions}
    native = answers.pop(NATIVE)
    return {
        model: max(abs(probability - native[label]) for label, probability in own.items())
        for model, own in answers.items()
    }


async def measure(server: Server, results: Results, options: argparse.Namespace, callers: int, turn: int) -> None:
    """Measure each version once with ``callers`` callers. The order of the versions depends on the round ``turn``."""
    generator = load.wrk if load.has_wrk() else load.measure
    for model, message in rotated([(model, request(model)) for model in (NATIVE, IMPORTED)], turn):
        progress(f"{callers} callers, round {turn + 1} of {options.rounds}: {model}")
        await load.call(server.port, [message], callers, 0.3)
        cpu, started = server.cpu_seconds(), time.perf_counter()
        figures = await generator(server.port, [message], callers, options.seconds)
        figures["cpu"] = (server.cpu_seconds() - cpu) / (time.perf_counter() - started)
        results.add(WORK, model, callers, figures)


def table(results: Results, differences: dict[str, float]) -> str:
    lines = ["| version | callers | requests/s | time, of native's | p50 ms | p99 ms | errors | largest difference |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for callers in CALLERS:
        for model in (NATIVE, IMPORTED):
            rates = (results.median(WORK, each, callers, "per_second") for each in (NATIVE, model))
            native, rate = rates
            cells = [number(rate, 0), number(ratio(native, rate), 2)]
            cells += [number(results.median(WORK, model, callers, key), 2) for key in ("p50", "p99")]
            cells.append(number(sum(results.values(WORK, model, callers, "errors")), 0))
            lines.append(f"| {model} | {callers} | {' | '.join(cells)} | {differences.get(model, 0):.1g} |")
    return "\n".join(lines)


async def bench(options: argparse.Namespace, server: Server) -> None:
    results, differences = Results(), await largest_difference(server)
    for callers in CALLERS:
        for turn in range(options.rounds):
            await measure(server, results, options, callers, turn)
    print(table(results, differences), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compare the speed of the workshop's CNN as ONNX and as a native version."
    )
    parser.add_argument("--seconds", type=float, default=3, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each version (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="quartet-bench-") as name:
        server = servers.ours(Path(name), prepare(Path(name)))
        with server.running():
            uvloop.run(bench(options, server))


if __name__ == "__main__":
    main()
