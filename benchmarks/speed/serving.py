"""Measure the service under load, and compare it with a plain FastAPI server that has the same networks.

    python -m benchmarks.speed.serving                                       # everything, about twenty minutes
    python -m benchmarks.speed.serving --only cnn --callers 1,64 --seconds 2 # one workload, short
    python -m benchmarks.speed.serving --only cnn --layouts 1x2,2x1          # several layouts: workers x threads
    python -m benchmarks.speed.serving --only cnn --peers litserve,mlserver  # other servers, installed on demand
    python -m benchmarks.speed.serving --only large --layouts 1x1 --servers ours  # large requests beside small ones
    python -m benchmarks.speed.serving --only photos --layouts 2x1,1x1       # photographs of 0.1 to 50 megapixels

The workload ``large`` needs a free core for the callers. If the workers use all cores, the 99th percentile mainly shows
how long the operating system runs other processes.

Each round measures every server once for each number of callers, in rotating order. While one server is measured, the
other servers are suspended (SIGSTOP). The callers run on the same machine, and keep their connections open. Each caller
sends its next request when the previous request is answered. If ``wrk`` is installed, it generates the load, except for
texts and streams. The load generator in ``benchmarks/support/load.py`` measures these. Before a workload is measured,
every server must give the same answers as Quartet. Quartet ("ours") runs with the settings of ``make serve``. For the
rows "in process", one process does the work of a server without HTTP: it decodes, computes and encodes whole batches.

The table shows medians over the rounds. "CPU s/s" is the number of CPU seconds that all processes of a server use per
second. The memory is the sum over all processes of a server: the PSS or the RSS. The PSS divides a shared page between
all processes that use it. The benchmark and the other servers also use pages of PyTorch's files, so the PSS is lower
than on a machine without them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from app.serving.preload import resident_versions
from app.settings import Settings
from benchmarks import peers
from benchmarks.support import load, report, servers, throughput_limits
from benchmarks.support.hardware import hardware
from benchmarks.support.report import OURS, START, Results, part_name
from benchmarks.support.servers import ROOT, Server, StartFailed
from benchmarks.support.workloads import Workload, prepare, prompts, workloads

WORKLOADS = ("start", "cnn", "strong", "photo", "text", "streams", "forecast", "sample", "mixed", "large", "photos")
SERVERS = ("ours", "plain", "plain2")
VERSIONS = ("torch", "fastapi", "uvicorn", "uvloop", "httptools", "pillow", "numpy")
PLAINS = (("plain", 1), ("plain2", 2))  # names and numbers of processes
SHIPPED_RNN = "shakespeare-rnn"
IDLE_LOAD = 0.5  # highest load average of an idle machine
Item = TypeVar("Item")


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def rotated(items: Sequence[Item], count: int) -> list[Item]:
    count %= max(len(items), 1)
    return [*items[count:], *items[:count]]


@dataclass(frozen=True)
class Plan:
    """The options of the command line and the results. ``store`` is the folder of the networks for all servers."""

    store: Path
    seconds: float
    rounds: int
    callers: Sequence[int]
    results: Results


@contextmanager
def started(servers_to_start: Sequence[Server]) -> Iterator[list[Server]]:
    """Start servers for a ``with`` block, and suspend them. Stop all their processes at the end of the block."""
    ready = []
    try:
        for server in servers_to_start:
            progress(f"starting {server.name}")
            ready.append(server)
            try:
                server.start()
            except StartFailed as error:
                if server.workloads is None:
                    raise
                print(f"\n{error}", flush=True)
                ready.remove(server)
                continue
            server.wait_until_idle()
            server.pause()
        yield ready
    finally:
        for server in ready:
            server.stop()


@contextmanager
def resumed(server: Server) -> Iterator[None]:
    server.resume()
    try:
        yield
    finally:
        server.pause()


async def measured(server: Server, workload: Workload, callers: int, seconds: float) -> dict[str, load.Figures]:
    """Measure one server. Return the figures of each part of the workload, with the server's CPU time and memory."""
    with resumed(server):
        await workload.warm_up(server, callers)
        cpu, started_at = server.cpu_seconds(), time.perf_counter()
        parts = await workload.measure(server, callers, seconds)
        cpu, elapsed = server.cpu_seconds() - cpu, time.perf_counter() - started_at
        resources = {"cpu": cpu / elapsed, **server.memory()}
        return {part: {**figures, **resources} for part, figures in parts.items()}


async def usable_servers(running: Sequence[Server], name: str, workload: Workload) -> list[Server]:
    """Return the servers that support the workload and give the same answers as the first server."""
    usable: list[Server] = []
    expected: list[Any] = []
    for server in running:
        if server.workloads is not None and name not in server.workloads:
            continue
        try:
            with resumed(server):
                result = [
                    workload.read(server, await load.send(server.port, request))
                    for request in workload.adapted_requests(server)
                ]
            expected = expected or result
            if not all(workload.check(answer, ours) for answer, ours in zip(result, expected, strict=True)):
                raise ValueError(f"the answers are wrong or differ from those of {running[0].name}")
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"\n{name}: {server.name} is not measured: {error}", flush=True)
            progress(f"the end of its log: {server.tail()}")
        else:
            usable.append(server)
    return usable


