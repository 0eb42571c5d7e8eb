"""Restart test: restart four services behind nginx, one after the other, under load. Then kill a worker of a service.

    python -m benchmarks.reliability.restarts                           # four services, two rounds; needs nginx
    python -m benchmarks.reliability.restarts --rounds 1 --callers 4

Callers send requests of all kinds (``mix``) and compare each answer with an earlier answer to the same request. Other
callers read long streams. If such a stream is not finished when its service stops, it must end with an error event. In
the second part, the callers send requests to one service with two workers, without nginx. The test kills one of these
workers with SIGKILL.

The exit status is 1 if a request failed because of a restart, if a stream ended without a final event, or if a service
exited with an error. For the second part, the exit status is 1 if an answer was wrong, if more requests were lost than
the killed worker had connections, or if a new worker did not replace it within ``MAX_REPLACEMENT_SECONDS``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.support import mix, servers
from benchmarks.support.load import Answer, Connection, Request, percentile
from benchmarks.support.servers import ROOT, Server

SERVICES = 4
STOP_SECONDS = 2  # time that a stopping service gives to its requests; long streams take longer
MAX_REPLACEMENT_SECONDS = 5.0  # longest time until a new worker replaces a killed worker
STOP_TIMEOUT = 60.0  # seconds for a service to end
DIFFERENT_REQUESTS = 200  # number of different requests, sent repeatedly
LOAD_SECONDS = 3.0  # duration of the load before the first stop, between two stops, and before and after the kill
LONG = Request("/v1/text/continue", b'{"prompt": "ROMEO:", "max_characters": 4000, "stream": true}')


@dataclass
class Outcomes:
    """Counts of the outcomes of all requests.

    An outcome is ``right``, ``wrong``, ``announced`` (a stream ended with an error event), ``lost`` (no answer), or an
    HTTP status.
    """

    sent: Counter[str] = field(default_factory=Counter)
    streams: Counter[str] = field(default_factory=Counter)  # outcomes of the long streams
    ended: list[tuple[str, Answer]] = field(default_factory=list)  # outcome and answer of the requests in ``sent``
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"stop": [], "start": []})
    statuses: Counter[int] = field(default_factory=Counter)  # exit statuses of the services


def proxy_file(folder: Path, port: int, upstreams: Sequence[int]) -> Path:
    """Write a copy of deploy/nginx.conf to a folder, and return its path.

    In the copy, nginx forwards requests to the local ports ``upstreams``.
    """
    text = (ROOT / "deploy" / "nginx.conf").read_text().replace("listen 8080", f"listen 127.0.0.1:{port}")
    first, *others = re.findall(r"^ *server quartet-\d+:8000.*\n", text, re.MULTILINE)
    for line in others:
        text = text.replace(line, "")
    lines = [re.sub(r"quartet-\d+:8000", f"127.0.0.1:{upstream}", first) for upstream in upstreams]
    text = re.sub(r"/tmp/(nginx[\w.-]*)", rf"{folder}/\1", text.replace(first, "".join(lines)))
    folder.chmod(0o755)  # workers of nginx run as another user if root starts it
    (folder / "nginx.conf").write_text(text)
    return folder / "nginx.conf"


@contextmanager
def nginx(folder: Path, port: int, upstreams: Sequence[int]) -> Iterator[None]:
    """Run nginx in front of running services during a ``with`` block."""
    file = proxy_file(folder, port, upstreams)
    command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(file), "-g", "daemon off;"]
    proxy = Server("nginx", command, port, folder / "nginx.log")
    proxy.start()
    try:
        yield
    finally:
        proxy.stop()


def outcome(request: mix.MixRequest, answer: Answer, expected: Any) -> str:
    """Return the outcome of an answer; see ``Outcomes``."""
    if answer.status == 0:
        return "lost"
    if mix.same(request.kind, mix.read(request, answer), expected):
        return "right"
    if request.kind == "stream":
        return "wrong" if answer.stream_end == "finished" else answer.stream_end
    return "wrong" if answer.status < 429 else str(answer.status)


@asynccontextmanager
async def running_callers(
    port: int, requests: Sequence[mix.MixRequest], expected: Sequence[Any], outcomes: Outcomes, callers: int
) -> AsyncIterator[None]:
    """Run ``callers`` callers during a ``with`` block. For every four callers, one more caller reads long streams.

    At the end of the block, wait for the answers to their last requests.
    """
    stop = asyncio.Event()

    async def mixed(seed: int) -> None:
        generator = random.Random(seed)
        connection: Connection | None = None
        while not stop.is_set():
            index = generator.randrange(len(requests))
            connection = await mix.usable_connection(connection, port)
            answer = await connection.send(requests[index].request.bytes())
            result = outcome(requests[index], answer, expected[index])
            outcomes.sent[result] += 1
            outcomes.ended.append((result, answer))
        _close(connection)

    async def streams() -> None:
        connection: Connection | None = None
        while not stop.is_set():
            connection = await mix.usable_connection(connection, port)
            outcomes.streams[(await connection.send(LONG.bytes(), 2 * STOP_TIMEOUT)).stream_end] += 1
        _close(connection)

    tasks = [
        asyncio.ensure_future(coroutine)
        for coroutine in (*map(mixed, range(callers)), *(streams() for _ in range(callers // 4)))
    ]
    try:
        await asyncio.sleep(LOAD_SECONDS)
        yield
        await asyncio.sleep(LOAD_SECONDS)
    finally:
        stop.set()
        await asyncio.gather(*tasks)


def _close(connection: Connection | None) -> None:
    if connection and connection.transport:
        connection.transport.close()


def restart(server: Server, outcomes: Outcomes) -> None:
    """Stop a service with SIGTERM, wait for its end, and start it again on its port."""
    process, started = server.process, time.perf_counter()
    assert process
    process.send_signal(signal.SIGTERM)
    outcomes.statuses[process.wait(STOP_TIMEOUT)] += 1
    outcomes.seconds["stop"].append(time.perf_counter() - started)
    outcomes.seconds["start"].append(server.start())


async def rolling(running: Sequence[Server], port: int, options: argparse.Namespace) -> Outcomes:
    """Restart each service in turn, ``rounds`` times."""
    requests, outcomes = mix.requests(DIFFERENT_REQUESTS, 0), Outcomes()
    expected = await mix.expected_answers(port, requests)
    async with running_callers(port, requests, expected, outcomes, options.callers):
        for _ in range(options.rounds):
            for server in running:
                await asyncio.to_thread(restart, server, outcomes)
                await asyncio.sleep(LOAD_SECONDS)
    return outcomes


def connections(worker: int, port: int) -> int:
    """Return the number of connections of a process to a local port."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = {line[9] for line in lines if int(line[1].split(":")[1], 16) == port and line[3] == "01"}
    count = 0
    with suppress(FileNotFoundError):  # the process has ended
        for descriptor in Path(f"/proc/{worker}/fd").iterdir():
            with suppress(OSError):  # the descriptor was closed meanwhile
                count += os.readlink(descriptor).removeprefix("socket:[").removesuffix("]") in established
    return count


