"""The OpenAPI document: it is valid, its examples succeed, and real answers have the schemas that it names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from pydantic import BaseModel
from support.imported.onnx_models import linear_model
from support.responses import ADMIN_HEADERS, ADMIN_KEY
from support.service import IMAGES, ROOT, TEST, serving

from app.api.openapi import build_document
from app.api.operation import Operation
from app.api.responses import ERROR_RESPONSES
from app.api.routes.models import list_models
from app.settings import Settings

HORSE = IMAGES / "cifar10" / "0013-horse.png"
JSON, STREAM = "application/json", "text/event-stream"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Start a service with an admin key on a copy of the included store, because the examples change the store."""
    store = tmp_path_factory.mktemp("openapi") / "store"
    shutil.copytree(ROOT / "models_store", store)
    with serving(Settings(store=store, admin_key=ADMIN_KEY, **TEST)) as client:  # type: ignore[arg-type]
        client.headers.update(ADMIN_HEADERS)
        yield client


@pytest.fixture(scope="module")
def document(service: httpx.Client) -> dict[str, Any]:
    return service.get("/openapi.json").json()


Row = tuple[str, str, dict[str, Any]]


def operations(document: dict[str, Any]) -> list[Row]:
    """Return method, path and description of each operation, in the order of the document."""
    return [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    """Raise ValidationError if a value does not match the schema."""
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def send(client: httpx.Client, method: str, path: str, operation: dict[str, Any]) -> httpx.Response:
    """Send the example request of an operation, as Swagger UI does after *Try it out* and *Execute*."""
    queries: dict[str, Any] = {}
    for parameter in operation["parameters"]:
        if "example" in parameter and parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
        elif "example" in parameter:
            queries[parameter["name"]] = parameter["example"]
    body: dict[str, Any] = {}
    kind, content = next(iter(operation.get("requestBody", {}).get("content", {"": {}}).items()))
    if kind == JSON:
        body = {"json": content["example"]}
    elif kind == "multipart/form-data":
        body = {"files": {"file": (HORSE.name, HORSE.read_bytes())}}
    elif kind == "application/zip":
        archive = client.get("/v1/admin/models/shakespeare-rnn/export?version=1").content
        body = {"content": archive, "headers": {"content-type": kind}}
    elif kind == "application/octet-stream":
        body = {"content": linear_model()[0].SerializeToString(), "headers": {"content-type": kind}}
    return client.request(method, path, params=queries, **body)


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    validate(document)


def version_fields(kind: str, text: str) -> dict[str, Any]:
    """Return the fields of an answer, or of its first event, that name the model and version that computed it."""
    answer = json.loads(text.partition("\n")[0].removeprefix("data: ") if kind == STREAM else text)
    names = ("model", "version", "model_name", "model_version", "system_fingerprint")
    return {name: answer[name] for name in names if name in answer} if isinstance(answer, dict) else {}


def example_text(content: dict[str, Any]) -> str:
    example = content["example"]
    return example if isinstance(example, str) else json.dumps(example)


def test_every_example_succeeds_and_its_answer_has_the_documented_schema(
    service: httpx.Client, document: dict[str, Any]
) -> None:
    activate = "/v1/admin/models/shakespeare-rnn/activate"
    for method, path, operation in operations(document):
        answer = send(service, method, path, operation)
        assert answer.status_code == 200, (path, answer.text)
        assert "x-request-id" in answer.headers
        kind = answer.headers["content-type"].split(";")[0]
        content = operation["responses"]["200"]["content"]
        assert kind in content, path
        if kind == JSON:
            check(document, content[JSON]["schema"], answer.json())
        if kind in (JSON, STREAM):
            assert version_fields(kind, answer.text) == version_fields(kind, example_text(content[kind])), path
        if operation["operationId"] == "roll_back":  # after the rollback, version 1 can be retired
            service.post(activate, json={"version": "latest"}).raise_for_status()
    service.post("/v2/repository/models/mnist-gan/load").raise_for_status()
    service.post("/v1/admin/models/shakespeare-rnn/retire", json={"version": 1, "undo": True}).raise_for_status()


def test_every_answer_has_an_example_with_its_schema(document: dict[str, Any]) -> None:
    for _, path, operation in operations(document):
        for status, response in operation["responses"].items():
            for kind, content in response["content"].items():
                if kind == JSON and not (status == "503" and "/health/" in path):
                    check(document, content["schema"], content["example"])
                elif kind.startswith("text/"):
                    assert content["example"], path
        for content in operation.get("requestBody", {}).get("content", {}).values():
            if "example" in content:
                check(document, content["schema"], content["example"])


def test_two_response_classes_with_the_same_name_are_an_error() -> None:
    other = type("ErrorBody", (BaseModel,), {})
    operation = Operation("GET", "/v1/models", list_models, "Models", response=other, errors=ERROR_RESPONSES)
    with pytest.raises(ValueError, match="two different schemas are named ErrorBody"):
        build_document(FastAPI(), [operation], Settings())