async def compare(plan: Plan, name: str, workload: Workload, running: Sequence[Server]) -> None:
    """Measure one workload on each server with each number of callers, and add the figures to the results."""
    running = await usable_servers(running, name, workload)
    bodies = [request.body for request in workload.requests]
    processes = {limit.name: throughput_limits.Process(limit, plan.store, bodies) for limit in workload.limits}
    try:
        for round_index in range(plan.rounds):
            for callers in workload.callers or plan.callers:
                for server in rotated(running, round_index):
                    progress(f"{name}, round {round_index + 1} of {plan.rounds}, {callers} callers: {server.name}")
                    try:
                        parts = await measured(server, workload, callers, plan.seconds)
                    except (OSError, RuntimeError) as error:  # the server accepts no connections; skip it
                        print(f"\n{name}: {server.name} failed with {callers} callers: {error}", flush=True)
                        continue
                    for part, figures in parts.items():
                        plan.results.add(name, part_name(server.name, part), callers, figures)
            for limit, process in processes.items():
                progress(f"{name}, round {round_index + 1} of {plan.rounds}: {limit}")
                plan.results.add(name, limit, 0, {"per_second": process.measure(min(plan.seconds, 2))})
    finally:
        for process in processes.values():
            process.stop()


async def starts(plan: Plan, included: Path, factories: Sequence[Callable[[], Server]]) -> None:
    """Measure the time from process start to readiness, and the memory after each network has been used."""
    all_workloads = workloads(included)
    tasks = [
        all_workloads["cnn"],
        all_workloads["forecast"],
        all_workloads["sample"],
        replace(all_workloads["text"], requests=prompts(SHIPPED_RNN)),
    ]
    for round_index in range(plan.rounds):
        for factory in rotated(factories, round_index):
            server = factory()
            progress(f"start, round {round_index + 1} of {plan.rounds}: {server.name}")
            try:
                seconds = server.start()
                if server.name.startswith(OURS):
                    check_all_ready(server, included)
                for task in tasks:
                    await load.call(server.port, task.requests, 8, 0.5)
                plan.results.add(START, server.name, 0, {"seconds": seconds, **server.memory()})
            finally:
                server.stop()


