"""A separate process imports networks that are sent over HTTP."""

from __future__ import annotations

import contextlib
import io
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.imported.onnx_models import externalise, linear_model
from support.imported.programs import export_cnn
from support.responses import ADMIN_HEADERS, ADMIN_KEY
from support.service import Serve
from support.waiting import wait_until

from app.cli import models
from app.store import Check, catalogue

PATH = "/v1/admin/add"


def test_an_uploaded_network_is_served(serve: Serve) -> None:
    _, content = export_cnn()
    query = {"name": "uploaded", "task": "classify", "labels": "cat\ndog\nbird\n", "mean": "-0.5,0,1", "licence": "MIT"}
    with serve(store_poll_seconds=0.02, admin_key=ADMIN_KEY) as client:
        assert client.post(PATH, params=query, content=content).status_code == 401
        client.headers.update(ADMIN_HEADERS)
        answer = client.post(PATH, params=query, content=content)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["imported"], answer.json()["task"]) == (1, "classify")
        wait_until(lambda: client.get("/v1/models/uploaded").status_code == 200)
        card = client.get("/v1/models/uploaded").json()["card"]
        assert (card["labels"], card["licence"], card["title"]) == (["cat", "dog", "bird"], "MIT", "uploaded")
        assert card["sizes"]["options"]["mean"] == [-0.5, 0, 1]
        message = rejected(client, {**query, "labels": "bytes"}, content)
        assert "tensor 'linear' should have one value for each of the 1 labels" in message


def test_wrong_requests_are_rejected_without_a_process(serve: Serve) -> None:
    with serve(admin_key=ADMIN_KEY, max_import_bytes=100) as client:
        client.headers.update(ADMIN_HEADERS)
        assert rejected(client, {}, b"") == "name is missing; it should be the name of the model"
        assert rejected(client, {"name": "a", "size": "x"}, b"").startswith("size is 'x'; it should be a valid integer")
        assert rejected(client, {"name": "../outside"}, b"").startswith("name is '../outside'; it should match")
        assert "'stats' is reserved" in rejected(client, {"name": "stats"}, b"")
        assert "unknown field 'sizes'" in rejected(client, {"name": "a", "sizes": "1"}, b"")
        assert rejected(client, {"name": "a", "title": "a\0b"}, b"") == "title has a NUL character; leave it out"
        assert client.post(PATH, params={"name": "a"}, content=bytes(101)).status_code == 413


def test_an_archive_of_an_onnx_file_and_its_data_is_served(serve: Serve) -> None:
    model, matrix = linear_model()
    externalise(model, "matrix.bin", length=matrix.nbytes)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("net.onnx", model.SerializeToString())
        archive.writestr("matrix.bin", matrix.tobytes())
    with serve(store_poll_seconds=0.02, admin_key=ADMIN_KEY) as client:
        client.headers.update(ADMIN_HEADERS)
        message = rejected(client, {"name": "linear"}, model.SerializeToString())
        assert message.endswith("over HTTP, send a ZIP archive of the model and its data")
        answer = client.post(PATH, params={"name": "linear"}, content=content.getvalue())
        assert answer.status_code == 200, answer.text
        wait_until(lambda: client.get("/v1/models/linear").status_code == 200)


def test_the_answer_names_the_imported_version_and_not_the_newest(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_row = catalogue.model_row

    def row_with_another(folder: Path, name: str, check: Check) -> dict[str, Any]:
        """Return the row as if another process had imported another version at the same time."""
        row = model_row(folder, name, check)
        return row | {"versions": [*row["versions"], 9]}

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            status = models.main(command[3:])
        return subprocess.CompletedProcess(command, status, output.getvalue(), "")

    monkeypatch.setattr(catalogue, "model_row", row_with_another)
    monkeypatch.setattr(subprocess, "run", run)
    with serve(admin_key=ADMIN_KEY) as client:
        client.headers.update(ADMIN_HEADERS)
        for number in (1, 2):
            answer = client.post(PATH, params={"name": "linear"}, content=linear_model()[0].SerializeToString())
            assert (answer.status_code, answer.json()["imported"]) == (200, number)


@pytest.mark.parametrize(
    ("status", "stderr", "answer"),
    [
        (-9, "", (400, "invalid_value", "the import was ended by SIGKILL: the file may need too much memory")),
        (1, "error: the store cannot be read or written: No space left on device\n",
         (507, "store_unavailable", "the store cannot be read or written: No space left on device")),
        (1, "error: FILE is no program: line one\nline two\n",
         (400, "invalid_value", "upload is no program: line one\nline two")),
        (1, "a warning: CUDA error: x\nerror: bad graph: internal error: foo\n",
         (400, "invalid_value", "bad graph: internal error: foo")),
        (2, "usage: python -m app.models add [-h]\npython -m app.models add: error: argument --mean: 'x'\n",
         (400, "invalid_value", "argument --mean: 'x'")),
        (1, "Traceback (most recent call last):\n  File 'x'\nMemoryError\n", (400, "invalid_value", "MemoryError")),
        (None, "", (504, "deadline_exceeded", "the import took more than 600 s")),
    ],
    ids=["signal", "full disk", "two lines", "two errors", "wrong option", "exception", "timeout"],
)  # fmt: skip
def test_a_failed_import_is_answered_with_its_reason(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int | None, stderr: str, answer: tuple[int, str, str]
) -> None:
    folders = []

    def run(
        command: Sequence[str], timeout: float, env: Mapping[str, str], **_: object
    ) -> subprocess.CompletedProcess[str]:
        folders.append((env["TMPDIR"], str(Path(command[4]).parent)))
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, status, "", stderr.replace("FILE", command[4]))

    monkeypatch.setattr(subprocess, "run", run)
    with serve(admin_key=ADMIN_KEY) as client:
        received = client.post(PATH, params={"name": "a"}, content=b"x", headers=ADMIN_HEADERS)
    error = received.json()["error"]
    assert (received.status_code, error["code"], error["message"]) == answer
    ((temporary, upload),) = folders
    assert temporary == upload  # all other folders may be read-only
    assert not Path(upload).exists()


def rejected(client: httpx.Client, query: dict[str, str], content: bytes) -> str:
    answer = client.post(PATH, params=query, content=content)
    assert answer.status_code == 400
    return str(answer.json()["error"]["message"])