async def replaced(server: Server, before: Collection[int]) -> float:
    """Return the seconds until a process that is not in ``before`` answers on a new connection, or infinity."""
    started = time.perf_counter()
    while time.perf_counter() - started < STOP_TIMEOUT:
        connection = await mix.usable_connection(None, server.port)  # a new connection goes to the least busy worker
        await connection.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        result = any(connections(pid, server.port) for pid in server.pids() if pid not in before)
        _close(connection)
        if result:
            return time.perf_counter() - started
        await asyncio.sleep(0.02)
    return math.inf


async def kill(server: Server, callers: int) -> dict[str, Any]:
    """Kill one of two workers under load. Return the outcomes and the seconds until a new worker answers."""
    requests, outcomes = mix.requests(DIFFERENT_REQUESTS, 0), Outcomes()
    expected = await mix.expected_answers(server.port, requests)
    async with running_callers(server.port, requests, expected, outcomes, callers):
        before = server.pids()
        victim = next(pid for pid in before if server.process and pid != server.process.pid)
        connection_count = connections(victim, server.port)
        os.kill(victim, signal.SIGKILL)
        started = time.perf_counter()
        back = await replaced(server, before)
    lost = [answer.ended - started for word, answer in outcomes.ended if word == "lost"]
    return {
        "requests": outcomes.sent.total(),
        **outcomes.sent,
        **{f"streams {word}": n for word, n in outcomes.streams.items()},
        "connections of the killed": connection_count,
        "all lost": len(lost) + outcomes.streams["lost"],
        "unexpected": unexpected(outcomes, "lost"),
        "last loss after ms": round(1000 * max(lost, default=0.0), 1),
        "back after s": round(back, 2),
    }


def unexpected(outcomes: Outcomes, *allowed: str) -> int:
    """Return the number of requests whose outcome is neither correct nor in ``allowed``."""
    correct = {"right", "announced", "finished", *allowed}
    return sum(number for word, number in (outcomes.sent + outcomes.streams).items() if word not in correct)


def figures(outcomes: Outcomes) -> dict[str, Any]:
    """Return the figures of the rolling restart."""
    latencies = [answer.seconds for _, answer in outcomes.ended]
    return {
        "requests": outcomes.sent.total(),
        **outcomes.sent,
        **{f"streams {word}": n for word, n in outcomes.streams.items()},
        "restarts": len(outcomes.seconds["stop"]),
        "exit statuses": sorted(outcomes.statuses),
        **{f"longest {name} s": round(max(seconds), 2) for name, seconds in outcomes.seconds.items()},
        "p50 ms": round(1000 * percentile(latencies, 0.5), 1),
        "p99 ms": round(1000 * percentile(latencies, 0.99), 1),
    }


def show(title: str, result: dict[str, Any]) -> None:
    print(f"\n| {title} | |\n|---|--:|")
    for key, value in result.items():
        print(f"| {key} | {value} |")
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of restarts (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=8, help="number of callers (default: %(default)s)")
    options = parser.parse_args()
    if not shutil.which("nginx"):
        sys.exit("nginx is not installed (Debian: apt-get install nginx-light)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        services = []
        for number in range(SERVICES):
            service = servers.ours(folder, ROOT / "models_store", "1x1")
            service.log = folder / f"{number}.log"
            service.environment = {**service.environment, "QUARTET_SHUTDOWN_GRACE_SECONDS": str(STOP_SECONDS)}
            services.append(service)
        plain = servers.ours(folder, ROOT / "models_store", "2x1")
        try:
            for service in services:
                service.start()
            port = servers.free_port()
            with nginx(folder, port, [service.port for service in services]):
                outcomes = asyncio.run(rolling(services, port, options))
            for service in services:
                service.stop()
            show("rolling restart", figures(outcomes))
            plain.start()
            cost = asyncio.run(kill(plain, options.callers))
            show("a worker killed", cost)
        finally:
            for service in (*services, plain):
                service.stop()
    restarts_passed = not unexpected(outcomes) and set(outcomes.statuses) == {0}
    few_lost = cost["all lost"] <= cost["connections of the killed"]
    kill_passed = few_lost and not cost["unexpected"] and cost["back after s"] <= MAX_REPLACEMENT_SECONDS
    sys.exit(not (restarts_passed and kill_passed))


if __name__ == "__main__":
    main()
