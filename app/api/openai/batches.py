"""OpenAI's Files API, for the inputs and outputs of batch jobs, and its Batch API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.openapi import BINARY, FORM
from app.api.operation import Endpoint, Operation, Request
from app.api.request_body import RequestBody, read_form, read_json
from app.api.responses import ERROR_RESPONSES, json_response
from app.engine.fair_queue import current_caller
from app.errors import BadValue, quote_value
from app.records.batches import Batch, Batches, FileObject
from app.tasks import TASKS

TAG = "Batches"


class CreateBatch(RequestBody):
    input_file_id: str = Field(max_length=100)
    """id of a file with one JSON object in each line: `custom_id`, `method`, `url` and `body`"""
    endpoint: str = Field(max_length=100)
    """the endpoint of all lines, such as `/v1/completions`"""
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=16)


class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: bool


class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    has_more: bool


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[Batch]
    has_more: bool


async def _run(request: Request, method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of ``Batches`` with the name of the API key. Raises RecordsUnavailable."""
    return await asyncio.to_thread(method, request.service.batches, current_caller.get(), *arguments)


async def _answer(request: Request, method: Callable[..., Any], *arguments: Any) -> Response:
    return json_response(await _run(request, method, *arguments))


async def _list(request: Request, kind: str) -> Response:
    return json_response({"object": "list", "data": await _run(request, Batches.all, kind), "has_more": False})


async def upload_file(request: Request) -> Response:
    """Store a file with the requests of a batch job, one JSON object in each line."""
    fields = {field.name: field for field in await read_form(request, request.settings.max_body_bytes, max_files=1)}
    if "file" not in fields or isinstance(fields["file"].content, str):
        raise BadValue("file is missing; send a file", "file")
    purpose = fields["purpose"].content if "purpose" in fields else ""
    if purpose != "batch":
        raise BadValue(f"purpose is {quote_value(purpose)}; it should be 'batch'", "purpose")
    file = fields["file"]
    return await _answer(request, Batches.add_file, file.filename or "", purpose, file.content)


async def list_files(request: Request) -> Response:
    """List the files of this API key."""
    return await _list(request, "file")


async def get_file(request: Request) -> Response:
    """Get the size and the name of a file."""
    return await _answer(request, Batches.get, "file", request.path_params["id"])


async def get_file_content(request: Request) -> Response:
    """Get a file."""
    content = await _run(request, Batches.content, request.path_params["id"])
    return Response(content, media_type="application/jsonl")


async def delete_file(request: Request) -> Response:
    """Delete a file."""
    await _run(request, Batches.delete_file, request.path_params["id"])
    return json_response(DeletedFile(id=request.path_params["id"], object="file", deleted=True))


async def create_batch(request: Request) -> Response:
    """Send each line of a file to an endpoint, when no other request waits. The job expires after 24 hours."""
    body = await read_json(request, CreateBatch)
    allowed = [path for task in TASKS.values() for path in task.paths]
    if body.endpoint not in allowed:
        problem = f"endpoint is {quote_value(body.endpoint)}; allowed values: {', '.join(allowed)}"
        raise BadValue(problem, "endpoint")
    return await _answer(request, Batches.add, body.input_file_id, body.endpoint, body.metadata or {})


async def list_batches(request: Request) -> Response:
    """List the jobs of this API key, the newest first."""
    return await _list(request, "batch")


async def get_batch(request: Request) -> Response:
    """Get the status and the progress of a job."""
    return await _answer(request, Batches.get, "batch", request.path_params["id"])


async def cancel_batch(request: Request) -> Response:
    """End a job. Its answers so far are in its output file."""
    return await _answer(request, Batches.cancel, request.path_params["id"])


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
