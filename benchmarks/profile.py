"""Show which layers of the service use the CPU, for each kind of request.

    python -m benchmarks profile                                  # about two minutes
    python -m benchmarks profile --only cnn,forecast --callers 64

The program sends requests to one worker with one thread, while py-spy samples the call stack of the worker. Each sample
counts for one layer: the layer of the innermost call whose file is listed in ``LAYERS``. The time of other library
functions counts for the layer that called them.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import uvloop

from benchmarks.support import load, report, servers
from benchmarks.support.servers import ROOT, Server
from benchmarks.support.workloads import Workload, prepare, workloads

ROWS = ("cnn", "cnn-form", "strong", "photo", "text", "forecast", "sample")
RATE = 250  # samples of the stack per second
OTHER = "other"
# A thread waits for work if its innermost call is one of these. Some systems report waiting threads as running.
WAITING = (
    ".run (asyncio/runners.py",  # the event loop, which mostly waits for sockets
    "watch (app/server/process.py",  # looks for a hung event loop at intervals
    ".wait (threading.py",
    "_worker (concurrent/futures/thread.py",
)
# The beginnings of the file names or of the calls of each layer, as py-spy prints them.
LAYERS = {
    "HTTP": ("uvicorn/", "app/server/"),
    "ASGI and middleware": ("starlette/", "fastapi/", "app/api/"),
    "deadlines": ("asyncio/timeouts", "app/api/deadline"),
    "telemetry": ("prometheus_client/", "opentelemetry/", "app/observability/"),
    "logging": ("logging/", "app/observability/access_log", "app/observability/logs"),
    "JSON": ("pydantic/", "app/api/request_body", "app/api/responses"),
    "image files": ("PIL/", "app/tasks/image_codecs"),  # without resizing
    "resizing images": ("Image.resize (PIL/",),
    "inputs and outputs": ("app/tasks/",),
    "queues and batches": ("app/engine/", "app/serving/"),
    "forward": ("torch/", "app/networks/"),
}


def layer(stack: str) -> str:
    """Return the layer of a call stack.

    The calls of the stack have the form ``function (file:line)``. They are separated by ``;``, and the innermost call
    is the last.
    """
    for call in reversed(stack.split(";")):
        file = call.rpartition("(")[2]
        matches = [
            (len(start), name)
            for name, starts in LAYERS.items()
            for start in starts
            if file.startswith(start) or call.startswith(start)
        ]
        if matches:
            return max(matches)[1]  # the longest matching beginning is the most specific one
    return OTHER


def shares(lines: Iterable[str]) -> dict[str, float]:
    """Return the share of each layer in per cent. Each line has a call stack, a space and the number of samples."""
    samples: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rstrip().rpartition(" ")
        if not any(call in stack.rpartition(";")[2] for call in WAITING):
            samples[layer(stack)] += int(count)
    total = samples.total()
    return {name: 100 * samples[name] / total for name in (*LAYERS, OTHER)} if total else {}


async def profile(server: Server, workload: Workload, callers: int, seconds: float, folder: Path) -> list[float]:
    """Return a list: requests per second, CPU milliseconds per request, then the share of each layer in per cent."""
    await load.call(server.port, workload.requests, callers, 0.5)  # warm up
    assert server.process
    file = folder / "stacks"
    options = ["--pid", str(server.process.pid), "--duration", str(max(1, round(seconds))), "--rate", str(RATE)]
    py_spy = str(Path(sys.executable).with_name("py-spy"))
    command = [py_spy, "record", *options, "--format", "raw", "--output", str(file)]
    cpu = server.cpu_seconds()
    spy = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    result = await load.call(server.port, workload.requests, callers, seconds)
    cpu = server.cpu_seconds() - cpu
    _, errors = await spy.communicate()
    if spy.returncode:
        raise SystemExit(f"py-spy failed: {errors.decode().strip()}")
    rate = load.summary(result)["per_second"]
    return [rate, 1000 * cpu / len(result.answers), *shares(file.read_text().splitlines()).values()]


def table(profiles: dict[str, list[float]]) -> report.Table:
    """Return a table with a row for each figure and a column for each kind of request."""
    names = ["requests/s", "CPU ms per request", *(f"{name}, %" for name in (*LAYERS, OTHER))]
    rows = [[name, *(figures[i] for figures in profiles.values())] for i, name in enumerate(names)]
    return report.table("", {"figure": None} | dict.fromkeys(profiles, 2), rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default=",".join(ROWS), help="kinds of requests (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=32, help="clients at the same time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="seconds of each measurement (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    known, rows = workloads(), {}
    with servers.ours(folder, prepare(ROOT / "models_store", folder), "1x1").running() as server:
        for name in options.only.split(","):
            print(f"profiling {name}", file=sys.stderr)
            rows[name] = uvloop.run(profile(server, known[name], options.callers, options.seconds, folder))
    return [table(rows)], []
