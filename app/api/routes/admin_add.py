"""Import a trained network over HTTP.

The command ``python -m app.models add`` runs in a separate process. So a file that exhausts the memory or crashes that
process does not harm the service.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

import app
from app.api.openapi import BINARY, query_parameters
from app.api.request_body import spool_body
from app.api.request_head import read_query
from app.api.responses import json_response, success_response
from app.api.routes.admin_responses import ImportResponse
from app.errors import BadValue, StoreNotWritable, TimedOut
from app.settings import Settings
from app.store import TaskName, atomic_files, catalogue
from app.store.disk_thread import DiskThread

IMPORT_SECONDS = 600.0  # seconds after which an import is stopped
FLAGS = {  # the value that is not the default, and the option for it
    "softmax": (False, "--no-softmax"),
    "standardise": (True, "--standardise"),
    "non_negative": (True, "--non-negative"),
}
NAME = r"^[a-z0-9][a-z0-9-]{0,63}$"
FILES = ("labels", "vocabulary")  # sent as text in the query, but read from files by the command


class AddQuery(BaseModel):
    """The options of the command. Commas separate the items of a list, except in ``labels`` and ``vocabulary``."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, pattern=NAME, description="name of the model", examples=["resnet"])
    title: str | None = Field(None, max_length=1000, description="one sentence about the model")
    licence: str | None = Field(None, max_length=1000, description="licence of the network")
    source: str | None = Field(None, max_length=1000, description="where the network comes from")
    task: TaskName = Field("infer", description="task besides tensors under `/v2`; `infer`: none")
    labels: str | None = Field(None, description="classify, sample: the labels, one per line")
    size: int | None = Field(None, description="classify: height and width in pixels")
    resize: int | None = Field(None, description="classify: length of the shorter side before the centre is cropped")
    interpolation: Literal["bilinear", "bicubic"] | None = Field(None, description="classify: how images are scaled")
    mean: str | None = Field(None, description="classify: mean of each channel, for pixels from 0 to 1")
    std: str | None = Field(None, description="classify: deviation of each channel")
    softmax: bool = Field(True, description="classify: whether the output are logits")
    latents: str | None = Field(None, description="sample: input of the latents")
    classes: str | None = Field(None, description="sample: input of the class indices")
    low: float | None = Field(None, description="sample: output value of black")
    high: float | None = Field(None, description="sample: output value of white")
    input: str | None = Field(None, description="classify, forecast: input tensor")
    output: str | None = Field(None, description="classify, forecast, sample: output tensor")
    context: int | None = Field(None, description="forecast, continue: values or characters read at a time")
    quantiles: str | None = Field(None, description="forecast: levels of the output")
    standardise: bool = Field(False, description="forecast: whether windows have mean 0 and deviation 1")
    seasons: str | None = Field(None, description="forecast: input of the values per season")
    non_negative: bool = Field(
        False, description="forecast: whether forecasts of series without negative values are not negative"
    )
    vocabulary: str | None = Field(None, description="continue: JSON list of the characters, by index; or `bytes`")
    tokens: str | None = Field(None, description="continue: input of the characters")
    logits: str | None = Field(None, description="continue: output of the logits")
    states: str | None = Field(None, description="continue: inputs of the state")
    next_states: str | None = Field(None, description="continue: outputs of the state")
    unknown: int | None = Field(None, description="continue: index of the character for unknown ones")


def add_route(routes: APIRouter, settings: Settings) -> None:
    """Add the route ``/add``."""
    body = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": BINARY}}}}
    running = asyncio.Lock()  # one import at a time, because each uses all cores for some seconds

    @routes.post(
        "/add",
        operation_id="add_model",
        summary="Import a trained network",
        openapi_extra={**body, **query_parameters(AddQuery)},
        responses=success_response(ImportResponse, description="The versions of the model, after the import"),
    )
    async def add_model(request: Request) -> Response:
        """Publish a `.pt2` file of `torch.export.save`, or an ONNX file, as a version.

        An ONNX file and its external data can be sent together as a ZIP archive.
        Nothing in the file is unpickled or evaluated. The network is checked and measured, which takes some seconds.
        """
        query = read_query(request, AddQuery)
        if query.name is None:
            raise BadValue("name is missing; it should be the name of the model", "name")
        disk, stack = DiskThread("add"), ExitStack()
        try:
            folder = await disk.run(stack.enter_context, atomic_files.scratch_folder(settings.store))
            file = await disk.run((folder / "upload").open, "wb")
            try:
                await spool_body(request, disk, file, settings.max_import_bytes, settings.body_seconds)
            finally:
                await disk.run(file.close)
            async with running:
                row = await disk.run(_run_command, query, folder, settings.store)
            versions = await disk.run(catalogue.describe_model, settings.store, query.name)
        except OSError as error:
            raise StoreNotWritable(f"the store cannot be written: {error.strerror or error}") from None
        finally:
            await disk.run(stack.close)
        return json_response(versions | {"imported": max(row["versions"])})


def _run_command(query: AddQuery, folder: Path, store: Path) -> dict[str, Any]:
    """Run the command on the file ``upload`` in ``folder``, and return its output, which describes the model.

    Raises:
        BadValue: the command rejects the file or an option.
        TimedOut: the import takes too long.
        StoreNotWritable: the command cannot write to the store.
    """
    arguments = [str(folder / "upload"), f"--store={store}", "--json"]
    for name, value in query.model_dump(exclude_none=True).items():
        option = name.replace("_", "-")
        if name in FILES and value != "bytes":
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
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimedOut(f"the import took more than {IMPORT_SECONDS:g} s") from None
    if process.returncode == 0:
        row: dict[str, Any] = json.loads(process.stdout)
        return row
    if process.returncode < 0:
        reason = signal.Signals(-process.returncode).name
        raise BadValue(f"the import was ended by {reason}: the file may need too much memory", "body")
    message = process.stderr.strip().rpartition("\n")[2].rpartition("error: ")[2].replace(f"{folder}/", "")
    if message.startswith("the store cannot be written"):
        raise StoreNotWritable(message)
    raise BadValue(message, "body")
