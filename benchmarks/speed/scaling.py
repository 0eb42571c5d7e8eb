"""Measure how the speed of the service grows with the number of cores, and model its speed on more cores.

    python -m benchmarks.speed.scaling                                                # ten minutes on two cores
    python -m benchmarks.speed.scaling --save benchmarks/results/speed/scaling.json

The program measures the service on 1, 2, 4, ... cores of this machine. It pins the service to these cores, with one
worker and one thread for each core. The callers use the other cores. If there are no other cores, they share the cores
with the service. Therefore the program counts the answers for each CPU second of the service, not for each second.

The model has two parts:

- Throughput. On c cores, an answer takes S(c) = S(1) * (1 + contention * (c - 1)) CPU seconds, because the workers
  share caches, memory and the kernel. This formula is the universal scalability law (Gunther 2007) without its term for
  communication, because the workers do not communicate. The contention is fitted to the measured numbers of cores.
- Latency. A connection stays with its worker, so each worker has its own queue. While a worker handles n requests at
  the same time, it answers X(n) requests per second. X(n) is measured with n callers, and grows with n, because more
  requests form larger batches. So the model treats a worker as a flow-equivalent server (Chandy, Herzog and Woo 1975).
  If requests arrive at random times (Poisson), the number of requests in the worker is a birth-death process. Little's
  law then gives the mean latency.

To check the second part, the program sends requests at random times to one worker on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.support import load, servers
from benchmarks.support.hardware import hardware
from benchmarks.support.load import Request
from benchmarks.support.servers import ROOT, Server
from benchmarks.support.workloads import Workload, prepare, workloads

WORKLOADS = ("cnn", "strong", "forecast", "text")
CORES = (1, 2, 4, 8, 16)
CALLERS = 32  # for each core
CONNECTIONS = 256  # for requests at random times
CONCURRENT = (1, 2, 4, 8, 16, 32)  # numbers of callers with which the speed of one worker is measured
UTILISATIONS = (0.3, 0.6)  # docs/how-to/sizing.md plans with a utilisation of 0.6
MAX_REQUESTS = 10_000  # largest number of requests in the model's queue; the probability of more is negligible


@dataclass(frozen=True)
class Speed:
    """The speed of a workload: answers per second, and the CPU seconds ``used`` by the service in each second."""

    per_second: float
    used: float

    @property
    def per_core(self) -> float:
        """Answers for each CPU second of the service."""
        return self.per_second / self.used


def contention(per_core: Mapping[int, float]) -> float:
    """Fit the contention to measured speeds with least squares, and return it. It is at least 0.

    ``per_core`` maps each number of cores, including 1, to the answers for each CPU second.
    """
    extra = {cores - 1: per_core[1] / value - 1 for cores, value in per_core.items() if cores > 1}
    if not extra:
        return 0.0
    return max(0.0, sum(x * y for x, y in extra.items()) / sum(x * x for x in extra))


def efficiency(cores: int, contention: float) -> float:
    """Return the modelled speed of each of ``cores`` cores, relative to the speed of a single core."""
    return 1 / (1 + contention * (cores - 1))


def mean_latency(rate: float, throughput: Mapping[int, float]) -> float:
    """Return the modelled mean latency of a worker in seconds, if ``rate`` requests per second arrive at random times.

    ``throughput`` maps numbers of callers to measured answers per second. The model interpolates between these numbers.
    Above the largest number, it uses the throughput of the largest number. The largest throughput must be higher than
    ``rate``.
    """
    callers, speeds = list(throughput), list(throughput.values())
    numbers = np.arange(1, MAX_REQUESTS)
    logarithms = np.cumsum(np.log(rate / np.interp(numbers, callers, speeds)))
    weights = np.exp(logarithms - logarithms.max())
    empty = np.exp(-logarithms.max())
    return float((numbers * weights).sum() / (empty + weights.sum()) / rate)


async def speed(server: Server, workload: Workload, callers: int, seconds: float) -> Speed:
    """Measure a server, and return its throughput and CPU time."""
    await workload.warm_up(server, callers)
    cpu, started = server.cpu_seconds(), time.perf_counter()
    figures = await workload.once(server, callers, seconds)
    used = (server.cpu_seconds() - cpu) / (time.perf_counter() - started)
    if figures["errors"]:
        raise RuntimeError(f"{server.name}: {figures['errors']:.0f} requests failed")
    return Speed(figures["per_second"], used)


async def latencies(port: int, requests: Sequence[Request], rate: float, seconds: float) -> list[float]:
    """Send ``rate`` requests per second at random times for ``seconds``. Return the latency of each request in seconds.

    If no connection is free, a request waits for a free connection. The latency includes this waiting time.
    """
    free: asyncio.Queue[load.Connection] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(await load.connect(port))
    generator, index, raw = random.Random(0), count(), [request.bytes() for request in requests]
    result: list[float] = []

    async def ask(index: int) -> None:
        started = time.perf_counter()
        connection = await free.get()
        answer = await connection.send(raw[index % len(raw)])
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}")
        result.append(answer.ended - started)
        free.put_nowait(connection)

    due, end = time.perf_counter(), time.perf_counter() + seconds
    async with asyncio.TaskGroup() as group:
        while (due := due + generator.expovariate(rate)) < end:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            group.create_task(ask(next(index)))
    while not free.empty():
        connection = free.get_nowait()
        if connection.transport:
            connection.transport.close()
    return result


async def latency_rows(server: Server, workload: Workload, seconds: float) -> list[list[Any]]:
    """Measure the latencies of a server with one worker on one core. Return a row of the table for each utilisation."""
    throughput = {}
    for callers in CONCURRENT:
        await workload.warm_up(server, callers)
        throughput[callers] = (await workload.once(server, callers, seconds))["per_second"]
    rows = []
    for utilisation in UTILISATIONS:
        rate = utilisation * max(throughput.values())
        measured = await latencies(server.port, workload.adapted_requests(server), rate, seconds)
        p99 = load.percentile(measured, 0.99)
        values = [1000 * value for value in (statistics.mean(measured), mean_latency(rate, throughput), p99)]
        rows.append([workload.title, f"{utilisation:.0%}", round(rate), *(round(value, 1) for value in values)])
    return rows


def speed_table(title: str, measured: Mapping[int, Sequence[Speed]]) -> dict[str, Any]:
    """Return a table of measured and modelled speeds.

    ``measured`` maps numbers of cores to the speeds of all rounds.
    """
    per_core = {cores: statistics.median(one.per_core for one in rounds) for cores, rounds in measured.items()}
    factor, rows = contention(per_core), []
    for cores in sorted({*CORES, *measured}):
        if rounds := measured.get(cores):
            used = statistics.median(one.used for one in rounds)
            values = [one.per_core for one in rounds]
            low, high = min(values), max(values)
            rows.append([cores, "measured", round(statistics.median(one.per_second for one in rounds)), round(used, 2)])
            rows[-1] += [round(per_core[cores]), round(low), round(high), round(per_core[cores] / per_core[1], 2)]
        else:
            share = efficiency(cores, factor)
            rate = per_core[1] * share
            rows.append([cores, "modelled", round(cores * rate), cores, round(rate), None, None, round(share, 2)])
    columns = {"cores": 0, "": None, "answers/s": 0, "CPU s/s": 2, "answers/CPU s": 0, "min": 0, "max": 0}
    return {"title": f"{title}; contention {factor:.3f}", "columns": {**columns, "efficiency": 2}, "rows": rows}


def results(tables: Sequence[dict[str, Any]], latency: Sequence[list[Any]], command: str) -> dict[str, Any]:
    """Return the content of the file in benchmarks/results/, which ``make report`` reads."""
    columns = {"request": None, "utilisation": None, "requests/s": 0, "mean ms": 1, "modelled mean ms": 1, "p99 ms": 1}
    return {
        "title": "Scaling",
        "command": command,
        "machine": hardware(),
        "date": time.strftime("%Y-%m-%d"),
        "notes": [
            f"The service runs one worker with one thread for each core, and {CALLERS} callers for each worker send "
            "requests. The callers use the other cores of the machine. If there are no other cores, they share the "
            "cores with the service, so compare the answers for each CPU second of the service.",
            "No machine with more cores was measured. The rows *modelled* extrapolate with the universal scalability "
            "law. Its parameter, the contention, is fitted to the measured rows. The modelled rows assume that the "
            "callers run on other machines, so that the service can use all cores.",
            "The last table compares the measured and the modelled latency of one worker when requests arrive at "
            "random times. The utilisation is the rate of the requests, relative to the highest throughput of the "
            "worker.",
        ],
        "tables": [*tables, {"title": "latency on one core", "columns": columns, "rows": list(latency)}],
    }


@contextmanager
def running(folder: Path, networks: Path, cores: int) -> Iterator[Server]:
    """Run the service on the first ``cores`` cores during a ``with`` block.

    The callers run on the other cores, if any.
    """
    available = sorted(os.sched_getaffinity(0))
    server = servers.ours(folder, networks, f"{cores}x1")
    server.command = ["taskset", "--cpu-list", ",".join(map(str, available[:cores])), *server.command]
    os.sched_setaffinity(0, available[cores:] or available)
    try:
        with server.running():
            yield server
    finally:
        os.sched_setaffinity(0, available)


async def bench(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Measure all workloads. Return the tables of speeds and the rows of latencies."""
    counts = [cores for cores in CORES if cores <= len(os.sched_getaffinity(0))]
    speeds: dict[str, dict[int, list[Speed]]] = {workload: {cores: [] for cores in counts} for workload in WORKLOADS}
    latency: list[list[Any]] = []
    with tempfile.TemporaryDirectory(prefix="quartet-bench-") as name:
        networks, _ = prepare(options.store, Path(name))
        all_workloads = workloads(networks)
        for round_index in range(options.rounds):
            for cores in counts:
                with running(Path(name), networks, cores) as server:
                    for workload in WORKLOADS:
                        one = await speed(server, all_workloads[workload], CALLERS * cores, options.seconds)
                        speeds[workload][cores].append(one)
                        rate = f"{one.per_core:.0f} for each CPU second"
                        print(f"round {round_index + 1}, {workload}, {cores} cores: {rate}")
        with running(Path(name), networks, 1) as server:
            for workload in WORKLOADS:
                latency += await latency_rows(server, all_workloads[workload], options.seconds)
    return [speed_table(all_workloads[workload].title, speeds[workload]) for workload in WORKLOADS], latency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure (default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--store", type=Path, default=ROOT / "models_store", help="folder of the included networks")
    options = parser.parse_args()
    tables, latency = uvloop.run(bench(options))
    command = f"python -m benchmarks.speed.scaling --seconds {options.seconds:g} --rounds {options.rounds}"
    content = results(tables, latency, command)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    print(text)
    if options.save:
        options.save.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