def check_all_ready(server: Server, included: Path) -> None:
    """Raise SystemExit if a server is ready before it has loaded all versions that stay in memory."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health/ready") as answer:
        models = json.load(answer)["models"]
    expected = [f"{name}@{number}" for name, number in resident_versions(included)]
    if sorted(models) != sorted(expected):
        raise SystemExit(f"{server.name} is ready with {models}, expected {expected}")


def server_factories(options: argparse.Namespace, folder: Path, networks: Path) -> list[Callable[[], Server]]:
    """For each selected server, return a function that creates it. The functions for Quartet are the first."""
    factories: list[Callable[[], Server]] = []
    if "ours" in options.servers:
        factories += [partial(servers.ours, folder, networks, layout) for layout in options.layouts or [""]]
    factories += [
        partial(servers.plain, folder, networks, workers) for name, workers in PLAINS if name in options.servers
    ]
    return factories


def installed(options: argparse.Namespace, folder: Path, networks: Path) -> list[Server]:
    """Install the selected other servers if necessary, and return them."""
    competitors = []
    for name in options.peers:
        progress(f"installing {name}")
        try:
            competitors.append(peers.server(name, peers.install(name, options.peers_dir), folder, networks))
        except peers.NotInstallable as error:
            print(f"\n{error}", flush=True)
    return competitors


def two_workers(folder: Path, networks: Path) -> Server:
    """Return Quartet with two workers, each with one thread."""
    server = servers.ours(folder, networks, "2x1")
    return replace(server, name=report.TWO_WORKERS)


async def bench(options: argparse.Namespace, results: Results) -> str:
    """Run all selected workloads and print their tables. Return a description of the RNN."""
    with tempfile.TemporaryDirectory(prefix="quartet-bench-") as name:
        folder, included = Path(name), options.store
        networks, rnn = prepare(included, folder)
        plan = Plan(networks, options.seconds, options.rounds, options.callers, results)
        if START in options.only:
            factories = server_factories(options, folder, included)
            if "workers" in Settings.model_fields and not options.layouts and "ours" in options.servers:
                factories.append(partial(two_workers, folder, included))
            await starts(plan, included, factories)
            results.titles[START] = "start and memory, included networks"
            show(results, START, results.titles[START])
        all_workloads = workloads(networks)
        selected = [(name, all_workloads.get(name)) for name in options.only if name != START]
        if not selected:
            return rnn
        others = installed(options, folder, networks)
        with started([*(factory() for factory in server_factories(options, folder, networks)), *others]) as running:
            for workload_name, workload in selected:
                if workload is None:
                    print(f"\n{workload_name}: not measured, the store has no such network", flush=True)
                    continue
                results.titles[workload_name] = workload.title
                await compare(plan, workload_name, workload, running)
                show(results, workload_name, f"{workload.title}{f' ({rnn})' if workload.rnn else ''}")
        return rnn


def show(results: Results, workload: str, title: str) -> None:
    print(f"\n**{workload}: {title}**\n\n{report.table(results, workload)}", flush=True)


def comma_separated(allowed: Sequence[str] = ()) -> Callable[[str], list[str]]:
    """Return a parser for comma-separated words."""

    def parse(text: str) -> list[str]:
        result = [word for word in text.split(",") if word]
        for word in result:
            if allowed and word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(allowed)}")
        return result

    return parse


def parser() -> argparse.ArgumentParser:
    description = "Measure Quartet and a plain FastAPI server in alternation."
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)  # see report.without_save
    made.add_argument(
        "--only",
        type=comma_separated(WORKLOADS),
        default=[workload for workload in WORKLOADS if workload not in ("large", "photos")],
        help=f"workloads: {','.join(WORKLOADS)} (default: all but large and photos)",
    )
    help_text = "numbers of clients that send requests at the same time"
    made.add_argument(
        "--callers", type=lambda text: list(map(int, text.split(","))), default=[1, 8, 32, 64], help=help_text
    )
    made.add_argument("--seconds", type=float, default=4, help="seconds of each measurement (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="measurements of each server (default: %(default)s)")
    made.add_argument(
        "--servers", type=comma_separated(SERVERS), default=list(SERVERS), help=f"servers: {','.join(SERVERS)}"
    )
    made.add_argument(
        "--layouts", type=comma_separated(), default=[], help="workers x threads to compare, such as 1x2,2x1"
    )
    made.add_argument(
        "--peers", type=comma_separated(list(peers.PEERS)), default=[], help=f"other servers: {','.join(peers.PEERS)}"
    )
    peers_dir = Path.home() / ".cache/quartet-peers"
    made.add_argument("--peers-dir", type=Path, default=peers_dir, help="folder for their virtual environments")
    made.add_argument("--save", type=Path, metavar="FILE", help="write the tables to a file in benchmarks/results/")
    made.add_argument("--store", type=Path, default=ROOT / "models_store", help="folder of the included networks")
    return made


def conditions(options: argparse.Namespace, rnn: str) -> dict[str, Any]:
    return {
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "load": "wrk" if load.has_wrk() else "own callers",
        "rnn": rnn,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("QUARTET_")},
    }


def finite(content: Any) -> Any:
    """Return the content with None in place of NaN and infinity, which JSON cannot represent."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def save(path: Path, arguments: list[str], setting: dict[str, Any], results: Results) -> None:
    """Write the tables for ``make report``."""
    command = shlex.join(["python", "-m", "benchmarks.speed.serving", *report.without_save(arguments)])
    measured = [workload for workload in results.titles if workload in results.cells]
    targets = report.targets_as_json(report.evaluate_targets(results))
    content = {
        "title": path.stem,
        "command": command,
        "machine": setting["hardware"],
        "date": time.strftime("%Y-%m-%d"),
        "software": ", ".join(f"{name} {version}" for name, version in setting["versions"].items()),
        "notes": [],
        "tables": [
            *([targets] if targets["rows"] else []),
            *(report.as_json(results, workload, results.titles[workload]) for workload in measured),
        ],
    }
    report.write(path, content)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # stop immediately, also between two awaits
        signal.signal(number, stop)
    busy = os.getloadavg()[0]
    if busy > IDLE_LOAD:
        print(f"This machine is busy (load {busy:.1f}): the measurements will not be reliable.", file=sys.stderr)
    results = Results(ours=f"{OURS} {options.layouts[0]}" if options.layouts else OURS)
    try:
        rnn = uvloop.run(bench(options, results))
    except StartFailed as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    result = report.evaluate_targets(results)
    print(f"\n**targets**\n\n{report.targets(result)}\n")
    setting = {**conditions(options, rnn), "load_before": busy}
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    print(f"On {setting['hardware']}; {versions}; load by {setting['load']}.")
    print(f"Medians of {options.rounds} rounds of {options.seconds:g} s each. The RNN of the texts: {rnn}.\n")
    reached = {target.text: value for target, value in result}
    print(json.dumps(finite({**setting, "targets": reached, "workloads": results.cells})))
    if options.save:
        save(options.save, list(sys.argv[1:] if argv is None else argv), setting, results)


if __name__ == "__main__":
    main()
