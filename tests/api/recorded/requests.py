# ruff: noqa: E501 - the lists of wrong values are easier to read in long lines
"""The requests whose answers are recorded, and the store that they use."""

from __future__ import annotations

import base64
import gzip
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.images import image_bytes
from support.networks import (
    CONDITIONAL,
    SECOND_NETWORKS,
    TINY,
    VOCABULARY,
    publish_network,
    publish_tiny,
)
from support.responses import ADMIN_HEADERS

from app import key_file
from app.store import Store

CLASSIFY, TEXT, SERIES, SAMPLE = (
    "/v1/images/classify",
    "/v1/text/continue",
    "/v1/series/forecast",
    "/v1/images/sample",
)
COMPLETIONS, IMAGES, TIMESERIES = "/v1/completions", "/v1/images/generations", "/v1/timeseries/forecast"
VALUES = [float(i % 7) for i in range(20)]
PNG = image_bytes()
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
    """One request. ``name`` is unique, and is the key of its recorded answer."""

    name: str
    method: str
    path: str
    body: Any = None  # bytes, or a value that is sent as JSON
    headers: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        return (
            self.body if isinstance(self.body, bytes) else b"" if self.body is None else json.dumps(self.body).encode()
        )


def build_store(folder: Path) -> None:
    """Publish tiny networks of every task. Three versions of tiny-gan differ in their roles."""
    for name in (*TINY, *SECOND_NETWORKS):
        publish_tiny(folder, name)
    for _ in range(3):
        publish_tiny(folder, "tiny-gan")
    calendar = {"country": "DE", "step": "day", "first_year": 2020, "last_year": 2030, "dates": ["2024-01-01"]}
    columns = [{"name": name, "mean": 1.0, "scale": 2.0, "coefficient": 0.5} for name in ("price", "holidays")]
    known = {"columns": columns, "calendar": calendar}
    for name, series in (
        ("tiny-shop", {"season": 7, "known": known}),
        ("tiny-days", {"season": 7, "known": {**known, "columns": columns[1:]}}),
    ):
        publish_network(folder, name, seed=5, series=series)
    publish_network(folder, "tiny-pets", "conditional-generator", CONDITIONAL, 6, labels=["cat", "Dog", "bird"])
    Store(folder).retire("tiny-gan", 1)
    Store(folder).unload("tiny-pets")


