"""Load generators. Each caller sends its next request when its previous request is answered.

There are two load generators: the program ``wrk``, and the functions of this module. The functions of this module
record when each part of an answer arrives, so they always measure streams and long answers. For other requests, ``wrk``
is used if it is installed, because it needs less CPU time.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, pairwise
from pathlib import Path
from typing import Any, cast

Figures = dict[str, float]

ANSWER_TIMEOUT = 60.0  # seconds for one answer under load
# This script makes wrk send the bodies in rotation. It prints percentiles in microseconds, because wrk's own report
# rounds them.
SCRIPT = """
local bodies, i = {}, 0
function init(args)
  for at = 1, #args, 3 do
    local file = io.open(args[at + 2], "rb")
    bodies[#bodies + 1] = wrk.format("POST", args[at], {["Content-Type"] = args[at + 1]}, file:read("*a"))
    file:close()
  end
end
function request() i = i % #bodies + 1; return bodies[i] end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("figures %d %d %d %d %f %f %f\\n", summary.requests, summary.duration, e.status + e.timeout,
    e.connect + e.read + e.write, latency:percentile(50), latency:percentile(95), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Request:
    """A request, by default a POST request. ``kind`` is its Content-Type."""

    path: str
    body: bytes = b""
    kind: str = "application/json"
    method: str = "POST"

    @cached_property
    def raw(self) -> bytes:
        head = f"{self.method} {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {self.kind}\r\n"
        return f"{head}Content-Length: {len(self.body)}\r\n\r\n".encode() + self.body


@dataclass
class Answer:
    """An answer to a request. Status 0 means that there was no complete answer.

    ``chunks`` are the received parts of the body with their arrival times (``perf_counter``).
    """

    started: float
    ended: float = math.nan
    status: int = 0
    chunks: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(chunk for _, chunk in self.chunks)

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def succeeded(self) -> bool:
        """Return whether the status is 200 and the answer is not a stream that ended with an error event."""
        return self.status == 200 and b'data: {"error"' not in self.body

    @property
    def stream_end(self) -> str:
        """Return how a stream ended: ``finished``, ``announced`` (an error event), ``cut off``, ``lost`` or a status.

        This works for streams whose last event is ``[DONE]``.
        """
        if self.status != 200:
            return str(self.status) if self.status else "lost"
        if not self.body.rstrip(b"0\r\n").endswith(b"data: [DONE]"):
            return "cut off"
        return "finished" if self.succeeded else "announced"


@dataclass(frozen=True)
class Load:
    """All answers to a load, and the times (``perf_counter``) between which the load is measured.

    The measurement begins when every caller has received its first answer. Before this time, the callers wait shorter
    than later, because the queues of the server are still short.
    """

    answers: Sequence[Answer]
    begin: float
    end: float

    @property
    def measured(self) -> list[Answer]:
        """The answers that were complete after ``begin``, including those that were complete after ``end``."""
        return [answer for answer in self.answers if answer.ended > self.begin]


class Connection(asyncio.Protocol):
    """A keep-alive connection. It parses only what is needed, because it uses the same cores as the server."""

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport | None = None
        self.complete: asyncio.Future[None] | None = None
        self.answer = Answer(math.nan)
        self.head = self.tail = b""
        self.remaining = -1  # bytes of the body that have not arrived; -1 for a chunked body
        self.closes = False  # whether the server closes the connection after this answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's class does not inherit from it

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.complete and not self.complete.done():
            self.complete.set_exception(error or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.answer.status:
            self.head += data
            if b"\r\n\r\n" not in self.head:
                return
            head, data = self.head.split(b"\r\n\r\n", 1)
            self.answer.status = int(head.split(b" ", 2)[1])
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            self.remaining = int(length[1]) if length else -1
            self.closes = b"\r\nconnection: close" in head.lower()
        if data:
            self.answer.chunks.append((now, data))
        if self.remaining >= 0:
            self.remaining -= len(data)
            is_complete = self.remaining <= 0
        else:
            self.tail = (self.tail + data)[-7:]
            is_complete = self.tail in (b"\r\n0\r\n\r\n", b"0\r\n\r\n")  # the last chunk
        if is_complete and self.complete and not self.complete.done():
            self.answer.ended = now
            self.complete.set_result(None)


class Client:
    """One caller. It sends its requests on one connection, and opens a new one after the server has closed it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connection = Connection()

    async def send(self, request: Request, max_seconds: float = ANSWER_TIMEOUT) -> Answer:
        """Send a request and return its answer, with status 0 if there was no complete answer."""
        answer = Answer(time.perf_counter())
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(max_seconds):
                if not self.connection.transport or self.connection.closes:
                    self.close()
                    _, self.connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
                connection = self.connection
                connection.answer, connection.head, connection.tail, connection.remaining = answer, b"", b"", -1
                connection.complete = loop.create_future()
                assert connection.transport
                connection.transport.write(request.raw)
                await connection.complete
        except (OSError, TimeoutError):
            answer.status, answer.ended = 0, time.perf_counter()
            self.abort()
        return answer

    def abort(self) -> None:
        if self.connection.transport:
            self.connection.transport.abort()

    def close(self) -> None:
        if self.connection.transport:
            self.connection.transport.close()


async def send(port: int, request: Request) -> Answer:
    """Send one request on a new connection; return the answer."""
    client = Client(port)
    answer = await client.send(request)
    client.close()
    return answer


async def call(port: int, requests: Sequence[Request], callers: int, seconds: float) -> Load:
    """Send requests until ``seconds`` after every caller has received its first answer. Wait for all answers."""
    index, answers = count(), list[Answer]()
    waiting, begin = callers, math.inf

    async def caller() -> None:
        nonlocal waiting, begin
        client, is_first = Client(port), True
        while time.perf_counter() < begin + seconds:
            answers.append(await client.send(requests[next(index) % len(requests)]))
            waiting -= is_first
            if is_first and not waiting:
                begin = answers[-1].ended
            is_first = False
        client.close()

    await asyncio.gather(*(caller() for _ in range(callers)))
    return Load(answers, begin, begin + seconds)


def percentile(values: Sequence[float], part: float) -> float:
    """Return the percentile ``part`` (0 to 1) by nearest rank, or NaN if there are no values."""
    return sorted(values)[math.ceil(part * len(values)) - 1] if values else math.nan


def percentiles(prefix: str, seconds: Sequence[float]) -> Figures:
    """Return the 50th, 95th and 99th percentile in milliseconds."""
    return {f"{prefix}p{part}": percentile(seconds, part / 100) * 1000 for part in (50, 95, 99)}


def summary(load: Load) -> Figures:
    """Return requests per second, latencies and errors.

    A request that ran only partly during the measurement counts as a fraction: the share of its duration during the
    measurement. Otherwise, if many long requests run at the same time, either all of them or none of them would count.
    """
    successful = [answer for answer in load.measured if answer.succeeded]
    parts = [(min(answer.ended, load.end) - max(answer.started, load.begin)) / answer.seconds for answer in successful]
    figures = {
        "per_second": sum(parts) / (load.end - load.begin),
        "errors": float(sum(not answer.succeeded for answer in load.answers)),
    }
    return {**figures, **percentiles("", [answer.seconds for answer in successful])}


def stream_summary(load: Load) -> Figures:
    """Return the figures of ``summary``, and also figures of streams.

    These are the characters per second, the time to the first character and the time between two characters. A stream
    without characters or without its last event is an error.
    """
    firsts, gaps, characters = [], [], 0
    answers: list[Answer] = []
    for answer in load.answers:
        times = [arrival for arrival, _ in arrivals(answer)]
        if not times or answer.stream_end != "finished":
            answers.append(replace(answer, status=0))
            continue
        answers.append(answer)
        characters += sum(load.begin < arrival <= load.end for arrival in times)
        if answer.ended > load.begin:
            firsts.append(times[0] - answer.started)
            gaps += [later - earlier for earlier, later in pairwise(times)]
    figures = summary(replace(load, answers=answers))
    figures["characters"] = characters / (load.end - load.begin)
    return {**figures, **percentiles("first_", firsts), **percentiles("gap_", gaps)}


def arrivals(answer: Answer) -> list[tuple[float, str]]:
    """Return the arrival time and the value of each character of a stream.

    The lines without ``data:`` are the sizes of HTTP chunks. They are ignored, because no event is split over two
    chunks.
    """
    characters: list[tuple[float, str]] = []
    rest = b""
    for arrival, chunk in answer.chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                event: dict[str, Any] = json.loads(line[6:])
                characters += [(arrival, character) for character in event.get("text", "")]
    return characters


async def wrk(port: int, requests: Sequence[Request], callers: int, seconds: float) -> Figures:
    """Measure with ``wrk`` on one thread.

    ``wrk`` runs for whole seconds and ignores requests that are unfinished at the end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.lua").write_text(SCRIPT)
        arguments: list[str] = []
        for i, request in enumerate(requests):
            (folder / str(i)).write_bytes(request.body)
            arguments += [request.path, request.kind, str(folder / str(i))]
        options = ["-t1", f"-c{callers}", f"-d{math.ceil(seconds)}s", f"--timeout={ANSWER_TIMEOUT:.0f}s"]
        command = ["wrk", *options, "-s", str(folder / "script.lua"), f"http://127.0.0.1:{port}", "--", *arguments]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            output = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
    result = re.search(r"^figures (.*)$", output, re.MULTILINE)
    if not result:
        raise RuntimeError(f"wrk failed: {output}")
    # wrk counts answers with error statuses and late answers as requests, but not requests without an answer.
    number, duration, failed, unanswered, *latencies = map(float, result[1].split())
    if not number:  # without requests, wrk prints 0 for the percentiles
        latencies = [math.nan] * 3
    figures = {f"p{part}": latency / 1000 for part, latency in zip((50, 95, 99), latencies, strict=True)}
    return {"per_second": (number - failed) / duration * 1e6, "errors": failed + unanswered, **figures}
