"""A separate process imports networks that are sent over HTTP."""

from __future__ import annotations

import io
import zipfile

import httpx
import pytest
from support.imported.onnx_models import externalise, linear_model
from support.imported.programs import export_cnn
from support.responses import ADMIN_HEADERS, ADMIN_KEY
from support.service import Serve
from support.waiting import wait_until

PATH = "/v1/admin/add"
pytestmark = pytest.mark.processes


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
        assert (card["labels"], card["licence"]) == (["cat", "dog", "bird"], "MIT")
        assert card["sizes"]["options"]["mean"] == [-0.5, 0, 1]
        message = rejected(client, {**query, "labels": "cat\ndog"}, content)
        assert "tensor 'linear' should have one value for each of the 2 labels" in message


def test_wrong_requests_are_rejected_without_a_process(serve: Serve) -> None:
    with serve(admin_key=ADMIN_KEY, max_import_bytes=100) as client:
        client.headers.update(ADMIN_HEADERS)
        assert rejected(client, {}, b"") == "name is missing; it should be the name of the model"
        assert rejected(client, {"name": "a", "size": "x"}, b"").startswith("size is 'x'; it should be a valid integer")
        assert rejected(client, {"name": "../outside"}, b"").startswith("name is '../outside'; it should match")
        assert "there is no field 'sizes'" in rejected(client, {"name": "a", "sizes": "1"}, b"")
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


def rejected(client: httpx.Client, query: dict[str, str], content: bytes) -> str:
    answer = client.post(PATH, params=query, content=content)
    assert answer.status_code == 400
    return str(answer.json()["error"]["message"])