def form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of a multipart form with parts (name, filename, content)."""
    body = b""
    for name, filename, content in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        body += f'--limit\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--limit--\r\n", {"content-type": "multipart/form-data; boundary=limit"}


def posts(name: str, path: str, bodies: Iterable[Any], headers: dict[str, Any] | None = None) -> Iterator[Recorded]:
    """Yield a POST request for each body."""
    for i, body in enumerate(bodies):
        yield Recorded(f"{name} {i}", "POST", path, body, headers or {})


def changed(name: str, path: str, good: dict[str, Any], changes: Iterable[dict[str, Any]]) -> Iterator[Recorded]:
    """Yield a POST request for each change of a good body."""
    return posts(name, path, ({**good, **change} for change in changes))


def wrong_fields(
    path: str, good: dict[str, Any], wrong: dict[str, list[Any]], required: tuple[str, ...] = ()
) -> Iterator[Recorded]:
    """Yield requests in each of which one field is wrong or missing, or the whole body is."""
    for name, values in wrong.items():
        yield from changed(f"{path} {name}", path, good, ({name: value} for value in values))
    for name in required:
        yield Recorded(f"{path} no {name}", "POST", path, {key: good[key] for key in good if key != name})
    if required:  # otherwise the answer would have a random seed
        yield Recorded(f"{path} empty", "POST", path, b"")
    yield from changed(path, path, good, ({}, {"nonsense": 1}, {"x": " " * 200_001}))
    twice = json.dumps(good)[:-1] + f", {json.dumps(next(iter(good)))}: 1}}"
    many_commas, many_objects = b'{"x": [' + b"1," * 5000 + b"1]}", b'{"x": [' + b'{"a":1} ' * 2500 + b"]}"
    yield from posts(f"{path} body", path, (b"null", [good], b'{"model": ', twice.encode(), many_commas, many_objects))
    yield Recorded(f"{path} query", "POST", f"{path}?top_k=1", good)
    yield Recorded(f"{path} encoding", "POST", path, good, {"content-encoding": "br"})
    yield from deadlines(path, good)
    yield from methods(path)


def deadlines(path: str, good: Any) -> Iterator[Recorded]:
    for value in ("abc", "0", "-1", "nan"):
        yield Recorded(f"{path} timeout {value}", "POST", path, good, {"x-request-timeout": value})


def methods(path: str) -> Iterator[Recorded]:
    for method in ("GET", "HEAD", "DELETE"):
        yield Recorded(f"{method} {path}", method, path)


MODELS = ["tiny-none", "tiny-gan@9", "tiny-gan@x", "tiny-gan@1", "tiny-pets", "tiny-cnn", "", 7, "x" * 300]
SEEDS = [-1, 2**53, 1.5, "1", True]


def classify_requests() -> Iterator[Recorded]:
    image = base64.b64encode(PNG).decode()
    bmp = image_bytes("BMP", "L", (50, 20))
    yield Recorded("classify BMP", "POST", f"{CLASSIFY}?top_k=2&model=tiny-cnn", bmp)
    yield from posts("classify JSON as a form", CLASSIFY, [{"images": [image]}])
    curl = {"content-type": "application/x-www-form-urlencoded"}
    yield Recorded("classify JSON from curl", "POST", CLASSIFY, f'\n {{"images": ["{image}"]}}'.encode(), curl)
    yield Recorded("classify explain", "POST", f"{CLASSIFY}?explain=true&top_k=1", PNG)
    for query in (
        "top_k=0", "top_k=1001", "top_k=x", "explain=maybe", "explain=1&explain=1", "size=3", "model=a&model=b",
        "model=tiny-none", "model=tiny-cnn@1", "model=tiny-cnn@7", "model=tiny-gan", "model=",
    ):  # fmt: skip
        yield Recorded(f"classify {query}", "POST", f"{CLASSIFY}?{query}", PNG)
    bodies = (
        {}, {"images": []}, {"images": "x"}, {"images": [1]}, {"images": ["%"]}, {"images": ["AAAA"]}, {"files": []},
        {"images": [image] * 4}, {"images": [image, "QUJD"]}, [], {"images": [image[:-8]]}, {"images": [image, image]},
    )  # fmt: skip
    yield from posts("classify JSON", CLASSIFY, bodies, {"content-type": "application/json"})
    for name, parts in {
        "two files": [("file", "a.png", PNG), ("file", "ü.png", PNG)],
        "damaged second file": [("file", "a.png", PNG), ("file", "b.png", b"no image")],
        "damaged file": [("file", "b.png", b"no image")],
        "empty file": [("file", "b.png", b"")],
        "wrong field": [("image", "a.png", PNG)],
        "text": [("file", None, b"hello")],
        "too many texts": [(f"{i}", None, b"x") for i in range(4)],
        "nothing": [],
        "too many files": [("file", "a.png", PNG)] * 5,
    }.items():
        yield Recorded(f"classify form {name}", "POST", CLASSIFY, *form(*parts))
    body, headers = form(("file", "a.bmp", bmp), ("file", "b.bmp", bmp))
    yield Recorded("classify explain form", "POST", f"{CLASSIFY}?explain=1", body, headers)
    large = image_bytes("PNG", "1", (250, 220))
    body, headers = form(("file", "a.png", large), ("file", "b.png", large))
    yield Recorded("classify explain too many pixels", "POST", f"{CLASSIFY}?explain=true", body, headers)
    body, headers = form(("file", "a.png", PNG))
    yield Recorded("classify form without its end", "POST", CLASSIFY, body[:-12], headers)
    yield from posts("classify form without boundary", CLASSIFY, [body], {"content-type": "multipart/form-data"})
    utf16 = {"content-type": "multipart/form-data; boundary=limit; charset=utf-16"}
    yield from posts("classify form in UTF-16", CLASSIFY, [body], utf16)
    many_pixels = image_bytes("PNG", "1", (400, 300))
    contents = (PNG, b"", b"hello", PNG[:100], b"x" * 200_001, many_pixels)
    yield from posts("classify", CLASSIFY, contents, {"content-type": "image/png"})
    yield Recorded("classify encoding", "POST", CLASSIFY, PNG, {"content-encoding": "gzip"})
    yield from deadlines(CLASSIFY, PNG)
    yield from methods(CLASSIFY)


def text_requests() -> Iterator[Recorded]:
    good = {"prompt": "abc", "max_characters": 8, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "prompt": [1, "x" * 201, "Aé1a", ""],
        "max_characters": [0, 101, None],
        "temperature": [-0.1, "1", None],
        "top_k": [0, 1.5],
        "top_p": [1.1, "x"],
        "stop": ["", "x" * 101, [""], ["a"] * 17, 7, ["a", 1], {}],
        "seed": SEEDS,
        "n": [0, 5],
        "stream": [1, None],
        "model": MODELS,
    }
    yield from wrong_fields(TEXT, good, wrong)
    stop = {**good, "stream": True, "n": 2, "stop": ["ab", "ji"], "max_characters": 40, "prompt": "é"}
    greedy = {"temperature": 0, "top_p": 0.9, "top_k": 3, "n": 2}
    yield from changed("text", TEXT, good, (stop, {**stop, "stream": False}, greedy))
    foreign = {"origin": "https://page.example", "host": "attacker.example:8000"}
    yield Recorded("text for a foreign host", "POST", TEXT, good, foreign)
    yield from posts("text number", TEXT, (b'{"temperature": Infinity}', b'{"seed": 123456789012345678901234567890}'))


def series_requests() -> Iterator[Recorded]:
    good = {"values": VALUES, "horizon": 3, "levels": [80, 95]}
    wrong: dict[str, list[Any]] = {
        "values": [
            [], None, ["1"], [None] * 20, [1e301] * 20, [VALUES, ["x"]], [VALUES] * 5, [0.5] * 301, [[]],
            [VALUES, 1.0], [VALUES, None], [True] * 20,
            [5e-324, 0.0] * 10, [None] * 19 + [1.0],
        ],
        "horizon": [0, 41, 1.5, None],
        "levels": [[0], ["80"], [80, 80], [50.5, 99.9], [10] * 11, 80],
        "level": [[80], [0]],
        "h": [3, 0],
        "seasonality": [0, 7, "7"],
        "integer": [1],
        "covariates": [{}, {"price": "x"}, [], {"price": ["x"]}, {"x" * 201: [1.0]}],
        "start": ["2024-01-01", 5, "x" * 101, [5]],
        "model": MODELS,
    }  # fmt: skip
    yield from wrong_fields(SERIES, good, wrong, ("values",))
    short = {"h": 2, "level": [50]}
    yield from posts("series", SERIES, ({"values": VALUES, **short}, {"values": VALUES, "level": [50, 50]}))
    changes: list[dict[str, Any]] = [
        {"seasonality": 169}, {"values": [1.0, 2.0]}, {"values": [VALUES, VALUES[:9]]}, {"start": "2024"},
    ]  # fmt: skip
    yield from changed("series of the forecaster", SERIES, {**good, "model": "tiny-forecaster"}, changes)
    prices = [2.0] * 23
    shop = {**good, "model": "tiny-shop", "covariates": {"price": prices}, "start": "2024-01-02"}
    changes = [
        {}, {"covariates": None}, {"covariates": {"price": [2.0] * 22}}, {"covariates": {"price": prices, "rain": [1.0]}},
        {"start": None}, {"start": "yesterday"}, {"start": "2019-01-01"}, {"start": ["2024-01-02", "2024-01-02"]},
        {"covariates": {"price": [prices]}}, {"covariates": {"price": [2.0] * 400}}, {"values": [VALUES, VALUES]},
        {"values": [VALUES, VALUES], "covariates": {"price": [prices, [3.0] * 23]}},
        {"values": [VALUES] * 2, "covariates": {"price": [prices] * 2}, "start": ["2024-01-02", "x"]},
    ]  # fmt: skip
    yield from changed("series with covariates", SERIES, shop, changes)


def sample_requests() -> Iterator[Recorded]:
    good = {"count": 2, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "count": [0, 9, 1.5, None],
        "label": ["x", 5, "x" * 201],
        "seed": SEEDS,
        "end_seed": [*SEEDS, 7],
        "model": [*MODELS, "tiny-gan@2"],
    }
    yield from wrong_fields(SAMPLE, good, wrong)
    labelled = {**good, "model": "tiny-cgan"}
    yield from changed("sample label", SAMPLE, labelled, ({"label": "y"}, {"label": "w"}))
    for accept in ("image/png", "image/png;q=0.1, application/json;q=0.2"):
        yield Recorded(f"sample accept {accept}", "POST", SAMPLE, {**labelled, "count": 5}, {"accept": accept})


def completion_requests() -> Iterator[Recorded]:
    good = {"model": "tiny-rnn", "prompt": "abc", "max_tokens": 6, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "prompt": [1, [], [[1], "b"], [99], [1.5], [[1], [99]], ["a"] * 5, "x" * 201, {}, [None]],
        "max_tokens": [-1, 0, 101],
        "temperature": [2.5, "1"],
        "top_p": [1.1, 0],
        "top_k": [0],
        "n": [5],
        "best_of": [2, 0],
        "echo": [1],
        "logprobs": [2, 6, "1"],
        "logit_bias": [{"1": 101}, {"x": 1}, {"99": 1}, {"01": 1}, {"1": "x"}, []],
        "presence_penalty": [3, "x"],
        "frequency_penalty": [-3],
        "stop": ["a", [""], 5],
        "seed": SEEDS,
        "stream": [1],
        "stream_options": [{"include_usage": True}, {"usage": 1}, 5],
        "suffix": ["x"],
        "user": ["me", 5],
        "model": [*MODELS, None],
        "messages": [[]],
    }
    yield from wrong_fields(COMPLETIONS, good, wrong)
    changes: tuple[dict[str, Any], ...] = (
        {"echo": True, "max_tokens": 0}, {"stream": True, "logprobs": 1, "echo": True}, {"n": 2, "best_of": 2},
        {"stream": True, "stream_options": {"include_usage": True}}, {"temperature": 0, "frequency_penalty": -2},
        {"prompt": "a" * 150, "echo": True, "logprobs": 1, "n": 2}, {"prompt": ["a"] * 3, "n": 2},
        {"presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {"3": 100}}, {"prompt": "", "echo": True, "logprobs": 5},
        {"temperature": 0.5, "top_p": 0.9}, {"prompt": ["abc", "de"], "n": 2}, {"prompt": [[2, 3, 4], [5, 6]], "n": 2},
        {"prompt": "abcé", "echo": True, "logprobs": 0, "max_tokens": 0, "stop": [*VOCABULARY[:-1]]},
    )  # fmt: skip
    yield from changed("completion", COMPLETIONS, good, changes)


def image_requests() -> Iterator[Recorded]:
    good = {"prompt": "digits", "n": 1, "model": "tiny-cgan", "seed": 1}
    wrong: dict[str, list[Any]] = {
        "prompt": [5, None, "y", "w", "x" * 1001],
        "n": [0, 9],
        "response_format": ["url", 5],
        "size": ["28x28", "1024x1024"],
        "output_format": ["jpeg"],
        "quality": ["hd"],
        "background": ["transparent"],
        "moderation": ["high"],
        "stream": [True],
        "seed": SEEDS,
        "user": ["me", 1],
        "model": [*MODELS, "tiny-gan"],
    }
    yield from wrong_fields(IMAGES, good, wrong, ("prompt",))


def timeseries_requests() -> Iterator[Recorded]:
    series = {"type": "univariate_time_series", "series": VALUES, "frequency": "hour"}
    good = {"model": "tiny-lstm", "inputs": [series], "options": {"horizon": 3, "quantiles": [0.1, 0.5]}}

    def inputs(name: str, good: dict[str, Any], changes: Iterable[dict[str, Any]]) -> Iterator[Recorded]:
        return changed(name, TIMESERIES, good, ({"inputs": [{**series, **change}]} for change in changes))

    wrong: dict[str, list[Any]] = {
        "inputs": [[], None, [5], [series] * 5, [series, {**series, "series": [1.0]}], [{"type": series["type"], "series": VALUES}]],
        "options": [{}, {"horizon": 0}, {"horizon": 41}, {"horizon": 3, "quantiles": [0]}, {"horizon": 3, "quantiles": [1e-13]}, {"horizon": 3, "x": 1},
                    {"horizon": 2, "quantiles": [0.9, 0.1, 0.5, 0.25]}, {"horizon": 3, "quantiles": [0.5] * 11},
                    {"horizon": 3, "quantiles": [1e-12, 0.5 - 1e-14, 0.5, 1 - 1e-12]}],
        "metadata": [5, None],
        "model": [*MODELS, "tiny-forecaster", "tiny-shop"],
    }  # fmt: skip
    yield from wrong_fields(TIMESERIES, good, wrong, ("inputs", "options"))
    changes: list[dict[str, Any]] = [
        {"type": "x"}, {"frequency": "fortnight"}, {"series": ["x"]}, {"series": []}, {"series": [0.5] * 301}, {"one": 1},
        {"name": "n", "start_timestamp": "2024-01-31T00:00:00Z", "frequency": "M"}, {"start_timestamp": "soon"},
    ]  # fmt: skip
    yield from inputs("time series", good, changes)
    changes = [
        {"frequency": "D", "start_timestamp": "2024-01-01"}, {"frequency": "day"}, {"frequency": "hour"},
        {"frequency": "D", "start_timestamp": "2019-01-01"},
    ]  # fmt: skip
    yield from inputs("time series of days", {**good, "model": "tiny-days"}, changes)
    starts = (
        ("2026-01-01T00:00:00+02:00", "H"), ("2026-01-31", "quarter"),
        ("2023-04-29", "M"), ("2024-02-29", "Y"),
    )  # fmt: skip
    yield from inputs(
        "time series from", good, ({"start_timestamp": begin, "frequency": each} for begin, each in starts)
    )
    yield from methods("/v1/timeseries/models")


def tensor(name: str, datatype: str, shape: list[int], data: Any = None, **parameters: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    return entry | ({} if data is None else {"data": data}) | ({"parameters": parameters} if parameters else {})


def infer(name: str, model: str, inputs: Any, **fields: Any) -> Recorded:
    return Recorded(f"infer {name}", "POST", f"/v2/models/{model}/infer", {"inputs": inputs, **fields})


VALUES_TENSOR = tensor("values", "FP64", [1, 20], VALUES)
LATENTS = tensor("latents", "FP32", [2, 4], [0.1, -0.2, 0.3, 0.4] * 2)
SEEDED = {"seed": 1, "max_characters": 3}


def infer_requests() -> Iterator[Recorded]:
    prompt = tensor("prompt", "BYTES", [2], ["abc", "é"])
    covariates = tensor("covariates", "FP32", [1, 22, 1], [1.0] * 22)
    for name, model, inputs, parameters in (
        ("values", "tiny-lstm", [VALUES_TENSOR], {"horizon": 3, "levels": "50,90.5"}),
        ("values in a row", "tiny-lstm", [{**VALUES_TENSOR, "data": [VALUES]}], {"horizon": 2, "levels": 50}),
        ("values without levels", "tiny-forecaster", [VALUES_TENSOR], {"horizon": 2, "levels": "", "integer": True}),
        ("prompt", "tiny-rnn", [prompt], {"seed": 1, "max_characters": 4}),
        ("labels", "tiny-cgan", [LATENTS, tensor("classes", "BYTES", [2, 1], ["x", "z"])], {}),
        (
            "covariates",
            "tiny-shop",
            [VALUES_TENSOR, covariates, tensor("start", "BYTES", [1], ["2024-01-02"])],
            {"horizon": 2},
        ),
    ):
        yield infer(name, model, inputs, parameters=parameters, id="mine")
        yield infer(f"{name} binary", model, inputs, parameters={**parameters, "binary_data_output": True})
    yield infer("one output", "tiny-rnn", [prompt], parameters=SEEDED, outputs=[{"name": "text"}])
    best = {"name": "log_probabilities", "parameters": {"classification": 2}}
    yield infer("classification", "tiny-rnn", [prompt], parameters={"seed": 1}, outputs=[best])
    yield infer("no classes", "tiny-rnn", [prompt], outputs=[{**best, "parameters": {"classification": 0}}])
    mean = ({"shared_memory_region": "a"}, {"binary_data": 1}, {"classification": 1}, {"x": []})
    for i, outputs in enumerate(
        ([{"name": "x"}], [{"name": "mean"}] * 2, 5, [{}], *([{"name": "mean", "parameters": each}] for each in mean))
    ):
        yield infer(f"outputs {i}", "tiny-lstm", [VALUES_TENSOR], outputs=outputs, parameters={"horizon": 2})
    for i, parameters in enumerate(
        ({"horizon": 0}, {"horizon": "3"}, {"levels": "x"}, {"levels": "80,80"}, {"levels": 0}, {"x": 1}, {"horizon": 41},
         {"timeout": -1}, {"timeout": "1"}, {"timeout": 1}, {"priority": 1}, {"seasonality": 7}, {"triton_x": 1},
         {"binary_data_output": 1}, {"horizon": [1]}, {"integer": 1}, {"seed": 1}, {"timeout": 10**400}, {"horizon": {}})
    ):  # fmt: skip
        yield infer(f"parameters {i}", "tiny-lstm", [VALUES_TENSOR], parameters=parameters)
    for i, parameters in enumerate(
        ({"max_characters": 0}, {"temperature": 11}, {"top_k": 0}, {"stop": ""}, {"seed": -1}, {"prompt": "x"}, {"n": 2})
    ):  # fmt: skip
        yield infer(f"text parameters {i}", "tiny-rnn", [prompt], parameters=parameters)
    inputs = ([], 5, [5], [{}], [VALUES_TENSOR, VALUES_TENSOR], [tensor("values", "FP64", [1, 20])])
    without_data = (
        {"binary_data_size": -1}, {"binary_data_size": 0}, {"binary_data_size": "8"}, {"shared_memory_region": "x"}
    )  # fmt: skip
    changes: tuple[dict[str, Any], ...] = (
        {"name": "x"}, {"datatype": "INT8", "shape": [1, 2], "data": [1, 2]}, {"shape": [20]}, {"shape": [1, 19]},
        {"data": "x"}, {"data": ["1"] * 20}, {"data": [[1], [2]]}, {"data": [[1.0] * 19, [1.0]]}, {"datatype": "FP16"},
        {"datatype": "XX"}, {"shape": [5, 20], "data": VALUES * 5}, {"shape": [0, 20], "data": []}, {"shape": [1, -1]},
        {"shape": [1, 301], "data": [1.0] * 301}, {"parameters": {"binary_data_size": 8}}, {"parameters": {"x": [1]}},
        {"datatype": "FP32", "data": [1e39] * 20}, {"data": [1e301] * 20}, {"shape": [1, 2], "data": [1, 2]},
        {"shape": [1] * 9, "data": [1]}, {"data": [None] * 20}, {"data": [math.inf] * 20}, {"data": [[VALUES]]},
        {"parameters": None, "x": 1}, {"shape": [1, 20, 1]},
    )  # fmt: skip
    for i, each in enumerate(
        (*inputs, *([tensor("values", "FP64", [1, 20], **parameters)] for parameters in without_data),
         *([{**VALUES_TENSOR, **change}] for change in changes))
    ):  # fmt: skip
        yield infer(f"inputs {i}", "tiny-lstm", each)
    classes: tuple[tuple[str, list[int], list[Any]], ...] = (
        ("INT64", [2], [0, 3]), ("INT64", [3], [0, 1, 2]), ("BYTES", [2], ["x", "w"]), ("INT8", [2], [0, 128]),
        ("INT64", [2], [0, 1.5]), ("INT64", [2], [0, None]),
    )  # fmt: skip
    for i, (model, tensors) in enumerate(
        (
            *(("tiny-cgan", [LATENTS, tensor("classes", *each)]) for each in classes),
            ("tiny-cgan", [LATENTS]),
            ("tiny-gan", [tensor("latents", "FP64", [1, 4], [1e4, 0, 0, 0])]),
            ("tiny-gan", [tensor("latents", "FP64", [9, 4], [0] * 36)]),
            ("tiny-cnn", [tensor("image", "FP32", [1, 3, 32, 32], [256] * 3072)]),
            ("tiny-cnn", [tensor("image", "UINT8", [1, 3, 32, 32], [256] * 3072)]),
            ("tiny-rnn", [tensor("prompt", "BYTES", [5], ["a"] * 5)]),
            ("tiny-rnn", [tensor("prompt", "BYTES", [1], ["x" * 201])]),
            ("tiny-rnn", [tensor("prompt", "BYTES", [1], [5])]),
            ("tiny-shop", [VALUES_TENSOR, covariates]),
            ("tiny-gan@1", [LATENTS]),
            ("tiny-pets", [LATENTS]),
        )
    ):
        yield infer(f"model {i}", model, tensors)
    for model in ("tiny-none", "tiny-lstm@2", "tiny-lstm/versions/1", "tiny-lstm/versions/x", "tiny-lstm/versions/2"):
        yield infer(model, model, [VALUES_TENSOR])
    yield from binary_requests()
    path = "/v2/models/tiny-lstm/infer"
    body = json.dumps({"inputs": [VALUES_TENSOR], "parameters": {"horizon": 2}}).encode()
    for name, content, coding in (
        ("not gzip", body, "gzip"), ("truncated", gzip.compress(body)[:-9], "gzip"), ("br", body, "br"),
        ("too large", gzip.compress(b" " * 300_000), "gzip"), ("deflate", zlib.compress(body), "deflate"),
        ("data after", gzip.compress(body) + b"x", "GZIP"),
    ):  # fmt: skip
        yield Recorded(f"infer {name}", "POST", path, content, {"content-encoding": coding})
    yield from posts("infer body", path, (b"null", b"", b"{", b" " * 200_001))
    yield from deadlines(path, {"inputs": [VALUES_TENSOR]})
    yield from methods(path)


def binary_requests() -> Iterator[Recorded]:
    """Yield requests whose body has JSON of the length in a header and then tensors, or only a tensor."""
    length = "inference-header-content-length"
    path, row = "/v2/models/tiny-lstm/infer", struct.pack("<20d", *VALUES)
    head = json.dumps({"inputs": [tensor("values", "FP64", [1, 20], binary_data_size=160)]}).encode()
    contents = (head + row, head + row[:-1], head + row + b"1")
    yield from posts("infer binary", path, contents, {length: str(len(head))})
    for i, value in enumerate(("x", "99999", "000000000001", "²".encode())):
        yield Recorded(f"infer header {i}", "POST", path, head, {length: value})
    for model, content in (
        ("lstm", row), ("lstm", row[:-1]), ("rnn", b"abc\xff"), ("cgan", row), ("cnn", bytes(3072)), ("shop", row)
    ):  # fmt: skip
        name = f"infer raw {model} {len(content)}"
        yield Recorded(name, "POST", f"/v2/models/tiny-{model}/infer", content, {length: "0"})
    text = struct.pack("<I", 3) + b"abc"
    for i, content in enumerate((text, text[:-1], text * 2, text[:3], b"\xff\xff\xff\xff\0\0\0", b"")):
        sized = {"inputs": [tensor("prompt", "BYTES", [1], binary_data_size=len(content))], "parameters": SEEDED}
        head = json.dumps(sized).encode()
        header = {length: str(len(head))}
        yield Recorded(f"infer strings {i}", "POST", "/v2/models/tiny-rnn/infer", head + content, header)


def generate_requests() -> Iterator[Recorded]:
    good = {"text_input": "abc", "parameters": {"seed": 1, "max_tokens": 5}}
    path = "/v2/models/tiny-rnn/generate"
    flat = {"text_input": "abc", "seed": 1, "max_characters": 4, "stop": ["a", "b"]}
    yield from posts("generate stream", "/v2/models/tiny-rnn/versions/1/generate_stream", (good, flat))
    wrong = (
        {"id": "mine"}, {"id": 5}, {"id": "x" * 1001}, {"parameters": 5}, {"seed": 2}, {"stream": True}, {"stream": 5},
        {"max_characters": 5}, {"x": 1}, {"parameters": {"seed": "x"}}, {"parameters": None, "seed": 1},
    )  # fmt: skip
    yield from changed("generate", path, good, wrong)
    wrong = (
        {"text_input": 5}, {"text_input": "x" * 201}, {"text_input": " " * 200_001}, {"max_tokens": 0}, {"max_tokens": 101},
        {"max_tokens": None}, {"top_p": 2}, {"timeout": -1}, {"timeout": 1}, {"priority": 2}, {"stop": 5}, {"n": 2},
    )  # fmt: skip
    yield from changed("generate field", path, {"text_input": "a"}, wrong)
    yield from posts("generate body", path, ({}, [], flat))
    for model in ("tiny-none", "tiny-gan", "tiny-rnn@2", "tiny-rnn/versions/x", "tiny-pets"):
        yield Recorded(f"generate {model}", "POST", f"/v2/models/{model}/generate", good)
    yield from methods(path)


def gets(*paths: str, headers: dict[str, str] | None = None) -> Iterator[Recorded]:
    for path in paths:
        yield Recorded(f"GET {path}{' with headers' if headers else ''}", "GET", path, headers=headers or {})


def description_requests() -> Iterator[Recorded]:
    """Yield requests for descriptions of the service and its models, and for pages."""
    yield from gets(
        "/health/live", "/health/ready", "/v1/models", "/v1/models/tiny-cnn", "/v1/models/tiny-gan@2", "/v1/models/tiny-none",
        "/v1/models/tiny-gan@1", "/v1/models/tiny-gan@9", "/v1/models/tiny-pets", "/v1/models/tiny-cnn/pictures/a.png",
        "/v1/models/tiny-none/pictures/a.png", "/v1/models/../pictures/a.png", "/v1/models/", "/v1", "/v2", "/v2/",
        "/v2/nothing", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/stats", "/web/none.js",
        "/nothing?x=%ff", "/v1/models/tiny-gan/versions/2", "/v1/Images/classify", "//v1/models", "/v1/models/%2e%2e", "/",
        "/web/app.js", "/docs", "/openapi.json", "/redoc", "/v1/models?versoin=1", "/v2/models/tiny-gan/config?versoin=1",
        "/v1/models/tiny-cnn/pictures/..%2fcard.json", "/metrics",
    )  # fmt: skip
    for path in ("/v1/models", "/v2/models/tiny-cnn", "/nothing", "/v1/chat/completions", "/", "/v2", "/openapi.json"):
        yield Recorded(f"HEAD {path}", "HEAD", path)
        yield Recorded(f"DELETE {path}", "DELETE", path)
        yield Recorded(f"POST {path}", "POST", path, {})
    for model in (
        "tiny-cnn", "tiny-rnn", "tiny-lstm", "tiny-forecaster", "tiny-gan", "tiny-cgan", "tiny-shop", "tiny-gan@3", "tiny-gan@1",
        "tiny-none", "tiny-pets", "tiny-gan/versions/4", "tiny-gan/versions/x", "tiny-gan/versions/9",
    ):  # fmt: skip
        yield from gets(*(f"/v2/models/{model}{part}" for part in ("", "/config", "/ready")))
    yield from gets(*(f"/v2/models/{model}/stats" for model in ("tiny-none", "tiny-pets", "tiny-gan@1")))
    yield from gets("/", headers={"if-none-match": "*"})


def repository_requests() -> Iterator[Recorded]:
    index = "/v2/repository/index"
    yield from posts("index", index, (b"", {"ready": True}, {"ready": 1}, [], b"{"))
    load, unload = (f"/v2/repository/models/{{}}/{verb}" for verb in ("load", "unload"))
    for headers in ({"authorization": "Bearer x"}, {"authorization": "Basic x"}):
        yield Recorded(f"repository {headers}", "POST", unload.format("tiny-pets"), {}, headers)
    for path, parameters in (
        (load.format("tiny-gan"), {"config": "{}"}), (load.format("tiny-gan"), 5),
        (load.format("tiny-gan"), {"unload_dependents": True}),
    ):  # fmt: skip
        yield Recorded(f"repository {path} {parameters}", "POST", path, {"parameters": parameters}, ADMIN_HEADERS)
    for path in (
        load.format("tiny-none"), load.format("tiny-gan@9"), unload.format("tiny-gan"), unload.format("tiny-cgan@1"),
        unload.format("tiny-cgan"), unload.format("tiny-none"), load.format("tiny-cgan"),
    ):  # fmt: skip
        yield Recorded(f"repository {path}", "POST", path, {}, ADMIN_HEADERS)
    yield from posts("load a version", load.format("tiny-gan@2"), [b""], ADMIN_HEADERS)
    yield from posts("unload", unload.format("tiny-cgan"), [b"{"], ADMIN_HEADERS)
    yield from methods(index)
    yield from methods(load.format("tiny-gan"))


def admin_requests() -> Iterator[Recorded]:
    admin, gan = "/v1/admin", "/v1/admin/models/tiny-gan"
    for path in ("/models", "/models/tiny-gan", "/models/tiny-none", "/verify"):
        yield from gets(admin + path, headers=ADMIN_HEADERS)
    bodies = (
        {"version": 2}, {"version": 3, "share": 25}, {"version": "latest"}, {"version": 0}, {"version": 9}, {}, {"version": 1},
        {"version": "2"}, {"version": 2, "share": 0}, {"version": 2, "share": 101}, {"version": True}, {"x": 1}, b"{",
        {"version": 2, "share": "x"},
    )  # fmt: skip
    yield from posts("activate", f"{gan}/activate", bodies, ADMIN_HEADERS)
    yield from posts("activate unknown", f"{admin}/models/tiny-none/activate", [{"version": 1}], ADMIN_HEADERS)
    yield from posts("activate with query", f"{gan}/activate?x=1", [{"version": 2}], ADMIN_HEADERS)
    yield from posts("roll back", f"{gan}/rollback", ({"version": 1}, {}), ADMIN_HEADERS)
    for model in ("tiny-none", "tiny-cnn"):
        yield from posts(f"roll back {model}", f"{admin}/models/{model}/rollback", [None], ADMIN_HEADERS)
    bodies = (
        {"version": 2}, {"version": 2, "undo": True}, {"version": 0}, {"version": 9}, {}, {"version": 1, "undo": 1},
        {"version": "1"}, {"x": " " * 2**14},
    )  # fmt: skip
    yield from posts("retire", f"{gan}/retire", bodies, ADMIN_HEADERS)
    yield from posts("retire the active", f"{admin}/models/tiny-cnn/retire", [{"version": 1}], ADMIN_HEADERS)
    yield from posts("import", f"{admin}/import", (b"no archive", b""), ADMIN_HEADERS)
    yield from posts("import with query", f"{admin}/import?renumber=x", [b""], ADMIN_HEADERS)
    for query in ("", "?name=../x", "?name=a&task=b", "?name=a&size=x", "?x=1", "?name=a&title=%00"):
        yield from posts(f"add{query}", f"{admin}/add{query}", [b"no network"], ADMIN_HEADERS)
    for query in ("", "?version=9", "?version=x", "?version=0", "?x=1"):
        yield from gets(f"{admin}/models/tiny-cnn/export{query}", headers=ADMIN_HEADERS)
    yield from gets(f"{gan}/export?version=2", f"{admin}/models/tiny-none/export", headers=ADMIN_HEADERS)
    for path in ("models", "import", "add", "verify", "models/tiny-cnn/activate", "models/tiny-cnn/rollback"):
        yield from methods(f"{admin}/{path}")


def all_requests() -> list[Recorded]:
    """Return all requests in the order in which they are sent. Later ones may change the store."""
    return [
        *classify_requests(), *text_requests(), *series_requests(), *sample_requests(), *completion_requests(),
        *image_requests(), *timeseries_requests(), *infer_requests(), *generate_requests(), *description_requests(),
        *repository_requests(), *admin_requests(),
    ]  # fmt: skip


def protected_requests(key: str) -> Iterator[Recorded]:
    """Yield requests to a service with API keys, CORS, trusted host names and no admin key."""
    bearer, origin, other = {"authorization": f"Bearer {key}"}, "https://page.example", "https://other.example"
    for name, headers in {
        "none": {},
        "case": {"authorization": f"bearer  {key}"},
        "no key": {"authorization": "Bearer"},
        "short": {"x-api-key": key[:-1]},
        "upper": {"x-api-key": key.upper()},
        "long": {"x-api-key": "x" * 10_000},
        "é": {"x-api-key": "é".encode()},
        "hash": {"x-api-key": key_file.digest(key).hex()},
        "other scheme": {"authorization": f"Basic {key}"},
        "header": {"x-api-key": key},
        "cors": {**bearer, "origin": origin},
        "cors other": {**bearer, "origin": other},
        "cors error": {"origin": origin},
    }.items():
        yield Recorded(f"keys {name}", "POST", SAMPLE, {"count": 1, "seed": 1}, headers)
    yield from gets("/v2/models", "/v2/health/ready", "/openapi.json", "/metrics", "/nothing", "/v1/admin/models")
    yield from gets("/v2/models/tiny-gan", headers=bearer)
    yield Recorded("HEAD /", "HEAD", "/")
    yield Recorded("keys load", "POST", "/v2/repository/models/tiny-pets/load", {}, bearer)
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    sent = "content-type, x-stainless-lang, x-stainless-os, inference-header-content-length"
    for name, headers in {
        "preflight": {"origin": origin},
        "headers": {"origin": origin, "access-control-request-headers": sent},
        "other": {"origin": other},
    }.items():
        yield Recorded(f"cors {name}", "OPTIONS", SAMPLE, headers={**preflight, **headers})
    yield Recorded("host trusted", "GET", "/health/live", headers={"host": "www.example.org"})
    yield from gets("/health/live", "/v2", headers={"host": "attacker.example"})
