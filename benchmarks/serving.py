"""Measure the service under load, and compare it with other servers that have the same networks.

    python -m benchmarks serving                                       # everything, about twenty minutes
    python -m benchmarks serving --only cnn --callers 1,64 --seconds 2 --rounds 1
    python -m benchmarks serving --servers ours,plain,mosec,litserve,torchserve

Quartet ("ours") runs with the settings of ``make serve``. "plain" is a FastAPI server without batching, with one
process and as many threads as cores; "plain x2" has two processes. Other servers are installed on first use.

Each round measures every server once for each number of callers, in rotating order. Meanwhile, the other servers are
suspended. The callers run on the same machine and keep their connections open. Each caller sends its next request when
the previous one is answered. ``wrk`` generates the load, and ``support/load.py`` that of texts and streams. Before a
workload is measured, every server must give the same answers as Quartet.

The tables show medians over the rounds. "CPU s/s" is the number of CPU seconds that all processes of a server use per
second. The memory is the PSS of all its processes, which divides a shared page between all processes that use it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from app.serving.preload import resident_versions
from benchmarks import peers
from benchmarks.support import load, report, servers
from benchmarks.support.load import Figures
from benchmarks.support.servers import ROOT, Server, StartFailed
from benchmarks.support.workloads import Workload, prepare, prompts, workloads

START = "start"
WORKLOADS = (START, *workloads())
PLAIN = {"plain": 1, "plain2": 2}  # names and numbers of processes
SERVERS = ("ours", *PLAIN, *peers.PEERS)
IDLE_LOAD = 0.5  # highest load average of an idle machine

Column = tuple[str, str, int]  # key of a figure, header, decimals
LATENCIES: list[Column] = [("p50", "p50 ms", 1), ("p95", "p95 ms", 1), ("p99", "p99 ms", 1)]
RESOURCES: list[Column] = [("errors", "errors", 0), ("cpu", "CPU s/s", 2), ("pss", "PSS MiB", 0)]
REQUESTS: list[Column] = [("per_second", "requests/s", 0), *LATENCIES]
COLUMNS: dict[str, list[Column]] = {
    START: [("seconds", "ready after s", 2), ("pss", "PSS MiB", 0)],
    "streams": [
        ("characters", "characters/s", 0),
        *((f"{what}_p{part}", f"{what} p{part} ms", 1) for what in ("first", "gap") for part in (50, 95, 99)),
        *RESOURCES,
    ],
    "mixed": [*REQUESTS, RESOURCES[0]],
}

Item = TypeVar("Item")
Key = tuple[str, int]  # server (with the part of the workload), callers


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def rotated(items: Sequence[Item], count: int) -> list[Item]:
    count %= max(len(items), 1)
    return [*items[count:], *items[:count]]


def table(name: str, title: str, cells: dict[Key, list[Figures]]) -> report.Table:
    """Return a table with a row for each server and number of callers. ``of plain`` is relative to the server plain."""
    (first, header, digits), *others = COLUMNS.get(name, [*REQUESTS, *RESOURCES])
    columns = {"server": None, "callers": 0, header: digits, "min": digits, "max": digits, "of plain": 2}
    columns |= {shown: decimals for _, shown, decimals in others}

    def median(rounds: Sequence[Figures], key: str) -> float:
        values = [figures[key] for figures in rounds if not math.isnan(figures.get(key, math.nan))]
        return statistics.median(values) if values else math.nan

    rows = []
    for (server, callers), rounds in sorted(cells.items(), key=lambda item: item[0][1]):
        part = server.partition(": ")[2]
        base = median(cells.get((f"plain: {part}" if part else "plain", callers), ()), first)
        value, values = median(rounds, first), [figures[first] for figures in rounds]
        of_plain = math.nan if server.startswith("plain") or not base else value / base
        figures = (median(rounds, key) for key, _, _ in others)
        rows.append([server, callers or None, value, min(values), max(values), of_plain, *figures])
    return report.table(title, columns, rows)


@contextmanager
def resumed(server: Server) -> Iterator[None]:
    server.resume()
    try:
        yield
    finally:
        server.pause()


async def measured(server: Server, workload: Workload, callers: int, seconds: float) -> dict[str, Figures]:
    """Measure one server. Return the figures of each part of the workload, with the server's CPU time and memory."""
    with resumed(server):
        await load.call(server.port, workload.adapted_requests(server), callers, 0.5)  # warm up
        cpu, started = server.cpu_seconds(), time.perf_counter()
        parts = await workload.measure(server, callers, seconds)
        cpu = (server.cpu_seconds() - cpu) / (time.perf_counter() - started)
        return {part: {**figures, "cpu": cpu, "pss": server.memory()} for part, figures in parts.items()}


