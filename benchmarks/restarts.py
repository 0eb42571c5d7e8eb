"""Restart test: restart four services behind nginx, one after the other, under load. Then kill a worker of a service.

    python -m benchmarks restarts                           # four services, two rounds; needs nginx
    python -m benchmarks restarts --rounds 1 --callers 4

Callers send requests of all kinds (``mix``) and compare each answer with an earlier answer to the same request. Other
callers read long streams. If such a stream is not finished when its service stops, it must end with an error event. In
the second part, the callers send requests to one service with two workers, and one of them gets SIGKILL.

The test fails if a request failed because of a restart, if a stream ended without a final event, or if a service
exited with an error. In the second part, it fails if an answer was wrong, if more requests were lost than the worker
had connections, or if a new worker did not replace it within ``MAX_REPLACEMENT_SECONDS``.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.support import mix, report, servers
from benchmarks.support.load import Answer, Client, Request
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
    HTTP status. ``streams`` are those of the long streams.
    """

    sent: Counter[str] = field(default_factory=Counter)
    streams: Counter[str] = field(default_factory=Counter)

    def unexpected(self, *allowed: str) -> int:
        """Return the number of requests whose outcome is neither correct nor in ``allowed``."""
        correct = {"right", "announced", "finished", *allowed}
        return sum(number for word, number in (self.sent + self.streams).items() if word not in correct)


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


def nginx(folder: Path, port: int, upstreams: Sequence[int]) -> AbstractContextManager[Server]:
    """Return a context manager that runs nginx in front of running services."""
    file = proxy_file(folder, port, upstreams)
    command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(file), "-g", "daemon off;"]
    return Server("nginx", command, port, folder / "nginx.log").running()


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
async def running_callers(port: int, outcomes: Outcomes, callers: int) -> AsyncIterator[None]:
    """Run ``callers`` callers during a ``with`` block. For every four callers, one more caller reads long streams.

    At the end of the block, wait for the answers to their last requests.
    """
    requests, stop = mix.requests(DIFFERENT_REQUESTS, 0), asyncio.Event()
    expected = await mix.expected_answers(port, requests)

    def report_answer(index: int, answer: Answer) -> None:
        outcomes.sent[outcome(requests[index], answer, expected[index])] += 1

    async def streams() -> None:
        client = Client(port)
        while not stop.is_set():
            outcomes.streams[(await client.send(LONG, 2 * STOP_TIMEOUT)).stream_end] += 1
        client.close()

    work = [mix.repeat(port, requests, seed, stop, report_answer) for seed in range(callers)]
    tasks = [asyncio.ensure_future(each) for each in (*work, *(streams() for _ in range(callers // 4)))]
    try:
        await asyncio.sleep(LOAD_SECONDS)
        yield
        await asyncio.sleep(LOAD_SECONDS)
    finally:
        stop.set()
        await asyncio.gather(*tasks)


def restart(server: Server) -> int:
    """Stop a service with SIGTERM, start it again on its port, and return its exit status."""
    assert server.process
    server.process.send_signal(signal.SIGTERM)
    status = server.process.wait(STOP_TIMEOUT)
    server.start()
    return status


async def rolling(running: Sequence[Server], port: int, options: argparse.Namespace) -> tuple[Outcomes, list[int]]:
    """Restart each service in turn, ``rounds`` times. Return the outcomes and the exit statuses."""
    outcomes, statuses = Outcomes(), []
    async with running_callers(port, outcomes, options.callers):
        for server in [*running] * options.rounds:
            statuses.append(await asyncio.to_thread(restart, server))
            await asyncio.sleep(LOAD_SECONDS)
    return outcomes, statuses


def connections(worker: int, port: int) -> int:
    """Return the number of connections of a process to a local port."""
    try:
        found = psutil.Process(worker).net_connections("tcp")
    except psutil.Error:  # the process has ended
        return 0
    return sum(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in found)


async def replaced(server: Server, before: Collection[int]) -> float:
    """Return the seconds until a process that is not in ``before`` answers on a new connection, or infinity."""
    started = time.perf_counter()
    while time.perf_counter() - started < STOP_TIMEOUT:
        client = Client(server.port)  # a new connection goes to the least busy worker
        await client.send(Request("/health/live", method="GET"))
        result = any(connections(each.pid, server.port) for each in server.processes() if each.pid not in before)
        client.close()
        if result:
            return time.perf_counter() - started
        await asyncio.sleep(0.02)
    return math.inf


async def kill(server: Server, callers: int) -> tuple[Outcomes, int, float]:
    """Kill one of two workers under load.

    Returns the outcomes, the connections of the worker, and the seconds until a new worker answers.
    """
    outcomes = Outcomes()
    async with running_callers(server.port, outcomes, callers):
        before = [process.pid for process in server.processes()]
        victim = next(pid for pid in before if server.process and pid != server.process.pid)
        lost = connections(victim, server.port)
        os.kill(victim, signal.SIGKILL)
        back = await replaced(server, before)
    return outcomes, lost, back


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=2, help="rounds of restarts (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=8, help="number of callers (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    services = [servers.ours(folder, layout="1x1", shutdown_grace_seconds=STOP_SECONDS) for _ in range(SERVICES)]
    with ExitStack() as stack:
        for service in services:
            stack.enter_context(service.running())
        port = servers.free_port()
        stack.enter_context(nginx(folder, port, [service.port for service in services]))
        outcomes, statuses = asyncio.run(rolling(services, port, options))
    with servers.ours(folder, layout="2x1").running() as server:
        killed, connection_count, back = asyncio.run(kill(server, options.callers))
    lost = killed.sent["lost"] + killed.streams["lost"]
    table = report.figures(
        (f"requests of {options.callers} callers while each of {SERVICES} services behind nginx restarted "
         f"{options.rounds} times", outcomes.sent.total(), "requests"),
        ("requests without the right answer", outcomes.unexpected(), "requests"),
        ("long streams that finished", outcomes.streams["finished"], "streams"),
        (f"long streams that outlasted the grace period of {STOP_SECONDS} s and ended with an error event",
         outcomes.streams["announced"], "streams"),
        ("stops with exit status 0", statuses.count(0), f"of {len(statuses)} stops"),
        ("SIGKILL of one of two workers: lost requests on its connections", lost, "requests"),
        ("SIGKILL: requests without the right answer on other connections", killed.unexpected("lost"), "requests"),
        ("SIGKILL: time until the new worker answered", round(back, 2), "s"),
    )  # fmt: skip
    checks = (
        (outcomes.unexpected(), f"outcomes of the restarts: {outcomes.sent} {outcomes.streams}"),
        (any(statuses), f"exit statuses: {statuses}"),
        (killed.unexpected("lost"), f"outcomes of the kill: {killed.sent} {killed.streams}"),
        (lost > connection_count, f"{lost} lost requests, but the worker had {connection_count} connections"),
        (back > MAX_REPLACEMENT_SECONDS, f"a new worker answered after {back:.1f} s"),
    )
    return [table], [text for failed, text in checks if failed]
