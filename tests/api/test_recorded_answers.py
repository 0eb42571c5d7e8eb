"""Several hundred requests to all endpoints get the answers that are recorded for them: status, headers and body.

Each line of the files in ``recorded/`` has a request and its answer. To add a request, write a line without an answer.
``RECORD=1 python -m pytest tests/api/test_recorded_answers.py`` records all answers again after an intended change.
The order matters, because some requests change the store.

Times, ids, sizes and versions of libraries are left out. Floats are rounded, and may differ slightly, because they
depend on the processor. Images are recorded as their size and mean.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from support.networks import CONDITIONAL, SECOND_NETWORKS, TINY, publish_network, publish_tiny
from support.responses import ADMIN_KEY
from support.service import TEST, make_settings, serving

from app import key_file
from app.settings import Settings
from app.store import Store

FOLDER = Path(__file__).with_name("recorded")
KEY = "quartet-" + "k" * 43
LIMITS: dict[str, Any] = {  # small limits, so that most bodies above a limit are short
    "max_body_bytes": 200_000,
    "max_images": 3,
    "max_pixels": 100_000,
    "max_prompt_characters": 200,
    "max_characters": 100,
    "max_texts": 4,
    "max_series": 4,
    "max_series_values": 300,
    "max_horizon": 20,  # below the default
    "max_samples": 8,
}
SECURITY_HEADERS = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}
VARYING_HEADERS = {"date", "x-request-id", "content-length", "etag", "transfer-encoding", *SECURITY_HEADERS}
VARYING_FIELDS = {
    *("created", "created_at", "changed", "bytes", "seconds_since_progress", "weights_sha256", "commit", "torch"),
    *("count", "ns", "last_inference", "inference_count", "execution_count"),  # in statistics
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Publish tiny networks of every task. Three versions of tiny-gan differ in their roles."""
    folder = tmp_path / "store"
    for name in (*TINY, *SECOND_NETWORKS):
        publish_tiny(folder, name)
    for _ in range(3):
        publish_tiny(folder, "tiny-gan")
    calendar = {"country": "DE", "step": "day", "first_year": 2020, "last_year": 2030, "dates": ["2024-01-01"]}
    columns = [{"name": name, "mean": 1.0, "scale": 2.0, "coefficient": 0.5} for name in ("price", "holidays")]
    for name, known in (("tiny-shop", columns), ("tiny-days", columns[1:])):
        series = {"season": 7, "known": {"columns": known, "calendar": calendar}}
        publish_network(folder, name, seed=5, series=series)
    publish_network(folder, "tiny-pets", "conditional-generator", CONDITIONAL, 6, labels=["cat", "Dog", "bird"])
    Store(folder).retire("tiny-gan", 1)
    Store(folder).unload("tiny-pets")
    return folder


def test_answers_of_all_endpoints_are_as_recorded(folder: Path) -> None:
    settings = make_settings(store=folder, admin_key=ADMIN_KEY, store_poll_seconds=3600, **LIMITS, **TEST)
    with serving(settings) as client:
        compare(FOLDER / "answers.jsonl", client)


