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
from support.service import IMAGES, ROOT, TEST, serving

from app.api.openapi import build_document
from app.api.operation import Operation
from app.api.responses import ERROR_RESPONSES
from app.api.routes.models import list_models
from app.settings import Settings

KEY = "k" * 32
ADMIN = {"authorization": f"Bearer {KEY}"}
HORSE = IMAGES / "cifar10" / "0013-horse.png"
JSON, STREAM = "application/json", "text/event-stream"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Start a service with an admin key on a copy of the included store, because the examples change the store."""
    store = tmp_path_factory.mktemp("openapi") / "store"
    shutil.copytree(ROOT / "models_store", store)
    with serving(Settings(store=store, admin_key=KEY, **TEST)) as client:  # type: ignore[arg-type]
        client.headers.update(ADMIN)
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


def with_defaults(document: dict[str, Any], schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """Return a body with the default of each field that it lacks, as typed clients send it."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    fields = schema.get("properties", {})
    defaults = {name: field["default"] for name, field in fields.items() if "default" in field}
    nested = {
        name: with_defaults(document, fields[name], part)
        for name, part in value.items()
        if name in fields and isinstance(part, dict)
    }
    return {**defaults, **value, **nested}


def test_every_example_succeeds_with_the_defaults_of_its_schema(
    service: httpx.Client, document: dict[str, Any]
) -> None:
    for method, path, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {}).get(JSON)
        if content and "/admin/" not in path and "/repository/models/" not in path:
            content = {**content, "example": with_defaults(document, content["schema"], content["example"])}
            answer = send(service, method, path, {**operation, "requestBody": {"content": {JSON: content}}})
            assert answer.status_code == 200, (path, answer.text)


def test_other_requests_give_answers_with_the_documented_schema(
    service: httpx.Client, document: dict[str, Any]
) -> None:
    image = document["paths"]["/v1/images/classify"]["post"]["requestBody"]["content"][JSON]["example"]
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("/v1/images/classify", "?explain=true", image),
        ("/v1/images/sample", "", {"count": 1, "model": "mnist-gan"}),
        ("/v1/text/continue", "", {"prompt": "É", "stop": "e", "n": 2}),
        ("/v1/completions", "", {"prompt": ["A", "B"], "echo": True, "logprobs": 2, "max_tokens": 4}),
        ("/v1/images/generations", "", {"prompt": "digits", "model": "mnist-gan"}),
        ("/v2/repository/index", "", {}),
    ]
    for path, query, body in requests:
        answer = service.post(path + query, json=body).raise_for_status()
        check(document, document["paths"][path]["post"]["responses"]["200"]["content"][JSON]["schema"], answer.json())
    path, kind = "/v1/series/forecast", "text/csv"
    operation = document["paths"][path]["post"]
    table = operation["requestBody"]["content"][kind]["example"]
    answer = service.post(path, content=table, headers={"content-type": kind}, params={"history": True})
    check(document, operation["responses"]["200"]["content"][JSON]["schema"], answer.raise_for_status().json())
    for name in ("cifar10-lenet", "shakespeare-rnn", "mnist-cgan", "series-lstm"):
        for path in ("/v1/models/{name}", "/v2/models/{name}", "/v2/models/{name}/config", "/v2/models/{name}/stats"):
            answer = service.get(path.replace("{name}", name)).raise_for_status()
            schema = document["paths"][path]["get"]["responses"]["200"]["content"][JSON]["schema"]
            check(document, schema, answer.json())
    service.post("/v2/repository/models/mnist-gan/unload").raise_for_status()
    for path in ("/v1/models", "/v1/models/mnist-gan", "/v1/admin/models", "/health/ready"):
        template = path.replace("mnist-gan", "{name}")
        schema = document["paths"][template]["get"]["responses"]["200"]["content"][JSON]["schema"]
        check(document, schema, service.get(path).raise_for_status().json())
    service.post("/v2/repository/models/mnist-gan/load").raise_for_status()


