"""Run batch jobs: send each line of their inputs to its endpoint, when no other request waits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from starlette.types import ASGIApp, Message

from app.api.middleware.api_keys import CALLER
from app.errors import NotFound
from app.records.batches import Batch, Batches, LeaseLost
from app.records.database import RecordsUnavailable
from app.serving.models import Models

log = logging.getLogger("quartet")

PARALLEL = 4  # lines at the same time, so that texts are computed together
RENEW_SECONDS = 5.0
MAX_WAIT_SECONDS = 1.0  # a line waits at most this long for an idle service, so that a busy service makes progress
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
            if claimed := await asyncio.to_thread(batches.claim):
                await _run(app, models, batches, *claimed)
                continue
        except* LeaseLost:
            log.warning("a batch job took so long that another process continues it")
        except* RecordsUnavailable as errors:
            log.error("batch jobs: %s", errors.exceptions[0])
        except* Exception:
            log.exception("batch jobs failed")
        await asyncio.sleep(models.settings.limits.batch_poll_seconds)


async def _run(app: ASGIApp, models: Models, batches: Batches, key: str | None, job: Batch) -> None:
    run, batch, path, status = asyncio.to_thread, job["id"], job["endpoint"], str(job["status"])
    try:
        lines, problems = parse_lines(await run(batches.content, key, job["input_file_id"]), path)
    except NotFound as error:  # the file was deleted
        lines, problems = [], [{"code": "invalid_file", "message": str(error), "line": None}]
    if problems:
        await run(batches.finish, key, batch, "failed", problems[:MAX_PROBLEMS])
        return
    done = await run(batches.done, batch)
    waiting = deque(line for line in lines if line.number not in done)
    if status == "validating":
        status = await run(batches.start, batch, len(lines))

    def ending() -> Literal["cancelled", "expired", None]:
        if status == "cancelling":
            return "cancelled"
        return "expired" if time.time() > job["expires_at"] else None

    async def send_lines() -> None:
        nonlocal status
        while waiting and not ending():
            line = waiting.popleft()
            await models.idle(MAX_WAIT_SECONDS)
            code, body = await answer(app, path, line.body, key, f"{batch}-{line.number}")
            status = await run(batches.add_line, batch, line.number, line.custom_id, code, body)

    async def renew() -> None:
        nonlocal status
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            status = await run(batches.renew, batch)

    async with asyncio.TaskGroup() as group:
        renewal = group.create_task(renew())
        await asyncio.gather(*(group.create_task(send_lines()) for _ in range(PARALLEL)))
        renewal.cancel()
    await run(batches.finish, key, batch, (ending() if waiting else None) or "completed")


def parse_lines(content: bytes, endpoint: str) -> tuple[list[Line], list[dict[str, Any]]]:
    """Return the valid lines of an input, and the problems of the others as in OpenAI's API."""
    lines: dict[str, Line] = {}
    problems: list[dict[str, Any]] = []
    for number, text in enumerate(content.splitlines(), 1):
        if not text.strip():
            continue
        problem = ""
        try:
            fields = orjson.loads(text)
            custom_id, body = fields.get("custom_id"), fields.get("body")
            if not isinstance(custom_id, str) or custom_id in lines:
                problem = "custom_id should be a text that no other line has"
            elif (fields.get("method"), fields.get("url")) != ("POST", endpoint):
                problem = f"method should be POST, and url {endpoint}, as in the batch"
            elif not isinstance(body, dict) or body.get("stream"):
                problem = "body should be an object without stream"
            else:
                lines[custom_id] = Line(number, custom_id, orjson.dumps(body))
        except (ValueError, AttributeError):
            problem = "the line should be a JSON object"
        if problem:
            problems.append({"code": "invalid_line", "message": problem, "line": number})
    if not lines:
        problems.append({"code": "empty_file", "message": "the file has no valid line", "line": None})
    return list(lines.values()), problems


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
    received, sent = asyncio.Queue[Message](), asyncio.Queue[Message]()
    received.put_nowait({"type": "http.request", "body": body, "more_body": False})  # the client never disconnects
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
    await app(scope, received.get, sent.put)
    start, *parts = [sent.get_nowait() for _ in range(sent.qsize())]
    return start["status"], dict(start["headers"]), b"".join([part.get("body", b"") for part in parts])
