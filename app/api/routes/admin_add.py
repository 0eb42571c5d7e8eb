"""Import a trained network over HTTP.

The endpoint runs the command ``python -m app.models add`` in a separate process. If a file exhausts the memory or
crashes this process, the service is not affected.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from starlette.responses import Response

import app
from app.api.openapi import BINARY
from app.api.operation import Operation, Request
from app.api.request_head import read_query
from app.api.responses import json_response
from app.api.routes.admin import FAILURES, PREFIX, TAG, UPLOAD, ImportResponse, describe, on_store, uploaded
from app.errors import BadValue, StoreUnavailable
from app.importing.options import AddOptions

ERROR = re.compile(r"^(?:quartet models add: )?error: ", re.MULTILINE)  # starts the message on stderr


_running = asyncio.Lock()  # one import at a time in this worker, because each uses all cores for some seconds


async def add_model(request: Request) -> Response:
    """Publish a network from an ONNX file.

    An ONNX file and its external data can be sent together as a ZIP archive. The file cannot run code. The service
    checks the network and measures its speed, which takes some seconds. Only the command line imports `.pt2` files.
    """
    settings, query = request.settings, read_query(request, AddOptions)
    if query.name is None:
        raise BadValue("name is missing; it should be the name of the model", "name")
    for name, value in query.model_dump().items():
        if isinstance(value, str) and "\0" in value:  # not possible in an argument of a command
            raise BadValue(f"{name} has a NUL character; leave it out", name)
    disk, store = request.models.disk, request.models.store
    async with uploaded(request) as folder, _running:
        if query.task != "infer":  # an error in the store is not an error in the file
            await on_store(request, store.defaults)
        number = await disk.run(_run_command, query, folder, settings.store)
    return json_response(await describe(request, query.name) | {"imported": number})


def _run_command(query: AddOptions, folder: Path, store: Path) -> int:
    """Run the command ``add`` on the file ``upload`` in ``folder``, and return the number of the new version.

    Raises:
        BadValue: the command rejects the file or an option.
        StoreUnavailable: the command cannot read or write the store.
    """
    arguments = [str(folder / UPLOAD), f"--store={store}", "--json"]
    title = query.title or query.name  # without a title, the command would use the name of the file, "upload"
    for name, value in (query.model_dump(exclude_none=True) | {"title": title}).items():
        if name == "labels":
            (folder / name).write_text(value, "utf-8")
            value = folder / name
        if name != "softmax":
            arguments.append(f"--{name}={value}")
        elif not value:
            arguments.append("--no-softmax")
    paths = os.pathsep.join((str(Path(app.__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    process = subprocess.run(
        [sys.executable, "-m", "app.models", "add", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        # The command's temporary files go into ``folder``, because other folders may be read-only.
        env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(folder)},
        check=False,
    )
    if process.returncode == 0:
        return int(json.loads(process.stdout)["added"])
    text = process.stderr.strip()  # warnings may precede the message, and a crash of Python has no message
    start = ERROR.search(text)
    message = (text[start.end() :] if start else text.rpartition("\n")[2]).replace(f"{folder}/", "")
    if message.startswith("the store cannot be read or written"):
        raise StoreUnavailable(message)
    raise BadValue(message, "body")


OPERATIONS = [
    Operation(
        "POST",
        f"{PREFIX}/add",
        add_model,
        TAG,
        "Import a trained network",
        ImportResponse,
        "The versions of the model, after the import",
        other_bodies={"application/octet-stream": {"schema": BINARY}},
        query=AddOptions,
        errors=FAILURES,
        is_admin=True,
        spools_body=True,
    )
]
