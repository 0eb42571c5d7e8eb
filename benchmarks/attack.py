"""Attack test: measure the latency of a normal client while other clients attack the service.

    python -m benchmarks attack                                  # all attacks
    python -m benchmarks attack --seconds 3 --only trailers,bombs

The latency of the normal client is measured before each attack, during it, and ten seconds after its end. The attackers
use the same cores as the service, so they run in a process of lower priority. The test fails if

- the 99th percentile of the latency during an attack is more than 5 times its value before the attack,
- the 99th percentile after an attack is more than twice its value before the attack,
- the normal client gets an error, or an answer after more than two seconds,
- or the memory of the service (PSS of all processes) exceeds 1,200 MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import io
import json
import multiprocessing
import os
import resource
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.support import report, servers
from benchmarks.support.load import Request, call, percentile
from benchmarks.support.servers import ROOT, Server

CALLERS = 2  # number of connections of the normal client
MAX_RATIO = 5.0  # largest allowed ratio of the p99 during an attack to the p99 before the attack
MAX_RATIO_AFTER = 2.0  # largest allowed ratio of the p99 after an attack to the p99 before the attack
MAX_SECONDS = 2.0  # a slower answer counts as failed; the p99 does not show a service that pauses once
RECOVERY_SECONDS = 10.0
MEMORY_LIMIT = 1200.0  # MiB, for two workers and two imports, which take 300 MiB each
SAMPLE_SECONDS = 0.5
START_SECONDS = 1.0  # time until an attack has its full effect
NICENESS = 10  # gives the attackers' process a lower priority
ADMIN_KEY = "a key for the attack test"
CLASSIFY, INFER = "/v1/images/classify", "/v2/models/series-lstm/infer"
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
BIG = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 30000000\r\n\r\n" % CLASSIFY.encode()

COLUMNS = {"attack": None, "connections": 0, "p99 alone, ms": 1, "during the attack": 1, "ratio": 1, "after 10 s": 1,
           "failed normal requests": 0, "largest PSS, MiB": 0}  # fmt: skip

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def post(path: str, body: bytes, *headers: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def image_file(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@cache
def large_images() -> list[bytes]:
    """Return two images with 49 million pixels: a PNG of one colour, and a JPEG of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    return [image_file(np.zeros((7000, 7000), np.uint8), "PNG"), image_file(np.tile(noise, (10, 10, 1)), "JPEG")]


@cache
def tall_images() -> list[bytes]:
    """Return requests with an RGBA PNG of 1 x 49,999,999 pixels, and with TIFFs of a strip for each row."""
    packer, row = zlib.compressobj(1), bytes(5)  # each row begins with its filter
    pixels = b"".join(packer.compress(row * 999_999) for _ in range(50)) + packer.compress(row * 49) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">II5B", 1, 49_999_999, 8, 6, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b""))
    tall = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return [
        post(CLASSIFY, tall),
        post(CLASSIFY, striped_tiff(8, 1_000_000)),
        post(CLASSIFY, striped_tiff(3000, 16_384)),
    ]


