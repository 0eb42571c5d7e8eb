"""OpenAI's Files API, for the inputs and outputs of batch jobs, and its Batch API."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import orjson
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.openapi import BINARY, FORM
from app.api.operation import Endpoint, Operation, Request
from app.api.request_body import RequestBody, read_form, read_json
from app.api.responses import ERROR_RESPONSES, json_response
from app.engine.fair_queue import current_caller
from app.errors import BadValue, NotReady, quote_value
from app.records.batches import MAX_AGE_SECONDS, Batches, Row
from app.tasks import TASKS

TAG = "Batches"
R = TypeVar("R")


class CreateBatch(RequestBody):
    input_file_id: str = Field(max_length=100)
    """id of a file with one JSON object in each line: `custom_id`, `method`, `url` and `body`"""
    endpoint: str = Field(max_length=100)
    """the endpoint of all lines, such as `/v1/completions`"""
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=16)


class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    """Unix time in seconds"""
    filename: str
    purpose: str
    status: Literal["processed"]


class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: bool


class Batch(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal["validating", "in_progress", "completed", "failed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None
    """file with the answers, one in each line"""
    error_file_id: str | None
    """file with the answers of lines that failed"""
    errors: Any
    """why the job failed: invalid lines of the input"""
    created_at: int
    in_progress_at: int | None
    expires_at: int
    completed_at: int | None
    request_counts: dict[str, int]
    """`total`, `completed` and `failed`"""
    metadata: dict[str, str]


class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    has_more: bool


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[Batch]
    has_more: bool


def _file(row: Row) -> FileObject:
    return {
        "id": row["id"], "object": "file", "bytes": row["bytes"], "created_at": int(row["created"]),
        "filename": row["name"], "purpose": row["purpose"], "status": "processed",
    }  # fmt: skip


def _batch(row: Row) -> Batch:
    problems = orjson.loads(row["problems"] or "[]")
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "input_file_id": row["input"],
        "completion_window": "24h",
        "status": row["status"],
        "output_file_id": row["output"],
        "error_file_id": row["errors"],
        "errors": {"object": "list", "data": problems} if problems else None,
        "created_at": int(row["created"]),
        "in_progress_at": row["started"] and int(row["started"]),
        "expires_at": int(row["created"] + MAX_AGE_SECONDS),
        "completed_at": int(row["ended"]) if row["status"] == "completed" else None,
        "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
        "metadata": orjson.loads(row["metadata"]),
    }


async def _run(request: Request, function: Callable[..., R], *arguments: Any) -> R:
    """Call a method of ``Batches`` with the name of the API key. Raises NotReady if the records cannot be used."""
    try:
        return await asyncio.to_thread(function, current_caller.get(), *arguments)
    except (sqlite3.Error, OSError) as error:
        raise NotReady(f"the batch jobs cannot be read or stored now: {error}") from error


def _batches(request: Request) -> Batches:
    assert request.service.batches  # without it, these operations do not exist
    return request.service.batches


async def upload_file(request: Request) -> Response:
    """Store a file with the requests of a batch job, one JSON object in each line."""
    fields = {field.name: field for field in await read_form(request, request.settings.max_body_bytes, max_files=1)}
    if "file" not in fields or isinstance(fields["file"].content, str):
        raise BadValue("file is missing; send a file", "file")
    purpose = fields["purpose"].content if "purpose" in fields else ""
    if purpose != "batch":
        raise BadValue(f"purpose is {quote_value(purpose)}; it should be 'batch'", "purpose")
    file, content = fields["file"], fields["file"].content
    return json_response(_file(await _run(request, _batches(request).add_file, file.filename or "", purpose, content)))


async def list_files(request: Request) -> Response:
    """List the files of this API key."""
    rows = await _run(request, _batches(request).files)
    return json_response(FileList(object="list", data=[_file(row) for row in rows], has_more=False))


async def get_file(request: Request) -> Response:
    """Get the size and the name of a file."""
    return json_response(_file(await _run(request, _batches(request).file, request.path_params["id"])))


async def get_file_content(request: Request) -> Response:
    """Get a file."""
    content = await _run(request, _batches(request).content, request.path_params["id"])
    return Response(content, media_type="application/jsonl")


async def delete_file(request: Request) -> Response:
    """Delete a file."""
    await _run(request, _batches(request).delete_file, request.path_params["id"])
    return json_response(DeletedFile(id=request.path_params["id"], object="file", deleted=True))


async def create_batch(request: Request) -> Response:
    """Send each line of a file to an endpoint, when no other request waits. The job expires after 24 hours."""
    body = await read_json(request, CreateBatch)
    allowed = [path for task in TASKS.values() for path in task.paths]
    if body.endpoint not in allowed:
        problem = f"endpoint is {quote_value(body.endpoint)}; allowed values: {', '.join(allowed)}"
        raise BadValue(problem, "endpoint")
    add = _batches(request).add
    return json_response(_batch(await _run(request, add, body.input_file_id, body.endpoint, body.metadata or {})))


async def list_batches(request: Request) -> Response:
    """List the jobs of this API key, the newest first."""
    rows = await _run(request, _batches(request).jobs)
    return json_response(BatchList(object="list", data=[_batch(row) for row in rows], has_more=False))


async def get_batch(request: Request) -> Response:
    """Get the status and the progress of a job."""
    return json_response(_batch(await _run(request, _batches(request).get, request.path_params["id"])))


async def cancel_batch(request: Request) -> Response:
    """End a job. Its answers so far are in its output file."""
    return json_response(_batch(await _run(request, _batches(request).cancel, request.path_params["id"])))


UPLOAD = {
    "schema": {
        "title": "FileForm",
        "type": "object",
        "properties": {"file": BINARY, "purpose": {"type": "string", "enum": ["batch"]}},
        "required": ["file", "purpose"],
    }
}


def _row(
    method: str, path: str, endpoint: Endpoint, summary: str, response: Any, answer: str, **others: Any
) -> Operation:
    return Operation(method, path, endpoint, TAG, summary, response, answer, errors=ERROR_RESPONSES, **others)


FILE = {"parameters": {"id": ("id of the file", "file-0")}}
BATCH = {"parameters": {"id": ("id of the job", "batch_0")}}
OPERATIONS = [
    _row("POST", "/v1/files", upload_file, "Upload a file", FileObject, "The file", other_bodies={FORM: UPLOAD}),
    _row("GET", "/v1/files", list_files, "List files", FileList, "The files", any_query=True),
    _row("GET", "/v1/files/{id}", get_file, "Get a file", FileObject, "The file", **FILE),
    _row("GET", "/v1/files/{id}/content", get_file_content, "Get the content of a file", None, "The content", **FILE),
    _row("DELETE", "/v1/files/{id}", delete_file, "Delete a file", DeletedFile, "The file is deleted", **FILE),
    _row(
        "POST", "/v1/batches", create_batch, "Create a batch job", Batch, "The job", body=CreateBatch,
        example={"input_file_id": "file-0", "endpoint": "/v1/completions", "completion_window": "24h"},
    ),
    _row("GET", "/v1/batches", list_batches, "List batch jobs", BatchList, "The jobs", any_query=True),
    _row("GET", "/v1/batches/{id}", get_batch, "Get a batch job", Batch, "The job", **BATCH),
    _row("POST", "/v1/batches/{id}/cancel", cancel_batch, "Cancel a batch job", Batch, "The job", **BATCH),
]  # fmt: skip
