"""Services behind the proxy of deploy/, each stopped and started again in turn under load; then a worker killed.

    python -m benchmarks.reliability.restarts                           # four services, twice round; needs nginx
    python -m benchmarks.reliability.restarts --rounds 1 --callers 4

Callers ask for everything there is (``mix``) and hold each answer against the one that the same request had before.
Beside them long streams are written that outlast a stop: these must say so at their end. Then one service of two
workers is asked by the same callers without a proxy, and one of its workers is killed with SIGKILL. Ends with 1 when a
request failed, a stream ended without a word, or the kill cost more than the requests of the worker that was killed.
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
STOP_SECONDS = 2  # that a service has to finish what runs: less than the long streams take
BACK = 5.0  # seconds until another worker answers in place of one that was killed
PATIENCE = 60.0  # seconds for a service to end
DIFFERENT = 200  # requests that are asked again and again
BEFORE = 3.0  # seconds of load before the first stop, between two, and before and after the kill
LONG = Request("/v1/text/continue", b'{"prompt": "ROMEO:", "max_characters": 4000, "stream": true}')


@dataclass
class Seen:
    """What became of the requests: ``right``, ``told`` (a stream), ``lost`` (no answer), ``wrong``, or a status."""

    asked: Counter[str] = field(default_factory=Counter)
    streams: Counter[str] = field(default_factory=Counter)  # the long ones
    ended: list[tuple[str, Answer]] = field(default_factory=list)  # of those in ``asked``
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"stop": [], "start": []})
    statuses: Counter[int] = field(default_factory=Counter)  # of the services, when they ended


def proxy_file(folder: Path, port: int, upstreams: Sequence[int]) -> Path:
    """deploy/nginx.conf for services on this machine, in a folder of its own."""
    text = (ROOT / "deploy" / "nginx.conf").read_text().replace("listen 8080", f"listen 127.0.0.1:{port}")
    first, *others = re.findall(r"^ *server quartet-\d+:8000.*\n", text, re.MULTILINE)
    for line in others:
        text = text.replace(line, "")
    lines = [re.sub(r"quartet-\d+:8000", f"127.0.0.1:{upstream}", first) for upstream in upstreams]
    text = re.sub(r"/tmp/(nginx[\w.-]*)", rf"{folder}/\1", text.replace(first, "".join(lines)))
    folder.chmod(0o755)  # started by root, its workers are another user
    (folder / "nginx.conf").write_text(text)
    return folder / "nginx.conf"


@contextmanager
def nginx(folder: Path, port: int, upstreams: Sequence[int]) -> Iterator[None]:
    """The proxy in front of services that answer already."""
    file = proxy_file(folder, port, upstreams)
    command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(file), "-g", "daemon off;"]
    proxy = Server("nginx", command, port, folder / "nginx.log")
    proxy.start()
    try:
        yield
    finally:
        proxy.stop()


def outcome(ask: mix.Ask, answer: Answer, right: Any) -> str:
    """One word of an answer; see ``FileStamps``."""
    if answer.status == 0:
        return "lost"
    if mix.same(ask.kind, mix.read(ask, answer), right):
        return "right"
    if ask.kind == "stream":
        return ended(answer)
    return "wrong" if answer.status < 429 else str(answer.status)


def ended(answer: Answer) -> str:
    """How a stream ended: ``finished``, ``told`` why not, or ``cut off``."""
    if answer.status != 200:
        return str(answer.status) if answer.status else "lost"
    if not answer.body.rstrip(b"0\r\n").endswith(b"data: [DONE]"):
        return "cut off"
    return "told" if b'data: {"error"' in answer.body else "finished"


@asynccontextmanager
async def asked(
    port: int, wanted: Sequence[mix.Ask], right: Sequence[Any], seen: Seen, callers: int
) -> AsyncIterator[None]:
    """So many callers while the block runs, and one of a long stream for every four; then until they are answered."""
    stop = asyncio.Event()

    async def mixed(seed: int) -> None:
        chance = random.Random(seed)
        connection: Connection | None = None
        while not stop.is_set():
            at = chance.randrange(len(wanted))
            connection = await mix.kept(connection, port)
            answer = await connection.ask(wanted[at].request.bytes())
            word = outcome(wanted[at], answer, right[at])
            seen.asked[word] += 1
            seen.ended.append((word, answer))
        _close(connection)

    async def streams() -> None:
        connection: Connection | None = None
        while not stop.is_set():
            connection = await mix.kept(connection, port)
            seen.streams[ended(await connection.ask(LONG.bytes(), 2 * PATIENCE))] += 1
        _close(connection)

    calls = [
        asyncio.ensure_future(call) for call in (*map(mixed, range(callers)), *(streams() for _ in range(callers // 4)))
    ]
    try:
        await asyncio.sleep(BEFORE)
        yield
        await asyncio.sleep(BEFORE)
    finally:
        stop.set()
        await asyncio.gather(*calls)


def _close(connection: Connection | None) -> None:
    if connection and connection.transport:
        connection.transport.close()


def restart(server: Server, seen: Seen) -> None:
    """Stop a service as an operator does, wait for its end, and start it again on its port."""
    process, begun = server.process, time.perf_counter()
    assert process
    process.send_signal(signal.SIGTERM)
    seen.statuses[process.wait(PATIENCE)] += 1
    seen.seconds["stop"].append(time.perf_counter() - begun)
    seen.seconds["start"].append(server.start())


async def rolling(running: Sequence[Server], port: int, options: argparse.Namespace) -> Seen:
    """Each service in turn, so many times round."""
    wanted, seen = mix.asks(DIFFERENT, 0), Seen()
    right = await mix.answers(port, wanted, 1)
    async with asked(port, wanted, right, seen, options.callers):
        for _ in range(options.rounds):
            for server in running:
                await asyncio.to_thread(restart, server, seen)
                await asyncio.sleep(BEFORE)
    return seen


def connections(worker: int, port: int) -> int:
    """How many connections to a local port a process holds."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = {line[9] for line in lines if int(line[1].split(":")[1], 16) == port and line[3] == "01"}
    held = 0
    with suppress(FileNotFoundError):  # it has ended
        for descriptor in Path(f"/proc/{worker}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                held += os.readlink(descriptor).removeprefix("socket:[").removesuffix("]") in established
    return held


async def replaced(server: Server, before: Collection[int]) -> float:
    """Seconds until a process that was not there ``before`` has answered on a connection of its own."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < PATIENCE:
        connection = await mix.kept(None, server.port)  # goes to the worker with least to do
        await connection.ask(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        found = any(connections(pid, server.port) for pid in server.pids() if pid not in before)
        _close(connection)
        if found:
            return time.perf_counter() - begun
        await asyncio.sleep(0.02)
    return math.inf


async def kill(server: Server, callers: int) -> dict[str, Any]:
    """Kill one of two workers under load: what it cost, and how long until there were two again."""
    wanted, seen = mix.asks(DIFFERENT, 0), Seen()
    right = await mix.answers(server.port, wanted, 1)
    async with asked(server.port, wanted, right, seen, callers):
        before = server.pids()
        victim = next(pid for pid in before if server.process and pid != server.process.pid)
        held = connections(victim, server.port)
        os.kill(victim, signal.SIGKILL)
        begun = time.perf_counter()
        back = await replaced(server, before)
    lost = [answer.ended - begun for word, answer in seen.ended if word == "lost"]
    return {
        "requests": seen.asked.total(), **seen.asked, **{f"streams {word}": n for word, n in seen.streams.items()},
        "connections of the killed": held, "all lost": len(lost) + seen.streams["lost"],
        "last loss after ms": round(1000 * max(lost, default=0.0), 1), "back after s": round(back, 2),
    }  # fmt: skip


def figures(seen: Seen) -> dict[str, Any]:
    """Of the rolling restart."""
    latencies = [answer.seconds for _, answer in seen.ended]
    return {
        "requests": seen.asked.total(), **seen.asked, **{f"streams {word}": n for word, n in seen.streams.items()},
        "restarts": len(seen.seconds["stop"]), "exit statuses": sorted(seen.statuses),
        **{f"longest {name} s": round(max(took), 2) for name, took in seen.seconds.items()},
        "p50 ms": round(1000 * percentile(latencies, 0.5), 1), "p99 ms": round(1000 * percentile(latencies, 0.99), 1),
    }  # fmt: skip


def show(title: str, found: dict[str, Any]) -> None:
    print(f"\n| {title} | |\n|---|--:|")
    for key, value in found.items():
        print(f"| {key} | {value} |")
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--callers", type=int, default=8)
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
        one = servers.ours(folder, ROOT / "models_store", "2x1")
        try:
            for service in services:
                service.start()
            port = servers.free_port()
            with nginx(folder, port, [service.port for service in services]):
                seen = asyncio.run(rolling(services, port, options))
            for service in services:
                service.stop()
            show("rolling restart", figures(seen))
            one.start()
            cost = asyncio.run(kill(one, options.callers))
            show("a worker killed", cost)
        finally:
            for service in (*services, one):
                service.stop()
    well = seen.asked.keys() <= {"right", "told"} and seen.streams.keys() <= {"finished", "told"}
    alone = cost["all lost"] <= cost["connections of the killed"] and cost["back after s"] <= BACK
    sys.exit(not (well and alone and set(seen.statuses) == {0}))


if __name__ == "__main__":
    main()