def striped_tiff(width: int, height: int) -> bytes:
    """Return a grey TIFF whose rows are all the same strip."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: 122 + 4 * height}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, height if tag in (273, 279) else 1, value) for tag, value in tags.items()
    )
    lists = struct.pack("<I", 122 + 8 * height) * height + struct.pack("<I", width) * height
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + lists + bytes(width)


@cache
def image_batches() -> list[bytes]:
    """Return requests with 12 PNGs of 49 million pixels. Every second request has a deadline of 1 s."""
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n%b\r\n'
    form, kind = part % large_images()[0] * 12 + b"--x--\r\n", "Content-Type: multipart/form-data; boundary=x"
    return [post(CLASSIFY, form, kind), post(CLASSIFY, form, kind, "x-request-timeout: 1")]


@cache
def bombs() -> list[bytes]:
    zeros = gzip.compress(bytes(2**30))  # 1 GiB, compressed to 1 MiB
    return [post(INFER, zeros, "Content-Encoding: gzip"), post(CLASSIFY, large_images()[0])]


@cache
def large_bodies() -> list[bytes]:
    """Return requests with JSON near the service's limits of bytes, values, fields and nesting depth."""
    values = json.dumps({"values": [0.1234567890123456] * 100_000}).encode()
    encoded = base64.b64encode(large_images()[1]).decode()
    scored = json.dumps({"prompt": "a" * 4000, "echo": True, "logprobs": 5, "max_tokens": 0}).encode()
    return [
        post("/v1/series/forecast", values),
        post("/v1/series/forecast", b'{"values": ' + b"[" * 2_000_000),
        post("/v1/completions", scored),
        post("/v1/text/continue", json.dumps({f"field{i}": i for i in range(2000)}).encode()),
        post(CLASSIFY, json.dumps({"images": [encoded]}).encode(), "Content-Type: application/json"),
    ]


@cache
def imports() -> list[bytes]:
    """Return imports of 100 MiB of zeros in an archive, and of 30 ONNX functions that each call the next one twice."""
    from onnx import TensorProto, helper

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.onnx", bytes(100 * 2**20))
    opsets, functions = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)], []
    for level in range(30):
        call = partial(helper.make_node, f"F{level + 1}" if level < 29 else "Neg", domain="own" if level < 29 else "")
        nodes = [call(["x"], ["h"]), call(["h"], ["y"])]
        functions.append(helper.make_function("own", f"F{level}", ["x"], ["y"], nodes, opsets))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("F0", ["x"], ["y"], domain="own")], "net", [x], [y])
    model = helper.make_model(graph, functions=functions, opset_imports=opsets)
    path, key = "/v1/admin/add?name=net", f"Authorization: Bearer {ADMIN_KEY}"
    return [post(path, body, key) for body in (archive.getvalue(), model.SerializeToString())]


async def drip(writer: asyncio.StreamWriter, drop: bytes) -> None:
    """Send ``drop`` every second, until the service closes the connection."""
    while not writer.is_closing():
        writer.write(drop)
        await writer.drain()
        await asyncio.sleep(1)


async def pour(writer: asyncio.StreamWriter, part: bytes) -> None:
    """Send ``part`` again and again, without a pause, until the service closes the connection."""
    while not writer.is_closing():
        writer.write(part)
        await writer.drain()


async def slow_head(streams: Streams, _: int) -> None:
    streams[1].write(b"GET / HTTP/1.1\r\n")
    await drip(streams[1], b"x: y\r\n")


async def slow_body(streams: Streams, _: int) -> None:
    streams[1].write(BIG + bytes(50_000))
    await drip(streams[1], b"x")


async def slow_trailer(streams: Streams, _: int) -> None:
    streams[1].write(CHUNKED % b"/v1/images/sample" + b'b\r\n{"count":1}\r\n0\r\n')
    await streams[1].drain()
    await drip(streams[1], b"x: y\r\n")


async def endless_trailer(streams: Streams, number: int) -> None:
    streams[1].write(CHUNKED % (b"/v1/images/sample" if number % 2 else b"/nothing") + b"1\r\n{\r\n0\r\n")
    await streams[1].drain()
    streams[1].write(b"x: ")
    await pour(streams[1], b"y" * 65536)


async def framing(streams: Streams, number: int) -> None:
    streams[1].write(CHUNKED % CLASSIFY.encode())
    await pour(streams[1], b"1\r\nx\r\n" * 10_000 if number % 2 else b"1;%s\r\nx\r\n" % (b"y" * 60_000))


async def slow_reader(streams: Streams, _: int) -> None:
    reader, writer = streams
    writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
    connected = True
    while connected:
        await asyncio.sleep(1)
        connected = bool(await reader.read(1024))


async def idle(streams: Streams, _: int) -> None:
    await streams[0].read()