def test_errors_have_a_documented_status_and_schema(service: httpx.Client, document: dict[str, Any]) -> None:
    key = service.headers["authorization"]
    for path, name, status, body, authorization in (
        ("/v1/images/sample", "", 404, {"model": "none"}, key),
        ("/v2/models/{name}/infer", "none", 404, {}, key),
        ("/v1/admin/models/{name}/retire", "none", 400, {"version": 0}, key),
        ("/v1/admin/models/{name}/retire", "none", 413, {"x": " " * 2**22}, key),
        ("/v2/repository/models/{name}/load", "none", 404, {}, key),
        ("/v2/repository/models/{name}/unload", "series-lstm", 409, {}, key),
        ("/v2/repository/models/{name}/unload", "none", 401, {}, "Bearer none"),
    ):
        headers = {"authorization": authorization}
        answer = service.post(path.replace("{name}", name), json=body, headers=headers)
        assert answer.status_code == status, (path, answer.text)
        response = document["paths"][path]["post"]["responses"]["4XX"]
        assert f"{status}: " in response["description"], path
        check(document, response["content"][JSON]["schema"], answer.json())


def test_operations_with_a_body_or_the_admin_key_document_their_statuses(document: dict[str, Any]) -> None:
    for _, path, operation in operations(document):
        descriptions = {status: answer["description"] for status, answer in operation["responses"].items()}
        if "requestBody" in operation:
            for status in ("408", "413", "504"):
                assert f"{status}: " in descriptions[f"{status[0]}XX"], (path, status)
        if path.startswith(("/v1/admin/", "/v2/repository/models/")):
            assert "401: missing or unknown admin key" in descriptions["4XX"], path
            assert "507: " in descriptions["5XX"], path


def test_bodies_and_answers_are_named_schemas(document: dict[str, Any]) -> None:
    def is_named(schema: dict[str, Any]) -> bool:
        parts = schema.get("anyOf") or ([schema["items"]] if "items" in schema else [])
        return "$ref" in schema or (bool(parts) and all(map(is_named, parts)))

    for _, path, operation in operations(document):
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            assert kind not in (JSON, "multipart/form-data") or is_named(content["schema"]), path
        for response in operation["responses"].values():
            assert JSON not in response["content"] or is_named(response["content"][JSON]["schema"]), path
    assert not [name for name in document["components"]["schemas"] if not re.fullmatch(r"[A-Z][A-Za-z]+", name)]


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


def test_a_body_is_required_unless_it_may_be_empty(service: httpx.Client, document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        if "requestBody" in operation:
            concrete_path = path.replace("{name}", str(operation["parameters"][0].get("example")))
            answer = service.request(method, concrete_path)
            assert (answer.status_code == 200) is not operation["requestBody"]["required"], (path, answer.text)
    service.post("/v2/repository/models/mnist-gan/load").raise_for_status()


def test_request_and_response_headers_are_documented(document: dict[str, Any]) -> None:
    request_id, timeout = ({"$ref": f"#/components/parameters/x-request-{name}"} for name in ("id", "timeout"))
    for _, path, operation in operations(document):
        assert request_id in operation["parameters"], path
        uploads = path in ("/v1/admin/import", "/v1/admin/add")
        has_timeout = path.startswith(("/v2/models/{name}", "/v1/admin/models/{name}/rollback")) or (
            "requestBody" in operation and not uploads
        )
        assert (timeout in operation["parameters"]) is has_timeout, path
        for status, response in operation["responses"].items():
            assert "x-request-id" in response["headers"]
            temporary = status in ("429", "503") and "/health/" not in path
            assert ("Retry-After" in response["headers"]) is (temporary or status == "429"), (path, status)


def test_health_checks_need_no_key(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    key_file.add(keys, "alice")
    with serve(keys_file=keys, admin_key=KEY) as client:
        document = client.get("/openapi.json").json()
    validate(document)
    assert document["security"] == [{"bearer": []}, {"key": []}]
    assert set(document["components"]["securitySchemes"]) == {"bearer", "key", "admin_key"}
    for _, path, operation in operations(document):
        if path.startswith(("/v1/admin/", "/v2/repository/models/")):
            assert operation["security"] == [{"admin_key": []}]
        else:
            assert (operation.get("security") == []) is is_public(path), path
        if "security" not in operation:
            assert "Retry-After" in operation["responses"]["429"]["headers"]
            assert {"4XX", "401"} & set(operation["responses"])
    assert document["paths"]["/health/live"]["get"]["security"] == []


def test_two_response_classes_with_the_same_name_are_an_error() -> None:
    other = type("ErrorBody", (BaseModel,), {})
    operation = Operation("GET", "/v1/models", list_models, "Models", response=other, errors=ERROR_RESPONSES)
    with pytest.raises(ValueError, match="two different schemas are named ErrorBody"):
        build_document(FastAPI(), [operation], Settings())
