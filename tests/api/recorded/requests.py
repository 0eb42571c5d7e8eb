# ruff: noqa: E501 - the lists of wrong values are easier to read in long lines
"""The requests whose answers are recorded, and the store that they use."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.images import image_bytes
from support.networks import CONDITIONAL, SECOND_NETWORKS, TINY, VOCABULARY, publish_network, publish_tiny
from support.responses import ADMIN_HEADERS, CLASSIFY, FORECAST, PNG, SAMPLE
from support.responses import CONTINUE as TEXT
from support.responses import SERIES as VALUES

from app import key_file
from app.store import Store

COMPLETIONS, IMAGES, TIMESERIES = "/v1/completions", "/v1/images/generations", "/v1/timeseries/forecast"
INFER, GENERATE = "/v2/models/tiny-lstm/infer", "/v2/models/tiny-rnn/generate"
KEY = "quartet-" + "k" * 43
LIMITS: dict[str, Any] = {  # small limits, so that bodies above a limit are short
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


@dataclass(frozen=True)
class Recorded:
    """One request."""

    method: str
    path: str
    body: Any = None  # bytes, or a value that is sent as JSON
    headers: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        if self.body is None or isinstance(self.body, bytes):
            return self.body or b""
        return json.dumps(self.body).encode()

    def __str__(self) -> str:
        """Return a description. It has no image or compressed data, because they depend on the libraries."""
        text = re.match(rb"[\s!-~]*", self.content)[0].decode().replace(f"{VALUES}"[1:-1], "VALUES")  # type: ignore[index]
        headers = {} if self.headers == ADMIN_HEADERS else self.headers
        description = f"{self.method} {self.path} {headers or ''}".strip() + f" {text}"
        return re.sub(r"\S{60,}|\s{60,}", lambda run: f"{run[0][:20]}...", description)[:400].strip()


def build_store(folder: Path) -> None:
    """Publish tiny networks of every task. Three versions of tiny-gan differ in their roles."""
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


def posts(path: str, *bodies: Any, headers: dict[str, Any] | None = None) -> list[Recorded]:
    """Return a POST request for each body."""
    return [Recorded("POST", path, body, headers or {}) for body in bodies]


def changed(path: str, good: dict[str, Any], *changes: dict[str, Any]) -> list[Recorded]:
    """Return a POST request for each change of a good body."""
    return posts(path, *({**good, **change} for change in changes))


def wrong_fields(path: str, good: dict[str, Any], wrong: dict[str, list[Any]]) -> list[Recorded]:
    """Return a good request, one with an unknown field, and requests in each of which one field is wrong."""
    fields = [{name: value} for name, values in wrong.items() for value in values]
    return changed(path, good, {}, {"nonsense": 1}, *fields)


def gets(*paths: str, headers: dict[str, str] | None = None) -> list[Recorded]:
    return [Recorded("GET", path, headers=headers or {}) for path in paths]


def methods(path: str) -> list[Recorded]:
    return [Recorded(method, path) for method in ("GET", "HEAD", "DELETE")]


def deadlines(path: str, good: Any, *values: str) -> list[Recorded]:
    return [Recorded("POST", path, good, {"x-request-timeout": value}) for value in values]


def form(*parts: tuple[str, str | None, bytes]) -> Recorded:
    """Return a classification of a multipart form with parts (name, filename, content)."""
    body = b""
    for name, filename, content in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        body += f'--limit\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    headers = {"content-type": "multipart/form-data; boundary=limit"}
    return Recorded("POST", CLASSIFY, body + b"--limit--\r\n", headers)


def classify_requests() -> list[Recorded]:
    image = base64.b64encode(PNG).decode()
    bmp = image_bytes("BMP", "L", (50, 20))
    large, many_pixels = image_bytes("PNG", "1", (250, 220)), image_bytes("PNG", "1", (400, 300))
    file = form(("file", "a.png", PNG))
    curl = {"content-type": "application/x-www-form-urlencoded"}
    queries = (
        "explain=true&top_k=1", "top_k=0", "top_k=x", "explain=1&explain=1", "size=3", "model=tiny-cnn@1", "model=tiny-gan",
    )  # fmt: skip
    forms = (
        form(("file", "a.png", PNG), ("file", "ü.png", PNG)),
        form(("file", "a.png", PNG), ("file", "b.png", b"no image")),
        form(("file", "b.png", b"no image")),
        form(("file", "b.png", b"")),
        form(("image", "a.png", PNG)),
        form(("file", None, b"hello")),
        form(*[(f"{i}", None, b"x") for i in range(4)]),
        form(),
        form(*[("file", "a.png", PNG)] * 5),
        Recorded("POST", CLASSIFY, file.body[:-12], file.headers),
    )
    explained = (form(("file", "a.bmp", bmp), ("file", "b.bmp", bmp)), form(*[("file", "a.png", large)] * 2))
    return [
        *posts(f"{CLASSIFY}?top_k=2&model=tiny-cnn", bmp),
        *posts(CLASSIFY, f'\n {{"images": ["{image}"]}}'.encode(), headers=curl),
        *(Recorded("POST", f"{CLASSIFY}?{query}", PNG) for query in queries),
        *posts(CLASSIFY, {}, *({"images": images} for images in ([], [1], ["%"], [image] * 4, [image, "QUJD"]))),
        *posts(CLASSIFY, {"files": []}),
        *forms,
        *(Recorded("POST", f"{CLASSIFY}?explain=1", each.body, each.headers) for each in explained),
        *posts(CLASSIFY, file.body, headers={"content-type": "multipart/form-data"}),
        *posts(CLASSIFY, file.body, headers={"content-type": "multipart/form-data; boundary=limit; charset=utf-16"}),
        *posts(CLASSIFY, b"", PNG[:100], b"x" * 200_001, many_pixels, headers={"content-type": "image/png"}),
        *posts(CLASSIFY, PNG, headers={"content-encoding": "gzip"}),
        *deadlines(CLASSIFY, PNG, "nan"),
        *methods(CLASSIFY),
    ]


MODELS = ["tiny-none", "tiny-gan@9", "tiny-gan@x", "tiny-gan@1", "tiny-pets", "tiny-cnn", "", 7, "x" * 300]


def text_requests() -> list[Recorded]:
    good = {"prompt": "abc", "max_characters": 8, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "prompt": [1, "x" * 201, "Aé1a", ""],
        "max_characters": [0, 101, None],
        "temperature": ["1"],
        "top_k": [1.5],
        "top_p": [1.1],
        "stop": ["x" * 101, [""], ["a"] * 17, 7],
        "seed": [-1, 2**53, 1.5, "1", True],
        "n": [5],
        "stream": [1],
        "model": MODELS,
    }
    stop = {"stream": True, "n": 2, "stop": ["ab", "ji"], "max_characters": 40, "prompt": "é"}
    greedy = {"temperature": 0, "top_p": 0.9, "top_k": 3, "n": 2}
    foreign = {"origin": "https://page.example", "host": "attacker.example:8000"}
    return [
        *wrong_fields(TEXT, good, wrong),
        *changed(TEXT, good, stop, {**stop, "stream": False}, greedy, {"x": " " * 200_001}),
        *posts(
            TEXT, b"null", [good], b'{"model": ', b'{"n": 1, "n": 1}', b'{"x": [' + b"1," * 5000 + b"1]}",
            b'{"temperature": Infinity}', b'{"seed": 123456789012345678901234567890}',
        ),
        *posts(f"{TEXT}?top_k=1", good),
        *posts(TEXT, good, headers={"content-encoding": "br"}),
        *posts(TEXT, good, headers=foreign),
        *deadlines(TEXT, good, "abc", "0", "-1"),
    ]  # fmt: skip


def series_requests() -> list[Recorded]:
    good = {"values": VALUES, "horizon": 3, "levels": [80, 95]}
    wrong: dict[str, list[Any]] = {
        "values": [
            [], None, ["1"], [None] * 20, [1e301] * 20, [VALUES, ["x"]], [VALUES] * 5, [0.5] * 301, [[]], [VALUES, 1.0],
            [5e-324, 0.0] * 10, [None] * 19 + [1.0],
        ],
        "horizon": [0, 41],
        "levels": [[0], [80, 80], [50.5, 99.9], [10] * 11],
        "level": [[80]],
        "h": [3],
        "seasonality": [0, 7],
        "integer": [1],
        "covariates": [{}, {"price": "x"}, {"price": ["x"]}, {"x" * 201: [1.0]}],
        "start": ["2024-01-01", 5, "x" * 101],
        "model": ["tiny-cnn"],
    }  # fmt: skip
    prices = [2.0] * 23
    shop = {**good, "model": "tiny-shop", "covariates": {"price": prices}, "start": "2024-01-02"}
    return [
        *wrong_fields(FORECAST, good, wrong),
        *posts(FORECAST, b"", {"values": VALUES, "h": 2, "level": [50]}, {"values": VALUES, "level": [50, 50]}),
        *changed(FORECAST, {**good, "model": "tiny-forecaster"},
            {"seasonality": 169}, {"values": [1.0, 2.0]}, {"values": [VALUES, VALUES[:9]]},
        ),
        *changed(FORECAST, shop,
            {}, {"covariates": None}, {"covariates": {"price": [2.0] * 22}}, {"covariates": {"price": prices, "rain": [1.0]}},
            {"start": None}, {"start": "yesterday"}, {"start": "2019-01-01"}, {"start": ["2024-01-02", "2024-01-02"]},
            {"covariates": {"price": [prices]}}, {"covariates": {"price": [2.0] * 400}}, {"values": [VALUES] * 2},
            {"values": [VALUES] * 2, "covariates": {"price": [prices, [3.0] * 23]}},
            {"values": [VALUES] * 2, "covariates": {"price": [prices] * 2}, "start": ["2024-01-02", "x"]},
        ),
    ]  # fmt: skip


def sample_requests() -> list[Recorded]:
    good = {"count": 2, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "count": [0, 9],
        "label": ["x", 5, "x" * 201],
        "seed": [-1],
        "end_seed": [2**53, 7],
        "model": ["tiny-cnn", "tiny-gan@2"],
    }
    labelled, png = {**good, "model": "tiny-cgan"}, {"accept": "image/png"}
    return [
        *wrong_fields(SAMPLE, good, wrong),
        *changed(SAMPLE, labelled, {"label": "y"}, {"label": "w"}),
        *posts(SAMPLE, {**labelled, "count": 5}, headers=png),
    ]


def completion_requests() -> list[Recorded]:
    good = {"model": "tiny-rnn", "prompt": "abc", "max_tokens": 6, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "prompt": [1, [], [[1], "b"], [99], [1.5], [[1], [99]], ["a"] * 5, "x" * 201],
        "max_tokens": [-1, 0, 101],
        "temperature": [2.5],
        "top_p": [1.1, 0],
        "top_k": [0],
        "n": [5],
        "best_of": [2, 0],
        "echo": [1],
        "logprobs": [2, 6],
        "logit_bias": [{"1": 101}, {"x": 1}, {"99": 1}, {"01": 1}, {"1": "x"}],
        "presence_penalty": [3],
        "frequency_penalty": [-3],
        "stop": ["a", [""]],
        "seed": [-1],
        "stream": [1],
        "stream_options": [{"include_usage": True}, {"usage": 1}, 5],
        "suffix": ["x"],
        "user": ["me", 5],
        "model": ["tiny-cnn", None],
    }
    return [
        *wrong_fields(COMPLETIONS, good, wrong),
        *changed(COMPLETIONS, good,
            {"echo": True, "max_tokens": 0}, {"stream": True, "logprobs": 1, "echo": True}, {"n": 2, "best_of": 2},
            {"stream": True, "stream_options": {"include_usage": True}}, {"temperature": 0, "frequency_penalty": -2},
            {"prompt": "a" * 150, "echo": True, "logprobs": 1, "n": 2}, {"prompt": ["a"] * 3, "n": 2},
            {"presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {"3": 100}},
            {"prompt": "", "echo": True, "logprobs": 5}, {"temperature": 0.5, "top_p": 0.9},
            {"prompt": [[2, 3, 4], [5, 6]], "n": 2},
            {"prompt": "abcé", "echo": True, "logprobs": 0, "max_tokens": 0, "stop": [*VOCABULARY[:-1]]},
        ),
    ]  # fmt: skip


def image_requests() -> list[Recorded]:
    good = {"prompt": "digits", "n": 1, "model": "tiny-cgan", "seed": 1}
    wrong: dict[str, list[Any]] = {
        "prompt": [5, "y", "w", "x" * 1001],
        "n": [0, 9],
        "response_format": ["url", 5],
        "size": ["28x28", "1024x1024"],
        "output_format": ["jpeg"],
        "quality": ["hd"],
        "background": ["transparent"],
        "moderation": ["high"],
        "stream": [True],
        "seed": [-1],
        "user": [1],
        "model": ["tiny-cnn", "tiny-gan"],
    }
    return [*wrong_fields(IMAGES, good, wrong), *posts(IMAGES, b"")]


def timeseries_requests() -> list[Recorded]:
    series = {"type": "univariate_time_series", "series": VALUES, "frequency": "hour"}
    good = {"model": "tiny-lstm", "inputs": [series], "options": {"horizon": 3, "quantiles": [0.1, 0.5]}}

    def inputs(model: str, *changes: dict[str, Any]) -> list[Recorded]:
        bodies = [{"model": model, "inputs": [{**series, **change}]} for change in changes]
        return changed(TIMESERIES, good, *bodies)

    wrong: dict[str, list[Any]] = {
        "inputs": [[], [5], [series] * 5, [series, {**series, "series": [1.0]}], [{"type": series["type"], "series": VALUES}]],
        "options": [{}, {"horizon": 0}, {"horizon": 41}, {"horizon": 3, "quantiles": [0]}, {"horizon": 3, "quantiles": [1e-13]}, {"horizon": 3, "x": 1},
                    {"horizon": 2, "quantiles": [0.9, 0.1, 0.5, 0.25]}, {"horizon": 3, "quantiles": [0.5] * 11},
                    {"horizon": 3, "quantiles": [1e-12, 0.5 - 1e-14, 0.5, 1 - 1e-12]}],
        "metadata": [5],
        "model": ["tiny-cnn", "tiny-forecaster", "tiny-shop"],
    }  # fmt: skip
    return [
        *wrong_fields(TIMESERIES, good, wrong),
        *posts(TIMESERIES, b""),
        *inputs("tiny-lstm",
            {"type": "x"}, {"frequency": "fortnight"}, {"series": ["x"]}, {"series": [0.5] * 301}, {"one": 1},
            {"name": "n", "start_timestamp": "2024-01-31T00:00:00Z", "frequency": "M"}, {"start_timestamp": "soon"},
            {"start_timestamp": "2026-01-01T00:00:00+02:00", "frequency": "H"},
            {"start_timestamp": "2026-01-31", "frequency": "quarter"}, {"start_timestamp": "2024-02-29", "frequency": "Y"},
        ),
        *inputs("tiny-days",
            {"frequency": "D", "start_timestamp": "2024-01-01"}, {"frequency": "day"}, {"frequency": "hour"},
            {"frequency": "D", "start_timestamp": "2019-01-01"},
        ),
        *methods("/v1/timeseries/models"),
    ]  # fmt: skip


def tensor(name: str, datatype: str, shape: list[int], data: Any = None, **parameters: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    return entry | ({} if data is None else {"data": data}) | ({"parameters": parameters} if parameters else {})


def infer(model: str, *inputs: Any, **fields: Any) -> Recorded:
    return Recorded("POST", f"/v2/models/{model}/infer", {"inputs": inputs, **fields})


VALUES_TENSOR = tensor("values", "FP64", [1, 20], VALUES)
LATENTS = tensor("latents", "FP32", [2, 4], [0.1, -0.2, 0.3, 0.4] * 2)
SEEDED = {"seed": 1, "max_characters": 3}


def infer_requests() -> list[Recorded]:
    prompt = tensor("prompt", "BYTES", [2], ["abc", "é"])
    covariates = tensor("covariates", "FP32", [1, 22, 1], [1.0] * 22)
    good = (
        ("tiny-lstm", [{**VALUES_TENSOR, "data": [VALUES]}], {"horizon": 3, "levels": "50,90.5"}),
        ("tiny-lstm", [VALUES_TENSOR], {"horizon": 2, "levels": 50}),
        ("tiny-forecaster", [VALUES_TENSOR], {"horizon": 2, "levels": "", "integer": True}),
        ("tiny-rnn", [prompt], {"seed": 1, "max_characters": 4}),
        ("tiny-cgan", [LATENTS, tensor("classes", "BYTES", [2, 1], ["x", "z"])], {}),
        ("tiny-shop", [VALUES_TENSOR, covariates, tensor("start", "BYTES", [1], ["2024-01-02"])], {"horizon": 2}),
    )
    best = {"name": "log_probabilities", "parameters": {"classification": 2}}
    mean = ({"shared_memory_region": "a"}, {"binary_data": 1}, {"classification": 1}, {"x": []})
    outputs = (
        [{"name": "x"}],
        [{"name": "mean"}] * 2,
        5,
        [{}],
        *([{"name": "mean", "parameters": each}] for each in mean),
    )
    parameters: tuple[dict[str, Any], ...] = (
        {"horizon": "3"}, {"levels": "x"}, {"levels": "80,80"}, {"levels": 0}, {"x": 1}, {"horizon": 41}, {"timeout": -1},
        {"timeout": "1"}, {"timeout": 1}, {"priority": 1}, {"seasonality": 7}, {"triton_x": 1}, {"binary_data_output": 1},
        {"horizon": [1]}, {"seed": 1}, {"timeout": 10**400},
    )  # fmt: skip
    text_parameters = ({"max_characters": 0}, {"temperature": 11}, {"stop": ""}, {"seed": -1}, {"prompt": "x"})
    changes: tuple[dict[str, Any], ...] = (
        {"name": "x"}, {"datatype": "INT8", "shape": [1, 2], "data": [1, 2]}, {"shape": [20]}, {"shape": [1, 19]},
        {"data": "x"}, {"data": ["1"] * 20}, {"data": [[1], [2]]}, {"data": [[1.0] * 19, [1.0]]}, {"datatype": "FP16"},
        {"datatype": "XX"}, {"shape": [5, 20], "data": VALUES * 5}, {"shape": [0, 20], "data": []}, {"shape": [1, -1]},
        {"shape": [1, 301], "data": [1.0] * 301}, {"parameters": {"binary_data_size": 8}}, {"parameters": {"x": [1]}},
        {"datatype": "FP32", "data": [1e39] * 20}, {"data": [1e301] * 20}, {"shape": [1, 2], "data": [1, 2]},
        {"shape": [1] * 9, "data": [1]}, {"data": [None] * 20}, {"data": [math.inf] * 20}, {"data": [[VALUES]]},
        {"parameters": None, "x": 1},
    )  # fmt: skip
    no_data = (
        {"binary_data_size": -1},
        {"binary_data_size": 0},
        {"binary_data_size": "8"},
        {"shared_memory_region": "x"},
    )
    classes: tuple[tuple[str, list[int], list[Any]], ...] = (
        ("INT64", [2], [0, 3]), ("INT64", [3], [0, 1, 2]), ("BYTES", [2], ["x", "w"]), ("INT8", [2], [0, 128]),
        ("INT64", [2], [0, 1.5]), ("INT64", [2], [0, None]),
    )  # fmt: skip
    return [
        *(infer(model, *inputs, parameters=each, id="mine") for model, inputs, each in good),
        infer("tiny-rnn", prompt, parameters=SEEDED, outputs=[{"name": "text"}]),
        infer("tiny-rnn", prompt, parameters={"seed": 1}, outputs=[best]),
        infer("tiny-rnn", prompt, outputs=[{**best, "parameters": {"classification": 0}}]),
        *(infer("tiny-lstm", VALUES_TENSOR, outputs=each, parameters={"horizon": 2}) for each in outputs),
        *(infer("tiny-lstm", VALUES_TENSOR, parameters=each) for each in parameters),
        *(infer("tiny-rnn", prompt, parameters=each) for each in text_parameters),
        *posts(
            INFER,
            *({"inputs": each} for each in (5, [5], [{}], [VALUES_TENSOR] * 2, [tensor("values", "FP64", [1, 20])])),
        ),
        *(infer("tiny-lstm", tensor("values", "FP64", [1, 20], **each)) for each in no_data),
        *(infer("tiny-lstm", {**VALUES_TENSOR, **each}) for each in changes),
        *(infer("tiny-cgan", LATENTS, tensor("classes", *each)) for each in classes),
        infer("tiny-cgan", LATENTS),
        infer("tiny-gan", tensor("latents", "FP64", [1, 4], [1e4, 0, 0, 0])),
        infer("tiny-gan", tensor("latents", "FP64", [9, 4], [0] * 36)),
        infer("tiny-cnn", tensor("image", "FP32", [1, 3, 32, 32], [256] * 3072)),
        infer("tiny-rnn", tensor("prompt", "BYTES", [5], ["a"] * 5)),
        infer("tiny-rnn", tensor("prompt", "BYTES", [1], ["x" * 201])),
        infer("tiny-rnn", tensor("prompt", "BYTES", [1], [5])),
        infer("tiny-shop", VALUES_TENSOR, covariates),
        *(infer(f"tiny-{model}", LATENTS) for model in ("none", "gan@1", "pets", "lstm/versions/x", "lstm/versions/2")),
        infer("tiny-lstm/versions/1", VALUES_TENSOR),
        *binary_requests(),
        *posts(INFER, b"null", b"", b"{", b" " * 200_001),
        *deadlines(INFER, {"inputs": [VALUES_TENSOR]}, "0"),
        *methods(INFER),
    ]


def binary_requests() -> list[Recorded]:
    """Return compressed requests, and requests of JSON with the length in a header and then tensors, or only a tensor."""
    body = json.dumps({"inputs": [VALUES_TENSOR], "parameters": {"horizon": 2}}).encode()
    compressed = (
        ("gzip", body), ("gzip", gzip.compress(body)[:-9]), ("br", body), ("gzip", gzip.compress(b" " * 300_000)),
        ("deflate", zlib.compress(body)), ("GZIP", gzip.compress(body) + b"x"),
    )  # fmt: skip
    length, row = "inference-header-content-length", struct.pack("<20d", *VALUES)
    head = json.dumps({"inputs": [tensor("values", "FP64", [1, 20], binary_data_size=160)]}).encode()
    raw = (("lstm", row), ("lstm", row[:-1]), ("rnn", b"abc\xff"), ("cgan", row), ("cnn", bytes(3072)))
    text = struct.pack("<I", 3) + b"abc"

    def sized(content: bytes) -> Recorded:
        body = {"inputs": [tensor("prompt", "BYTES", [1], binary_data_size=len(content))], "parameters": SEEDED}
        head = json.dumps(body).encode()
        return Recorded("POST", f"{GENERATE[:-8]}infer", head + content, {length: str(len(head))})

    return [
        *(Recorded("POST", INFER, content, {"content-encoding": coding}) for coding, content in compressed),
        *posts(INFER, head + row, head + row[:-1], head + row + b"1", headers={length: str(len(head))}),
        *(Recorded("POST", INFER, head, {length: value}) for value in ("x", "99999", "²".encode())),
        *(Recorded("POST", f"/v2/models/tiny-{model}/infer", content, {length: "0"}) for model, content in raw),
        *map(sized, (text, text[:-1], text * 2, text[:3], b"\xff\xff\xff\xff\0\0\0", b"")),
    ]


def generate_requests() -> list[Recorded]:
    good = {"text_input": "abc", "parameters": {"seed": 1, "max_tokens": 5}}
    flat = {"text_input": "abc", "seed": 1, "max_characters": 4, "stop": ["a", "b"]}
    models = ("tiny-gan", "tiny-rnn@2", "tiny-rnn/versions/x", "tiny-pets")
    return [
        *posts("/v2/models/tiny-rnn/versions/1/generate_stream", good, flat),
        *changed(GENERATE, good,
            {"id": "mine"}, {"id": 5}, {"id": "x" * 1001}, {"parameters": 5}, {"seed": 2}, {"stream": True}, {"stream": 5},
            {"max_characters": 5}, {"x": 1}, {"parameters": {"seed": "x"}}, {"parameters": None, "seed": 1},
        ),
        *changed(GENERATE, {"text_input": "a"},
            {"text_input": 5}, {"text_input": "x" * 201}, {"text_input": " " * 200_001}, {"max_tokens": 101},
            {"max_tokens": None}, {"timeout": 1}, {"priority": 2}, {"n": 2},
        ),
        *posts(GENERATE, {}, [], flat),
        *(Recorded("POST", f"/v2/models/{model}/generate", good) for model in models),
    ]  # fmt: skip


def description_requests() -> list[Recorded]:
    """Return requests for descriptions of the service and its models, and for pages."""
    models = (
        "tiny-cnn", "tiny-rnn", "tiny-lstm", "tiny-forecaster", "tiny-gan", "tiny-cgan", "tiny-shop", "tiny-gan@3",
        "tiny-pets", "tiny-gan/versions/4", "tiny-gan/versions/x", "tiny-gan/versions/9",
    )  # fmt: skip
    return [
        *gets(
            "/health/live", "/health/ready", "/v1/models", "/v1/models/tiny-cnn", "/v1/models/tiny-gan@2",
            "/v1/models/tiny-gan@1", "/v1/models/tiny-gan@9", "/v1/models/tiny-pets", "/v1/models/tiny-cnn/pictures/a.png",
            "/v1/models/tiny-none/pictures/a.png", "/v1/models/../pictures/a.png", "/v1/models/", "/v2", "/v2/",
            "/v2/nothing", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/stats", "/web/none.js",
            "/nothing?x=%ff", "/v1/Images/classify", "//v1/models", "/v1/models/%2e%2e", "/", "/docs", "/openapi.json", "/redoc",
            "/v1/models?versoin=1", "/v2/models/tiny-gan/config?versoin=1", "/v1/models/tiny-cnn/pictures/..%2fcard.json",
            "/metrics",
        ),
        *(
            Recorded(method, path)
            for path in ("/v1/models", "/v2/models/tiny-cnn", "/nothing", "/v1/chat/completions", "/")
            for method in ("HEAD", "POST")
        ),
        *gets(*(f"/v2/models/{model}{part}" for model in models for part in ("", "/config", "/ready"))),
        *gets(*(f"/v2/models/{model}/stats" for model in ("tiny-none", "tiny-pets", "tiny-gan@1"))),
        *gets("/", headers={"if-none-match": "*"}),
    ]  # fmt: skip


def repository_requests() -> list[Recorded]:
    index, model = "/v2/repository/index", "/v2/repository/models/tiny-"
    changes = (
        "none/load", "gan@9/load", "gan/unload", "cgan@1/unload", "cgan/unload", "none/unload", "cgan/load", "gan@2/load",
    )  # fmt: skip
    parameters = ({"config": "{}"}, 5, {"unload_dependents": True})
    return [
        *posts(index, b"", {"ready": True}, {"ready": 1}, [], b"{"),
        *posts(f"{model}pets/unload", {}, headers={"authorization": "Bearer x"}),
        *posts(f"{model}pets/unload", {}, headers={"authorization": "Basic x"}),
        *posts(f"{model}gan/load", *({"parameters": each} for each in parameters), headers=ADMIN_HEADERS),
        *(Recorded("POST", model + change, {}, ADMIN_HEADERS) for change in changes),
        *posts(f"{model}cgan/unload", b"{", headers=ADMIN_HEADERS),
        *methods(index),
    ]


def admin_requests() -> list[Recorded]:
    admin, gan, cnn = "/v1/admin", "/v1/admin/models/tiny-gan", "/v1/admin/models/tiny-cnn"
    queries = ("", "?name=../x", "?name=a&task=b", "?name=a&size=x", "?x=1", "?name=a&title=%00")

    def posts_with_key(path: str, *bodies: Any) -> list[Recorded]:
        return posts(path, *bodies, headers=ADMIN_HEADERS)

    return [
        *gets(f"{admin}/models", gan, f"{admin}/models/tiny-none", f"{admin}/verify", headers=ADMIN_HEADERS),
        *posts_with_key(
            f"{gan}/activate", {"version": 2}, {"version": 3, "share": 25}, {"version": "latest"}, {"version": 0},
            {"version": 9}, {}, {"version": 1}, {"version": "2"}, {"version": 2, "share": 0}, {"version": 2, "share": 101},
            {"x": 1}, b"{",
        ),
        *posts_with_key(f"{admin}/models/tiny-none/activate", {"version": 1}),
        *posts_with_key(f"{gan}/activate?x=1", {"version": 2}),
        *posts_with_key(f"{gan}/rollback", {"version": 1}, {}),
        *posts_with_key(f"{admin}/models/tiny-none/rollback", None),
        *posts_with_key(f"{cnn}/rollback", None),
        *posts_with_key(
            f"{gan}/retire", {"version": 2}, {"version": 2, "undo": True}, {"version": 9}, {}, {"version": 1, "undo": 1},
            {"x": " " * 2**14},
        ),
        *posts_with_key(f"{cnn}/retire", {"version": 1}),
        *posts_with_key(f"{admin}/import", b"no archive"),
        *posts_with_key(f"{admin}/import?renumber=x", b""),
        *(Recorded("POST", f"{admin}/add{query}", b"no network", ADMIN_HEADERS) for query in queries),
        *gets(
            *(f"{cnn}/export{query}" for query in ("", "?version=9", "?version=x", "?x=1")), f"{gan}/export?version=2",
            f"{admin}/models/tiny-none/export", headers=ADMIN_HEADERS,
        ),
        *gets(*(f"{admin}/{path}" for path in ("models", "import", "add", "verify")), f"{cnn}/activate", f"{cnn}/rollback"),
    ]  # fmt: skip


def all_requests() -> list[Recorded]:
    """Return all requests in the order in which they are sent. Later ones may change the store."""
    return [
        *classify_requests(), *text_requests(), *series_requests(), *sample_requests(), *completion_requests(),
        *image_requests(), *timeseries_requests(), *infer_requests(), *generate_requests(), *description_requests(),
        *repository_requests(), *admin_requests(),
    ]  # fmt: skip


def protected_requests() -> list[Recorded]:
    """Return requests to a service with API keys, CORS, trusted host names and no admin key."""
    bearer, origin, other = {"authorization": f"Bearer {KEY}"}, "https://page.example", "https://other.example"
    keys: tuple[dict[str, Any], ...] = (
        {},
        {"authorization": f"bearer  {KEY}"},
        {"authorization": "Bearer"},
        {"x-api-key": KEY[:-1]},
        {"x-api-key": KEY.upper()},
        {"x-api-key": "x" * 10_000},
        {"x-api-key": "é".encode()},
        {"x-api-key": key_file.digest(KEY).hex()},
        {"authorization": f"Basic {KEY}"},
        {"x-api-key": KEY},
        {**bearer, "origin": origin},
        {**bearer, "origin": other},
        {"origin": origin},
    )
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    sent = "content-type, x-stainless-lang, x-stainless-os, inference-header-content-length"
    preflights = ({"origin": origin}, {"origin": origin, "access-control-request-headers": sent}, {"origin": other})
    return [
        *(Recorded("POST", SAMPLE, {"count": 1, "seed": 1}, headers) for headers in keys),
        *gets("/v2/models", "/v2/health/ready", "/openapi.json", "/metrics", "/nothing", "/v1/admin/models"),
        *gets("/v2/models/tiny-gan", headers=bearer),
        Recorded("HEAD", "/"),
        *posts("/v2/repository/models/tiny-pets/load", {}, headers=bearer),
        *(Recorded("OPTIONS", SAMPLE, headers={**preflight, **headers}) for headers in preflights),
        *gets("/health/live", headers={"host": "www.example.org"}),
        *gets("/health/live", "/v2", headers={"host": "attacker.example"}),
    ]
