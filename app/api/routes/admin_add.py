"""Import a trained network over HTTP.

The endpoint runs the command ``python -m app.models add`` in a separate process. If a file exhausts the memory or
crashes this process, the service is not affected.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

import app
from app.api.openapi import BINARY, query_parameters
from app.api.request_body import spool_body
from app.api.request_head import read_query
from app.api.responses import json_response, success_response
from app.api.routes.admin_responses import ImportResponse
from app.errors import BadValue, Conflict, StoreUnavailable, TimedOut
from app.settings import Settings
from app.store import ModelName, StoreError, TaskName, atomic_files, catalogue, read_defaults
from app.store.disk_thread import DiskThread
from app.tasks import check_loading

IMPORT_SECONDS = 600.0  # seconds after which an import is stopped
FLAGS = {  # for each field: the value that differs from the default, and the option for this value
    "softmax": (False, "--no-softmax"),
    "standardise": (True, "--standardise"),
    "non_negative": (True, "--non-negative"),
}
ERROR = re.compile(r"^(?:python -m app\.models add: )?error: ", re.MULTILINE)  # starts the message on stderr
FILES = ("labels", "vocabulary")  # sent as text in the query, but read from files by the command


class AddQuery(BaseModel):
    """The options of the command ``add``. Commas separate list items, except in ``labels`` and ``vocabulary``."""

    name: ModelName | None = Field(None, description="name of the model", examples=["resnet"])
    title: str | None = Field(None, max_length=1000, description="one sentence about the model")
    licence: str | None = Field(None, max_length=1000, description="licence of the network")
    source: str | None = Field(None, max_length=1000, description="where the network comes from")
    task: TaskName = Field(
        "infer", description="task of the network besides tensor requests under `/v2`. `infer` means no other task."
    )
    labels: str | None = Field(None, description="for `classify` and `sample`: the labels, one per line")
    size: int | None = Field(None, description="for `classify`: height and width of the input images in pixels")
    resize: int | None = Field(
        None, description="for `classify`: length to which the shorter side is scaled before the centre is cropped"
    )
    interpolation: Literal["bilinear", "bicubic"] | None = Field(
        None, description="for `classify`: filter with which images are scaled"
    )
    mean: str | None = Field(None, description="for `classify`: mean of each channel, for pixels from 0 to 1")
    std: str | None = Field(None, description="for `classify`: standard deviation of each channel")
    softmax: bool = Field(True, description="for `classify`: whether the network returns logits")
    latents: str | None = Field(None, description="for `sample`: name of the input tensor with the latents")
    classes: str | None = Field(None, description="for `sample`: name of the input tensor with the class indices")
    low: float | None = Field(None, description="for `sample`: value of black in the output")
    high: float | None = Field(None, description="for `sample`: value of white in the output")
    input: str | None = Field(None, description="for `classify` and `forecast`: name of the input tensor")
    output: str | None = Field(None, description="for `classify`, `forecast` and `sample`: name of the output tensor")
    context: int | None = Field(
        None, description="for `forecast` and `continue`: number of values or characters that the network reads at once"
    )
    quantiles: str | None = Field(None, description="for `forecast`: quantile levels of the output")
    standardise: bool = Field(
        False, description="for `forecast`: whether the service scales inputs to mean 0 and standard deviation 1"
    )
    seasons: str | None = Field(
        None, description="for `forecast`: name of the input tensor with the number of values per season"
    )
    non_negative: bool = Field(
        False, description="for `forecast`: whether forecasts of series without negative values are at least 0"
    )
    vocabulary: str | None = Field(
        None, description="for `continue`: JSON list of the characters in the order of their indices, or `bytes`"
    )
    tokens: str | None = Field(None, description="for `continue`: name of the input tensor with the characters")
    logits: str | None = Field(None, description="for `continue`: name of the output tensor with the logits")
    states: str | None = Field(None, description="for `continue`: names of the input tensors with the state")
    next_states: str | None = Field(None, description="for `continue`: names of the output tensors with the next state")
    unknown: int | None = Field(
        None, description="for `continue`: index of the character that replaces unknown characters"
    )


def add_route(routes: APIRouter, settings: Settings) -> None:
    """Add the route ``/add``."""
    body = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": BINARY}}}}
    running = asyncio.Lock()  # one import at a time in this worker, because each uses all cores for some seconds

    @routes.post(
        "/add",
        operation_id="add_model",
        summary="Import a trained network",
        openapi_extra={**body, **query_parameters(AddQuery)},
        responses=success_response(ImportResponse, description="The versions of the model, after the import"),
    )
    async def add_model(request: Request) -> Response:
        """Publish a network from a `.pt2` file of `torch.export.save` or from an ONNX file.

        An ONNX file and its external data can be sent together as a ZIP archive. The service never unpickles or
        executes code from the file. It checks the network and measures its speed, which takes some seconds.
        """
        query = read_query(request, AddQuery)
        if query.name is None:
            raise BadValue("name is missing; it should be the name of the model", "name")
        for name, value in query.model_dump().items():
            if isinstance(value, str) and "\0" in value:  # not possible in an argument of a command
                raise BadValue(f"{name} has a NUL character; leave it out", name)
        disk, stack = DiskThread("add"), ExitStack()
        try:
            folder = await disk.run(stack.enter_context, atomic_files.scratch_folder(settings.store))
            file = await disk.run((folder / "upload").open, "wb")
            try:
                await spool_body(request, disk, file, settings.max_import_bytes, settings.body_seconds)
            finally:
                await disk.run(file.close)
            async with running:
                if query.task != "infer":  # an error in the store is not an error in the file
                    await disk.run(read_defaults, settings.store)
                number = await disk.run(_run_command, query, folder, settings.store)
            versions = await disk.run(catalogue.describe_model, settings.store, query.name, check_loading)
        except StoreError as error:
            raise Conflict(str(error)) from None
        except OSError as error:
            raise StoreUnavailable(f"the store cannot be read or written: {error.strerror or error}") from None
        finally:
            await disk.run(stack.close)
        return json_response(versions | {"imported": number})


def _run_command(query: AddQuery, folder: Path, store: Path) -> int:
    """Run the command ``add`` on the file ``upload`` in ``folder``, and return the number of the new version.

    Raises:
        BadValue: the command rejects the file or an option.
        TimedOut: the import takes too long.
        StoreUnavailable: the command cannot read or write the store.
    """
    arguments = [str(folder / "upload"), f"--store={store}", "--json"]
    title = query.title or query.name  # without a title, the command would use the name of the file, "upload"
    for name, value in (query.model_dump(exclude_none=True) | {"title": title}).items():
        option = name.replace("_", "-")
        if name in FILES and (name, value) != ("vocabulary", "bytes"):
            (folder / name).write_text(value, "utf-8")
            arguments.append(f"--{option}={folder / name}")
        elif name in FLAGS:
            arguments += [FLAGS[name][1]] if value is FLAGS[name][0] else []
        else:
            arguments.append(f"--{option}={value}")
    paths = os.pathsep.join((str(Path(app.__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    try:
        process = subprocess.run(
            [sys.executable, "-m", "app.models", "add", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            # The command's temporary files go into ``folder``, because other folders may be read-only.
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimedOut(f"the import took more than {IMPORT_SECONDS:g} s") from None
    if process.returncode == 0:
        return int(json.loads(process.stdout)["added"])
    if process.returncode < 0:
        reason = signal.Signals(-process.returncode).name
        raise BadValue(f"the import was ended by {reason}: the file may need too much memory", "body")
    text = process.stderr.strip()  # warnings may precede the message, and a crash of Python has no message
    start = ERROR.search(text)
    message = (text[start.end() :] if start else text.rpartition("\n")[2]).replace(f"{folder}/", "")
    if message.startswith("the store cannot be read or written"):
        raise StoreUnavailable(message)
    raise BadValue(message, "body")