async def short_connection(streams: Streams, number: int) -> None:
    if number % 2:
        streams[1].write(b"GET / HTTP/1.1\r\n")
    await asyncio.sleep(0.01)


async def header_tricks(streams: Streams, number: int) -> None:
    tricks = (
        b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 12_000 + b"\r\n",
        b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 60_000),
        GET * 5000,
        b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000,
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: evil.example\r\nCookie: " + b"a=b; " * 10_000 + b"\r\n\r\n",
    )
    reader, writer = streams
    writer.write(tricks[number % len(tricks)])
    await writer.drain()
    async with asyncio.timeout(1):
        while await reader.read(65536):
            pass


def exchange(requests: Callable[[], Sequence[bytes]]) -> Callable[[Streams, int], Awaitable[None]]:
    """Return an attack that sends the requests one after the other on a connection, and reads each response."""

    async def send(streams: Streams, number: int) -> None:
        reader, writer = streams
        for request in requests()[number % len(requests()) :]:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0] or 0)
            await reader.readexactly(length)

    return send


@dataclass(frozen=True)
class Attack:
    """An attack: each of ``connections`` attackers calls ``act`` again and again, each time with a new connection."""

    title: str
    connections: int
    act: Callable[[Streams, int], Awaitable[None]]


ATTACKS = {
    "heads": Attack("slow heads: a header per second", 500, slow_head),
    "bodies": Attack("slow bodies: a byte per second", 200, slow_body),
    "slow-trailers": Attack("slow trailers: a field per second", 200, slow_trailer),
    "trailers": Attack("trailers without end", 4, endless_trailer),
    "chunks": Attack("chunks of one byte, endless chunk extensions", 4, framing),
    "readers": Attack("slow readers: 1 KiB per second of 11 MiB", 100, slow_reader),
    "connections": Attack("idle connections", 2000, idle),
    "flood": Attack("connections that are closed at once", 50, short_connection),
    "headers": Attack("header tricks: many, long, contradictory, pipelined", 4, header_tricks),
    "bombs": Attack("decompression bombs: 1 GiB in gzip, 49 million pixels in PNG", 4, exchange(bombs)),
    "images": Attack("images of 49 million pixels", 2, exchange(lambda: [post(CLASSIFY, large_images()[1])])),
    "tall": Attack(
        "tall images: a PNG of 1 x 49,999,999 pixels, TIFFs with a strip for each row", 4, exchange(tall_images)
    ),
    "batches": Attack(
        "batches of 12 PNGs of 49 million pixels, every second with a deadline", 4, exchange(image_batches)
    ),
    "json": Attack("JSON at its limits", 4, exchange(large_bodies)),
    "imports": Attack("imports of 100 MiB of zeros, and of ONNX functions with 2^30 calls", 2, exchange(imports)),
}


# Functions that prepare the data of an attack before it starts
PREPARED = {
    "bombs": (bombs,),
    "images": (large_images,),
    "tall": (tall_images,),
    "batches": (image_batches,),
    "json": (large_bodies,),
    "imports": (imports,),
}


async def run_attack(attack: Attack, port: int, seconds: float) -> None:
    """Run an attack on the service at ``port`` for ``seconds``."""

    async def attacker(number: int) -> None:
        while True:
            writer = None
            with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                await attack.act((reader, writer), number)
            if writer:
                writer.transport.abort()
            number += 1
            await asyncio.sleep(0.001)

    attackers = [asyncio.create_task(attacker(number)) for number in range(attack.connections)]
    await asyncio.wait(attackers, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in attackers:
        task.cancel()
    for result in await asyncio.gather(*attackers, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


def attack_in_process(name: str, port: int, seconds: float, pipe: Connection) -> None:
    """Prepare the data, wait for the start signal in ``pipe``, then attack.

    This function runs in a separate process.
    """
    os.nice(NICENESS)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 10_000), hard))
    for prepare in PREPARED.get(name, ()):
        prepare()
    pipe.send("ready")
    pipe.recv()
    asyncio.run(run_attack(ATTACKS[name], port, seconds))


