"""Compare the speed of one and two replicas under Ray Serve with the speed of one and two workers.

    python -m benchmarks.speed.replicas                          # the table; needs the extra [ray]
    python -m benchmarks.speed.replicas --only cnn --callers 64  # one workload
    python -m benchmarks.speed.replicas --kill --seconds 20      # kill a replica under load and count the answers

Each replica and each worker computes with one thread. With Ray, each request also passes through Ray's proxy and the
ingress. Ray can use several machines, but this benchmark uses only one. The figures and the conditions are the same
as in ``benchmarks.speed.serving``.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.speed.serving import Plan, comma_separated, compare, progress, show, started
from benchmarks.support import load, report, servers
from benchmarks.support.servers import ROOT, Server, free_port, stats
from benchmarks.support.workloads import prepare, workloads

WORKLOADS = ("cnn", "strong", "text", "streams", "forecast", "sample")
TASKS = ["classify", "continue", "forecast", "sample"]


def replicas(folder: Path, store: Path, count: int) -> Server:
    """Return a server that runs its own Ray cluster, with one group of ``count`` replicas for all tasks."""
    port, name = free_port(), f"ray x{count}"
    group = {"tasks": TASKS, "min_replicas": count, "max_replicas": count, "target_requests": 64}
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "quartet",
                "route_prefix": "/",
                "import_path": "deploy.ray_serve:build",
                "args": {"ingresses": 1, "groups": {"all": group}},
            }
        ],
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config))  # JSON is valid YAML
    environment = {"QUARTET_STORE": str(store), "RAY_ADDRESS": "local"}  # a separate cluster
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--app-dir", str(ROOT), str(file)]
    return Server(name, command, port, folder / f"{name}.log", environment)


def replica_processes(server: Server) -> list[int]:
    """Return the process ids of the replicas."""
    own = set(server.pids())
    result = []
    for pid, _ in stats():
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # the process has ended
            continue
        if pid in own and title.startswith(b"ray::ServeReplica:quartet:all"):
            result.append(pid)
    return result


async def kill_replica(
    server: Server, workload: str, callers: int, seconds: float, folder: Path
) -> collections.Counter[int]:
    """Kill a replica under load.

    Return the number of answers for each status. Status 0 means that there was no answer.
    """
    task = asyncio.create_task(load.call(server.port, workloads(folder)[workload].requests, callers, seconds))
    await asyncio.sleep(seconds / 3)
    process = replica_processes(server)[0]
    os.kill(process, signal.SIGKILL)
    progress(f"killed {process}")
    return collections.Counter(answer.status for answer in (await task).answers)


async def bench(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="quartet-bench-") as name:
        folder = Path(name)
        networks, _ = prepare(options.store, folder)
        plan = Plan(networks, options.seconds, options.rounds, options.callers, report.Results(ours="ours 2x1"))
        if options.kill:
            server = replicas(folder, networks, 2)
            server.start(300)
            try:
                for workload in options.only:
                    statuses = await kill_replica(server, workload, options.callers[0], options.seconds, networks)
                    print(
                        f"{workload}, {options.callers[0]} callers, one of two replicas killed: {dict(statuses)}",
                        flush=True,
                    )
            finally:
                server.stop()
            return
        ours = [servers.ours(folder, networks, layout) for layout in ("1x1", "2x1")]
        # Clusters run one at a time, because a paused Ray cluster loses its nodes.
        clusters = [replicas(folder, networks, count) for count in (1, 2)]
        selected = {workload: replace(workloads(networks)[workload], limits=()) for workload in options.only}
        for group in (ours, clusters[:1], clusters[1:]):
            with started(group) as running:
                for title, workload in selected.items():
                    await compare(plan, title, workload, running)
        for title, workload in selected.items():
            show(plan.results, title, workload.title)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compare the speed of replicas under Ray Serve and of workers of the service."
    )
    parser.add_argument(
        "--only",
        type=comma_separated(WORKLOADS),
        default=["cnn", "text"],
        help=f"workloads among {','.join(WORKLOADS)}",
    )
    help_text = "numbers of clients that send requests at the same time"
    parser.add_argument("--callers", type=lambda text: list(map(int, text.split(","))), default=[64], help=help_text)
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each server (default: %(default)s)")
    parser.add_argument("--kill", action="store_true", help="instead, kill a replica under load, and count the answers")
    parser.add_argument("--store", type=Path, default=ROOT / "models_store", help="folder of the included networks")
    asyncio.run(bench(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
