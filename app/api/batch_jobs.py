"""Run batch jobs: send each line of their inputs to its endpoint, when no other request waits."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import ASGIApp, Message

from app.api.middleware.api_keys import CALLER
from app.records.batches import MAX_AGE_SECONDS, Batches, LeaseLost, Row
from app.serving.models import Models

log = logging.getLogger("quartet")

POLL_SECONDS = 1.0
PARALLEL = 4  # lines at the same time, so that texts are computed together
RENEW_SECONDS = 5.0
MAX_WAIT_SECONDS = 1.0  # a line waits at most this long for an idle service, so that a busy service makes progress
MAX_LINES = 50_000  # as OpenAI
MAX_PROBLEMS = 100


@dataclass(frozen=True)
class Line:
    number: int
    custom_id: str
    body: bytes


async def run_batches(app: ASGIApp, models: Models, batches: Batches) -> None:
    """Run jobs until this coroutine is cancelled. ``app`` answers the requests."""
    while True:
        try:
            if job := await asyncio.to_thread(batches.claim):
                await _run(app, models, batches, job)
                continue
        except LeaseLost:
            log.warning("a batch job took so long that another process continues it")
        except (sqlite3.Error, OSError) as error:
            log.error("batch jobs cannot be read or stored: %s", error)
        await asyncio.sleep(POLL_SECONDS)


async def _run(app: ASGIApp, models: Models, batches: Batches, job: Row) -> None:
    run, batch = asyncio.to_thread, job["id"]
    try:
        lines = list(parse_lines(await run(batches.content, job["key"], job["input"]), job["endpoint"]))
    except Exception as error:  # the file was deleted
        lines = [{"code": "invalid_file", "message": str(error), "line": None}]
    problems = [line for line in lines if not isinstance(line, Line)][:MAX_PROBLEMS]
    if problems:
        await run(lambda: batches.finish(job, "failed", problems))
        return
    done = await run(batches.done, batch)
    waiting = iter([line for line in lines if isinstance(line, Line) and line.number not in done])
    if job["status"] == "validating":
        await run(lambda: batches.update(batch, status="in_progress", total=len(lines), started=time.time()))
    ending = ""

    async def send_lines() -> None:
        for line in waiting:
            await models.idle(MAX_WAIT_SECONDS)
            if ending:
                return
            status, body = await answer(app, job["endpoint"], line.body, job["key"], f"{batch}-{line.number}")
            await run(batches.add_line, batch, line.number, line.custom_id, status, body)

    async def renew() -> None:
        nonlocal ending
        while not ending:
            await asyncio.sleep(RENEW_SECONDS)
            if await run(lambda: batches.update(batch)) == "cancelling":
                ending = "cancelled"
            elif time.time() > job["created"] + MAX_AGE_SECONDS:
                ending = "expired"

    try:
        async with asyncio.TaskGroup() as group:
            renewal = group.create_task(renew())
            await asyncio.gather(*(group.create_task(send_lines()) for _ in range(PARALLEL)))
            renewal.cancel()
    except ExceptionGroup as errors:
        if isinstance(errors.exceptions[0], (LeaseLost, sqlite3.Error, OSError)):
            raise errors.exceptions[0] from None
        log.exception("batch job %s failed", batch)
        ending = "failed"
    if not ending and await run(lambda: batches.update(batch)) == "cancelling":
        ending = "cancelled"
    await run(lambda: batches.finish(job, ending or "completed"))


def parse_lines(content: bytes, endpoint: str) -> Iterator[Line | dict[str, Any]]:
    """Yield the lines of an input and, for each invalid line, a problem as in OpenAI's API."""
    known: set[str] = set()
    lines = content.splitlines()
    if len(lines) > MAX_LINES:
        yield {
            "code": "too_many_lines",
            "message": f"the file has {len(lines):,} lines; the maximum is {MAX_LINES:,}",
            "line": None,
        }
        return
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        problem, custom_id, body = "", None, None
        try:
            fields = orjson.loads(text)
            custom_id, body = fields.get("custom_id"), fields.get("body")
            if not isinstance(custom_id, str) or custom_id in known:
                problem = "custom_id should be a text that no other line has"
            elif (fields.get("method"), fields.get("url")) != ("POST", endpoint):
                problem = f"method should be POST, and url {endpoint}, as in the batch"
            elif not isinstance(body, dict) or body.get("stream"):
                problem = "body should be an object without stream"
        except (ValueError, AttributeError):
            problem = "the line should be a JSON object"
        if problem:
            yield {"code": "invalid_line", "message": problem, "line": number}
        else:
            known.add(str(custom_id))
            yield Line(number, str(custom_id), orjson.dumps(body))
    if not known:
        yield {"code": "empty_file", "message": "the file has no valid line", "line": None}


async def answer(app: ASGIApp, path: str, body: bytes, key: str | None, request_id: str) -> tuple[int, str]:
    """Return the status and the body of the answer to a request. It is sent again if the service is overloaded."""
    while True:
        status, headers, content = await _send(app, path, body, key, request_id)
        if status not in (429, 503):
            return status, content.decode()
        await asyncio.sleep(max(1.0, float(headers.get(b"retry-after", b"1"))))


async def _send(
    app: ASGIApp, path: str, body: bytes, key: str | None, request_id: str
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Return the status, the headers and the body of the answer of an ASGI application."""
    sent, answer = asyncio.Event(), list[Message]()

    async def receive() -> Message:
        if sent.is_set():
            await asyncio.Future()  # the client never disconnects
        sent.set()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        answer.append(message)

    names = {"host": "localhost", "content-type": "application/json", "x-request-id": request_id}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in names.items()],
        "client": None,
        "server": None,
        CALLER: key,
    }
    await app(scope, receive, send)
    start, *parts = answer
    return start["status"], dict(start["headers"]), b"".join([part.get("body", b"") for part in parts])
