"""Callers that send the next request when the last one is answered: ``wrk`` where it is installed, and our own.

Ours also keeps what came and when, so it is what measures streams, and whatever takes long.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any, cast

Figures = dict[str, float]

PATIENCE = 60.0  # seconds for one answer, in a crowd
FIRST = 20.0  # seconds for the first answers of a server
# Each of the bodies in turn. Percentiles are in microseconds; its own page of results rounds them.
SCRIPT = """
local bodies, i = {}, 0
function init(args)
  for at = 1, #args, 4 do
    local file, headers = io.open(args[at + 3], "rb"), {["Content-Type"] = args[at + 1]}
    if args[at + 2] ~= "-" then headers["Inference-Header-Content-Length"] = args[at + 2] end
    bodies[#bodies + 1] = wrk.format("POST", args[at], headers, file:read("*a"))
    file:close()
  end
end
function request() i = i % #bodies + 1; return bodies[i] end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("figures %d %d %d %f %f %f\\n", summary.requests, summary.duration, e.status + e.connect +
    e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(95), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Request:
    """A POST; ``kind`` is its Content-Type, ``length`` the bytes of JSON before the tensors of a binary request."""

    path: str
    body: bytes
    kind: str = "application/json"
    length: int | None = None

    def bytes(self) -> bytes:
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {self.kind}\r\n"
        if self.length is not None:
            head += f"Inference-Header-Content-Length: {self.length}\r\n"
        return f"{head}Content-Length: {len(self.body)}\r\n\r\n".encode() + self.body


@dataclass
class Answer:
    """``pieces``: when something came (seconds of ``perf_counter``) and what, without the head. Status 0: none came."""

    begun: float
    ended: float = math.nan
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


class Connection(asyncio.Protocol):
    """One caller's connection, kept alive. Parses as little of HTTP as it can: it runs beside the server."""

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport | None = None
        self.done: asyncio.Future[None] | None = None
        self.answer = Answer(math.nan)
        self.head = self.tail = b""
        self.left = -1  # bytes of the body; -1: it comes in chunks
        self.last = False  # whether the server ends the connection with this answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by its class

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.done and not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.answer.status:
            self.head += data
            if b"\r\n\r\n" not in self.head:
                return
            head, data = self.head.split(b"\r\n\r\n", 1)
            self.answer.status = int(head.split(b" ", 2)[1])
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            self.left = int(length[1]) if length else -1
            self.last = b"\r\nconnection: close" in head.lower()
        if data:
            self.answer.pieces.append((now, data))
        if self.left >= 0:
            self.left -= len(data)
            whole = self.left <= 0
        else:
            self.tail = (self.tail + data)[-7:]
            whole = self.tail in (b"\r\n0\r\n\r\n", b"0\r\n\r\n")  # the chunk of no bytes
        if whole and self.done and not self.done.done():
            self.answer.ended = now
            self.done.set_result(None)

    async def ask(self, request: bytes, patience: float = PATIENCE) -> Answer:
        """Send a request and wait for the whole answer."""
        assert self.transport
        self.answer, self.head, self.tail, self.left = Answer(time.perf_counter()), b"", b"", -1
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            async with asyncio.timeout(patience):
                await self.done
        except (OSError, TimeoutError):
            self.answer.status, self.answer.ended = 0, time.perf_counter()
            if self.transport:
                self.transport.abort()
        return self.answer


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


async def ask(port: int, request: Request) -> Answer:
    """One request on a connection of its own."""
    connection = await connect(port)
    answer = await connection.ask(request.bytes(), FIRST)
    if connection.transport:
        connection.transport.close()
    return answer


async def call(port: int, requests: Sequence[Request], callers: int, seconds: float) -> tuple[list[Answer], float]:
    """All answers to requests that were sent in so many seconds, however long they took, and when the time was up."""
    raw, turn, answers = [request.bytes() for request in requests], count(), []
    connections = [await connect(port) for _ in range(callers)]
    until = time.perf_counter() + seconds

    async def caller(connection: Connection) -> None:
        while time.perf_counter() < until:
            if connection.last and connection.transport:
                connection.transport.close()
            if connection.last or not connection.transport:
                connection = await connect(port)
            answers.append(await connection.ask(raw[next(turn) % len(raw)]))
        if connection.transport:
            connection.transport.close()

    await asyncio.gather(*map(caller, connections))
    return answers, until


def percentile(values: Sequence[float], part: float) -> float:
    """The value that ``part`` of 1 of the values do not exceed (nearest rank); not a number when there is none."""
    return sorted(values)[math.ceil(part * len(values)) - 1] if values else math.nan


def times(prefix: str, seconds: Sequence[float]) -> Figures:
    """50th, 95th and 99th percentile in milliseconds."""
    return {f"{prefix}p{part}": percentile(seconds, part / 100) * 1000 for part in (50, 95, 99)}


def summed(answers: Sequence[Answer], until: float, seconds: float) -> Figures:
    """Requests a second, latencies, errors.

    A request that was still running when the time was up counts for the part of it that lay before: else a long
    one would count by luck, and texts that run in step would all count or none.
    """
    good = [answer for answer in answers if answer.status == 200]
    parts = [(min(answer.ended, until) - answer.begun) / answer.seconds for answer in good]
    figures = {"per_second": sum(parts) / seconds, "errors": float(len(answers) - len(good))}
    return {**figures, **times("", [answer.seconds for answer in good])}


def streamed(answers: Sequence[Answer], until: float, seconds: float) -> Figures:
    """As ``summed``; and of the characters: how many a second, time to the first one, gaps between them."""
    firsts, gaps, characters, broken = [], [], 0, 0
    for answer in answers:
        came = [when for when, _ in arrivals(answer)]
        if not came or not answer.body.rstrip(b"0\r\n").endswith(b"data: [DONE]"):
            broken += answer.status == 200  # any other status is an error already
            continue
        firsts.append(came[0] - answer.begun)
        gaps += [later - earlier for earlier, later in pairwise(came)]
        characters += sum(when <= until for when in came)
    figures = summed(answers, until, seconds)
    figures["errors"] += broken
    return {**figures, "characters": characters / seconds, **times("first_", firsts), **times("gap_", gaps)}


def arrivals(answer: Answer) -> list[tuple[float, str]]:
    """When each character of a stream came, and which. Those that came together came at the same time.

    Lines that are no ``data:`` are the sizes of HTTP chunks; an event is never split over two chunks.
    """
    came: list[tuple[float, str]] = []
    rest = b""
    for when, piece in answer.pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                event: dict[str, Any] = json.loads(line[6:])
                came += [(when, character) for character in event.get("text", "")]
    return came


async def own(port: int, requests: Sequence[Request], callers: int, seconds: float) -> Figures:
    answers, until = await call(port, requests, callers, seconds)
    return summed(answers, until, seconds)


async def streams(port: int, requests: Sequence[Request], callers: int, seconds: float) -> Figures:
    answers, until = await call(port, requests, callers, seconds)
    return streamed(answers, until, seconds)


async def wrk(port: int, requests: Sequence[Request], callers: int, seconds: float) -> Figures:
    """The same with ``wrk``, of one thread. It runs for whole seconds, and leaves out what they cut off."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.lua").write_text(SCRIPT)
        arguments: list[str] = []
        for i, request in enumerate(requests):
            (folder / str(i)).write_bytes(request.body)
            length = "-" if request.length is None else str(request.length)
            arguments += [request.path, request.kind, length, str(folder / str(i))]
        options = ["-t1", f"-c{callers}", f"-d{math.ceil(seconds)}s", f"--timeout={PATIENCE:.0f}s"]
        command = ["wrk", *options, "-s", str(folder / "script.lua"), f"http://127.0.0.1:{port}", "--", *arguments]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            output = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
    found = re.search(r"^figures (.*)$", output, re.MULTILINE)
    if not found:
        raise RuntimeError(f"wrk failed: {output}")
    number, duration, errors, *latencies = map(float, found[1].split())
    if not number:  # wrk says 0 then
        latencies = [math.nan] * 3
    figures = {f"p{part}": latency / 1000 for part, latency in zip((50, 95, 99), latencies, strict=True)}
    return {"per_second": (number - errors) / duration * 1e6, "errors": errors, **figures}


def fast() -> bool:
    """Whether there is a load generator that takes less from the server than ours."""
    return shutil.which("wrk") is not None