def test_answers_of_a_protected_service_are_as_recorded(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice {key_file.digest(KEY).hex()}\n")
    settings = Settings(
        store=folder, keys_file=keys, cors_origins="https://page.example", trusted_hosts="www.example.org", **TEST
    )
    with serving(settings) as client:
        compare(FOLDER / "protected_answers.jsonl", client)


def compare(path: Path, client: httpx.Client) -> None:
    """Send the requests in a file, and compare their answers with those in the file, or record them."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    problems, document = [], client.get("/openapi.json").json()
    for number, line in enumerate(lines, 1):
        request = line["request"]
        response = send(client, request)
        if response.content and response.headers["content-type"] == "application/json":
            check_schema(document, response)
        answer = json.loads(json.dumps(describe(response)))  # NaN and tuples as in the file
        place = f"line {number}, {request['method']} {request['path']}"
        problems += [f"{place}: {difference}" for difference in differences(line.get("answer"), answer)]
        line["answer"] = answer
    if os.environ.get("RECORD"):
        path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), "utf-8")
    else:
        assert not problems, f"{len(problems)} differences:\n" + "\n".join(problems[:60])


def send(client: httpx.Client, request: dict[str, Any]) -> httpx.Response:
    """Send a recorded request. Its body is ``json``, ``base64``, or ``text``, which is repeated ``repeat`` times."""
    content = request.get("text", "").encode() * request.get("repeat", 1) or base64.b64decode(request.get("base64", ""))
    if "json" in request:
        content = json.dumps(request["json"]).encode()
    headers = {name: value.encode("latin-1") for name, value in request.get("headers", {}).items()}
    return client.request(request["method"], request["path"], content=content, headers=headers)


def check_schema(document: dict[str, Any], response: httpx.Response) -> None:
    """Check that the OpenAPI document has the status of an answer, and that the answer has its schema."""
    request, status, paths = response.request, str(response.status_code), document["paths"]
    path = request.url.raw_path.decode().partition("?")[0]
    matching = [row for row in paths if path not in paths and re.fullmatch(re.sub(r"{\w+}", "[^/]+", row), path)]
    for template in matching or [path]:
        responses = paths.get(template, {}).get(request.method.lower(), {}).get("responses", {})
        if answer := responses.get(status, responses.get(f"{status[0]}XX")):
            assert status in responses or f"{status}: " in answer["description"], path
            schema = answer["content"]["application/json"]["schema"]
            Draft202012Validator({**schema, "components": document["components"]}).validate(response.json())


def describe(response: httpx.Response) -> list[Any]:
    """Return the status, the headers and the body of a response, without the parts that vary."""
    headers = {name: value for name, value in response.headers.items() if name not in VARYING_HEADERS}
    assert response.headers["x-request-id"]
    assert SECURITY_HEADERS.items() <= dict(response.headers).items()
    if response.request.method != "HEAD" and "content-length" in response.headers:
        assert int(response.headers["content-length"]) == len(response.content)
    if "allow" in headers:
        headers["allow"] = ", ".join(sorted(headers["allow"].split(", ")))
    if headers.get("content-type") == "application/json":
        del headers["content-type"]
    return [response.status_code, headers, body(response)]


def body(response: httpx.Response) -> Any:
    """Return a description of the body."""
    path = response.request.url.raw_path.decode()
    kind, content = response.headers.get("content-type", "").split(";")[0], response.content
    if not content or path in ("/", "/docs", "/redoc") or (path.startswith("/web/") and response.status_code == 200):
        return bool(content)
    if path == "/metrics" and response.status_code == 200:
        return sorted(
            family.name for family in text_string_to_metric_families(response.text) if "quartet" in family.name
        )
    if path == "/openapi.json" and response.status_code == 200:
        return document_summary(response.json())
    if kind == "application/json":
        return stable(json.loads(content))
    if kind == "text/event-stream":
        return stream(response.text)
    if kind == "application/octet-stream":
        length = int(response.headers["inference-header-content-length"])
        head = json.loads(content[:length])
        return [stable(head), tensors(head["outputs"], content[length:])]
    if kind == "application/zip":
        return sorted(zipfile.ZipFile(io.BytesIO(content)).namelist())
    if kind.startswith("image/"):
        return picture(content)
    return response.text[:300]


def stream(text: str) -> list[Any]:
    """Return the events of a stream. The events of each text are joined, because their number depends on the speed."""
    joined: dict[Any, Any] = {}
    others = []
    for line in text.split("\n\n"):
        event = line.removeprefix("data: ")
        if event in ("", "[DONE]"):
            others.append(event)
            continue
        content = stable(json.loads(event))
        choice = content.get("choices", [content])[:1]
        key = choice[0].get("index", 0) if choice else "end"
        joined[key] = joined_event(joined[key], content) if key in joined else content
    return [*joined.values(), *others]


def joined_event(first: Any, second: Any, name: str = "") -> Any:
    if isinstance(first, dict) and isinstance(second, dict) and name != "usage":
        return {**first, **{key: joined_event(first.get(key), second[key], key) for key in second}}
    if name == "choices":
        return [joined_event(first[0], second[0])]
    if isinstance(first, list) or name in ("text", "text_output"):
        return first + second
    return second


def tensors(outputs: list[dict[str, Any]], content: bytes) -> list[Any]:
    """Return the values of binary tensors."""
    types = {"FP64": "<f8", "FP32": "<f4", "UINT8": "u1"}
    result: list[Any] = []
    for output in outputs:
        part, content = np.split(np.frombuffer(content, np.uint8), [output["parameters"]["binary_data_size"]])
        if output["datatype"] == "BYTES":
            result.append(part.tobytes().decode("utf-8", "replace"))
        else:
            array = np.frombuffer(part.tobytes(), types[output["datatype"]])
            result.append(stable(array.tolist() if len(array) < 100 else [len(array), float(array.mean())]))
        content = content.tobytes()
    assert not content
    return result


def picture(content: bytes) -> str:
    image = Image.open(io.BytesIO(content))
    return f"{image.format} {image.size[0]}x{image.size[1]} {image.mode} {np.asarray(image).mean():.0f}"


def stable(value: Any, name: str = "") -> Any:
    """Return JSON without the parts that vary between runs and machines."""
    if name in VARYING_FIELDS:
        return f"({type(value).__name__})"
    if isinstance(value, dict):
        return {key: stable(part, key) for key, part in value.items()}
    if isinstance(value, list):
        if len(value) > 100 and all(isinstance(part, int) for part in value):
            return [len(value), sum(value) // len(value)]
        return [stable(part, name) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, str):
        if value.startswith("iVBOR"):
            return picture(base64.b64decode(value))
        value = value.replace("HEAD, GET", "GET, HEAD")
        return re.sub(r"(cmpl|forecast)-[0-9a-f]{24}", r"\1-(id)", value)
    return value


def document_summary(document: dict[str, Any]) -> Any:
    """Return the operations of an OpenAPI document, and the limits of the fields of its schemas."""

    def contents(part: dict[str, Any]) -> dict[str, Any]:
        return {kind: limits(content["schema"]) for kind, content in part.get("content", {}).items()}

    operations = {
        f"{method} {path}": [
            operation["operationId"],
            [[parameter.get("name"), limits(parameter)] for parameter in operation["parameters"]],
            [body.get("required"), contents(body)] if (body := operation.get("requestBody")) else None,
            {
                status: [*re.findall(r"\d{3}(?=: )", answer["description"]), list(answer["headers"]), contents(answer)]
                for status, answer in operation["responses"].items()
            },
            operation.get("security"),
        ]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    schemas = {
        name: {field: limits(schema) for field, schema in part.get("properties", {}).items()}
        for name, part in document["components"]["schemas"].items()
    }
    return [operations, schemas, document.get("security"), list(document["components"].get("securitySchemes", []))]


def limits(part: Any) -> Any:
    """Return the references, default values and limits of a part of an OpenAPI document."""
    if isinstance(part, list):
        return [limits(each) for each in part]
    if not isinstance(part, dict):
        return part
    kept = r"\$ref|schema|anyOf|items|default|(exclusive)?(min|max)\w+"
    return {key: limits(each) for key, each in part.items() if re.fullmatch(kept, key, re.IGNORECASE)}


def differences(recorded: Any, answer: Any, path: str = "") -> Iterable[str]:
    """Yield the differences of two answers. The fields of an object have an order."""
    if isinstance(recorded, float) and isinstance(answer, float):
        if not math.isclose(recorded, answer, rel_tol=1e-3, abs_tol=1e-4):
            yield f"{path} is {answer}, recorded {recorded}"
    elif isinstance(recorded, dict) and isinstance(answer, dict):
        if list(recorded) != list(answer):
            yield f"{path} has the fields {list(answer)}, recorded {list(recorded)}"
        for key in recorded.keys() & answer.keys():
            yield from differences(recorded[key], answer[key], f"{path}.{key}")
    elif isinstance(recorded, list) and isinstance(answer, list):
        if len(recorded) != len(answer):
            yield f"{path} has {len(answer)} entries, recorded {len(recorded)}: {answer}"[:500]
        for i, (one, other) in enumerate(zip(recorded, answer, strict=False)):
            yield from differences(one, other, f"{path}.{i}")
    elif type(recorded) is not type(answer) or recorded != answer:
        yield f"{path} is {answer!r}, recorded {recorded!r}"[:700]