def normal_requests() -> list[Request]:
    """Return the requests of the normal client: a picture, a forecast, a text, and the readiness."""
    picture = next((ROOT / "tests" / "images" / "cifar10").glob("*.png")).read_bytes()
    values = json.loads((ROOT / "docs" / "sine.json").read_text())["values"]
    return [
        Request(CLASSIFY, picture, "image/png"),
        Request("/v1/series/forecast", json.dumps({"values": values, "horizon": 10}).encode()),
        Request("/v1/text/continue", b'{"prompt": "ROMEO:", "max_characters": 20, "seed": 1}'),
        Request("/health/ready", method="GET"),
    ]


async def memory_peak(server: Server, seconds: float) -> float:
    """Return the largest PSS of the server during ``seconds``, in MiB."""
    peak, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        peak = max(peak, await asyncio.to_thread(server.memory))
        await asyncio.sleep(SAMPLE_SECONDS)
    return peak


async def measure(server: Server, name: str, seconds: float) -> list[Any]:
    """Measure the normal client before, during and after an attack. Return a row with the columns ``COLUMNS``."""
    attack, requests, spawn = ATTACKS[name], normal_requests(), multiprocessing.get_context("spawn")
    pipe, other_end = spawn.Pipe()
    arguments = (name, server.port, seconds + START_SECONDS, other_end)
    process = spawn.Process(target=attack_in_process, args=arguments, daemon=True)
    process.start()
    other_end.close()  # otherwise ``pipe.recv`` does not notice the end of the process
    await asyncio.to_thread(pipe.recv)
    alone = await call(server.port, requests, CALLERS, seconds)
    pipe.send("start")
    await asyncio.sleep(START_SECONDS)
    during, peak = await asyncio.gather(call(server.port, requests, CALLERS, seconds), memory_peak(server, seconds))
    await asyncio.to_thread(process.join)
    if process.exitcode:
        raise RuntimeError(f"the attackers failed: {attack.title}")
    await asyncio.sleep(RECOVERY_SECONDS)
    after = await call(server.port, requests, CALLERS, seconds)
    loads = [load.answers for load in (alone, during, after)]
    errors = sum(answer.status != 200 or answer.seconds > MAX_SECONDS for answers in loads for answer in answers)
    # For a request without an answer, the latency is the time until it failed.
    before, beside, later = (1000 * percentile([answer.seconds for answer in answers], 0.99) for answers in loads)
    return [attack.title, attack.connections, before, beside, beside / before, later, errors, peak]


def failures(row: Sequence[Any]) -> list[str]:
    """Return the exceeded limits of an attack."""
    title, _, before, _, ratio, after, errors, peak = row
    checks = (
        (ratio > MAX_RATIO, f"the p99 is {ratio:.1f} times that without the attack"),
        (after > MAX_RATIO_AFTER * before, f"the p99 after the attack is {after:.0f} ms"),
        (errors, f"{errors} requests of the normal client failed"),
        (peak > MEMORY_LIMIT, f"the memory is {peak:.0f} MiB"),
    )
    return [f"{title}: {text}" for exceeded, text in checks if exceeded]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=20, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument("--only", default=",".join(ATTACKS), help="attacks, separated by commas (default: all)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    rows = []
    shutil.copytree(ROOT / "models_store", folder / "store")
    with servers.ours(folder, folder / "store", admin_key=ADMIN_KEY).running() as server:
        asyncio.run(call(server.port, normal_requests(), CALLERS, 2))  # warm up
        for name in options.only.split(","):
            rows.append(asyncio.run(measure(server, name, options.seconds)))
            print(*rows[-1], flush=True)
    return [report.table("", COLUMNS, rows)], [failure for row in rows for failure in failures(row)]