async def usable_servers(running: Sequence[Server], name: str, workload: Workload) -> list[Server]:
    """Return the servers that support the workload and give the same answers as the first server."""
    usable, expected = list[Server](), list[Any]()
    for server in running:
        if server.workloads is not None and name not in server.workloads:
            continue
        try:
            with resumed(server):
                requests = workload.adapted_requests(server)
                result = [workload.read(await load.send(server.port, request)) for request in requests]
            expected = expected or result
            if not all(map(workload.check, result, expected)):
                raise ValueError(f"the answers are wrong or differ from those of {running[0].name}")
        except (ValueError, LookupError, TypeError) as error:
            progress(f"{name}: {server.name} is not measured: {error}\n{server.tail()}")
        else:
            usable.append(server)
    return usable


async def compare(
    options: argparse.Namespace, name: str, workload: Workload, running: Sequence[Server]
) -> report.Table:
    """Measure one workload on each server with each number of callers."""
    running = await usable_servers(running, name, workload)
    cells: dict[Key, list[Figures]] = {}
    for number in range(options.rounds):
        for callers in workload.callers or options.callers:
            for server in rotated(running, number):
                progress(f"{name}, round {number + 1} of {options.rounds}, {callers} callers: {server.name}")
                parts = await measured(server, workload, callers, options.seconds)
                for part, figures in parts.items():
                    cells.setdefault((f"{server.name}: {part}" if part else server.name, callers), []).append(figures)
    return table(name, workload.title, cells)


async def starts(rounds: int, factories: Sequence[Callable[[Path], Server]]) -> report.Table:
    """Measure the time from process start to readiness, and the memory after each network has been used."""
    cells: dict[Key, list[Figures]] = {}
    store, known = ROOT / "models_store", workloads()
    tasks = [known[name].requests for name in ("cnn", "forecast", "sample")] + [prompts("shakespeare-rnn")]
    for number in range(rounds):
        for factory in rotated(factories, number):
            server = factory(store)
            progress(f"start, round {number + 1} of {rounds}: {server.name}")
            try:
                seconds = server.start()
                if server.name == "ours":
                    check_all_ready(server, store)
                for requests in tasks:
                    await load.call(server.port, requests, 8, 0.5)
                cells.setdefault((server.name, 0), []).append({"seconds": seconds, "pss": server.memory()})
            finally:
                server.stop()
    return table(START, "start and memory, included networks", cells)


def check_all_ready(server: Server, store: Path) -> None:
    """Raise SystemExit if the service is ready before it has loaded all versions that stay in memory."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health/ready") as answer:
        models = json.load(answer)["models"]
    expected = [f"{name}@{number}" for name, number in resident_versions(store)]
    if sorted(models) != sorted(expected):
        raise SystemExit(f"the service is ready with {models}, expected {expected}")


@contextmanager
def started(servers_to_start: Sequence[Server]) -> Iterator[list[Server]]:
    """Start servers for a ``with`` block, and suspend them. Other servers that do not start are left out."""
    ready = list[Server]()
    try:
        for server in servers_to_start:
            progress(f"starting {server.name}")
            try:
                server.start()
            except StartFailed as error:
                if server.workloads is None:
                    raise
                progress(str(error))
                continue
            ready.append(server)
            server.wait_until_idle()
            server.pause()
        yield ready
    finally:
        for server in ready:
            server.stop()


async def bench(options: argparse.Namespace, folder: Path) -> list[report.Table]:
    factories: list[Callable[[Path], Server]] = [partial(servers.ours, folder)]
    factories += [partial(servers.plain, folder, workers=PLAIN[name]) for name in options.servers if name in PLAIN]
    tables = [await starts(options.rounds, factories)] if START in options.only else []
    names = [name for name in options.only if name != START]
    if not names:
        return tables
    store, known = prepare(ROOT / "models_store", folder), workloads()
    others = [peers.server(name, folder, store) for name in options.servers if name in peers.PEERS]
    with started([*(factory(store) for factory in factories), *others]) as running:
        return tables + [await compare(options, name, known[name], running) for name in names]


def words(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser for comma-separated words."""

    def parse(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(allowed)}")
        return text.split(",")

    return parse


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", type=words(WORKLOADS), default=list(WORKLOADS), help=",".join(WORKLOADS))
    parser.add_argument(
        "--callers",
        type=lambda text: list(map(int, text.split(","))),
        default=[1, 32, 64],
        help="numbers of clients that send requests at the same time (default: 1,32,64)",
    )
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each server (default: %(default)s)")
    parser.add_argument("--servers", type=words(SERVERS), default=["ours", "plain", "plain2"], help=",".join(SERVERS))


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    if not shutil.which("wrk"):
        raise SystemExit("wrk is not installed (Debian: apt-get install wrk)")
    if (busy := os.getloadavg()[0]) > IDLE_LOAD:
        progress(f"this machine is busy (load {busy:.1f}): the measurements will not be reliable")
    return uvloop.run(bench(options, folder)), []
