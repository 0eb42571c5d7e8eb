# ruff: noqa: E501 - the lists of wrong values are easier to read in long lines
"""The requests whose answers are recorded, and the store that they use."""

from __future__ import annotations

import base64
import gzip
import json
import math
import struct
import zlib
from collections.abc import Iterator
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


def wrong_fields(
    path: str, good: dict[str, Any], wrong: dict[str, list[Any]], required: tuple[str, ...] = ()
) -> Iterator[Recorded]:
    """Yield requests in each of which one field is wrong or missing, or the whole body is."""
    for name, values in wrong.items():
        for i, value in enumerate(values):
            yield Recorded(f"{path} {name} {i}", "POST", path, {**good, name: value})
    for name in required:
        yield Recorded(f"{path} no {name}", "POST", path, {key: good[key] for key in good if key != name})
    yield Recorded(f"{path} good", "POST", path, good)
    yield Recorded(f"{path} unknown field", "POST", path, {**good, "nonsense": 1})
    yield Recorded(f"{path} null", "POST", path, b"null")
    yield Recorded(f"{path} list", "POST", path, [good])
    yield Recorded(f"{path} not JSON", "POST", path, b'{"model": ')
    if required:  # otherwise the answer would have a random seed
        yield Recorded(f"{path} empty", "POST", path, b"")
    first = next(iter(good))
    twice = json.dumps(good)[:-1] + f", {json.dumps(first)}: 1}}"
    yield Recorded(f"{path} field twice", "POST", path, twice.encode())
    yield Recorded(f"{path} too many commas", "POST", path, b'{"x": [' + b"1," * 5000 + b"1]}")
    yield Recorded(f"{path} too many fields", "POST", path, b'{"x": [' + b'{"a":1} ' * 2500 + b"]}")
    yield Recorded(f"{path} too large", "POST", path, {**good, "x": " " * 200_001})
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
    yield Recorded("classify raw", "POST", CLASSIFY, PNG, {"content-type": "image/png"})
    yield Recorded("classify raw without type", "POST", CLASSIFY, PNG)
    jpeg = image_bytes("BMP", "L", (50, 20))
    yield Recorded("classify BMP", "POST", f"{CLASSIFY}?top_k=2&model=tiny-cnn", jpeg)
    yield Recorded("classify JSON", "POST", CLASSIFY, {"images": [image, image]}, {"content-type": "application/json"})
    yield Recorded("classify JSON as a form", "POST", CLASSIFY, {"images": [image]})
    curl = {"content-type": "application/x-www-form-urlencoded"}
    yield Recorded("classify JSON from curl", "POST", CLASSIFY, f'\n {{"images": ["{image}"]}}'.encode(), curl)
    yield Recorded("classify explain", "POST", f"{CLASSIFY}?explain=true&top_k=1", PNG)
    for i, query in enumerate(
        (
            "top_k=0",
            "top_k=1001",
            "top_k=x",
            "top_k=",
            "explain=maybe",
            "explain=1&explain=1",
            "size=3",
            "model=a&model=b",
        )
    ):
        yield Recorded(f"classify query {i}", "POST", f"{CLASSIFY}?{query}", PNG)
    for i, model in enumerate(("tiny-none", "tiny-cnn@1", "tiny-cnn@7", "tiny-gan", "", "x" * 300)):
        yield Recorded(f"classify model {i}", "POST", f"{CLASSIFY}?model={model}", PNG)
    for i, body in enumerate(
        ({}, {"images": []}, {"images": "x"}, {"images": [1]}, {"images": ["%"]}, {"images": ["AAAA"]}, {"files": []},
         {"images": [image] * 4}, {"images": [image, "QUJD"]}, [], {"images": [image[:-8]]})
    ):  # fmt: skip
        kind = {"content-type": "application/json"}
        yield Recorded(f"classify JSON {i}", "POST", CLASSIFY, body, kind)
    for name, parts in {
        "one file": [("file", "a.png", PNG)],
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
        body, headers = form(*parts)
        yield Recorded(f"classify form {name}", "POST", CLASSIFY, body, headers)
    body, headers = form(("file", "a.bmp", jpeg), ("file", "b.bmp", jpeg))
    yield Recorded("classify explain form", "POST", f"{CLASSIFY}?explain=1", body, headers)
    body, headers = form(("file", "a.png", PNG))
    yield Recorded("classify form without its end", "POST", CLASSIFY, body[:-12], headers)
    no_boundary = {"content-type": "multipart/form-data"}
    yield Recorded("classify form without boundary", "POST", CLASSIFY, body, no_boundary)
    utf16 = {"content-type": "multipart/form-data; boundary=limit; charset=utf-16"}
    yield Recorded("classify form in UTF-16", "POST", CLASSIFY, body, utf16)
    for name, content in {
        "empty": b"", "text": b"hello", "truncated": PNG[:100], "too large": b"x" * 200_001,
        "too many pixels": image_bytes("PNG", "1", (400, 300)),
    }.items():  # fmt: skip
        yield Recorded(f"classify {name}", "POST", CLASSIFY, content, {"content-type": "image/png"})
    yield Recorded("classify encoding", "POST", CLASSIFY, PNG, {"content-encoding": "gzip"})
    large = image_bytes("PNG", "1", (250, 220))
    body, headers = form(("file", "a.png", large), ("file", "b.png", large))
    yield Recorded("classify explain too many pixels", "POST", f"{CLASSIFY}?explain=true", body, headers)
    yield from deadlines(CLASSIFY, PNG)
    yield from methods(CLASSIFY)


def text_requests() -> Iterator[Recorded]:
    good = {"prompt": "abc", "max_characters": 8, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "prompt": [1, None, "x" * 201, ["a"], "Aé1a", ""],
        "max_characters": [0, 101, "5", 1.5, None],
        "temperature": [-0.1, 11, "1", None, 0, 1e-9],
        "top_k": [0, 1, "1", 1.5, None, 99],
        "top_p": [0, 1.1, 0.5, "x", None],
        "stop": ["", "x" * 101, [""], ["a"] * 17, 7, ["a", 1], ["b", "c"], None, {}],
        "seed": SEEDS,
        "n": [0, 5, "2", 2, None],
        "stream": [1, "yes", None, True],
        "model": [*MODELS, None, "tiny-rnn", "tiny-rnn@1"],
        "one": [1],
        "many": [1],
    }
    yield from wrong_fields(TEXT, good, wrong)
    stop = {**good, "stream": True, "n": 2, "stop": ["ab", "ji"], "max_characters": 40, "prompt": "é"}
    yield Recorded("text stream with stop strings", "POST", TEXT, stop)
    yield Recorded("text with stop strings", "POST", TEXT, {**stop, "stream": False})
    foreign = {"origin": "https://page.example", "host": "attacker.example:8000"}
    yield Recorded("text for a foreign page", "POST", TEXT, good, {"origin": foreign["origin"]})
    yield Recorded("text for a foreign host", "POST", TEXT, good, foreign)
    yield Recorded("text greedy", "POST", TEXT, {**good, "temperature": 0, "top_p": 0.9, "top_k": 3, "n": 2})
    yield Recorded("text infinity", "POST", TEXT, b'{"temperature": Infinity}')
    yield Recorded("text large number", "POST", TEXT, b'{"seed": 123456789012345678901234567890}')
    yield Recorded("text colon and commas", "POST", TEXT, {**good, "prompt": 'a:b, "c":, \\"d\\": \\'})


def series_requests() -> Iterator[Recorded]:
    good = {"values": VALUES, "horizon": 3, "levels": [80, 95]}
    wrong: dict[str, list[Any]] = {
        "values": [
            [], None, "1", 1, [1.0], ["1"], [None] * 20, [1e301] * 20, [VALUES, ["x"]], [VALUES, VALUES],
            [VALUES] * 5, [0.5] * 301, [[]], [VALUES, 1.0], [VALUES, None], [*VALUES[:-2], None, None], [True] * 20,
            [5.0] * 20, [1e300, -1e300] * 10, [5e-324, 0.0] * 10, [None] * 19 + [1.0],
        ],
        "horizon": [0, 41, "3", 1.5, None],
        "levels": [[], [0], [100], ["80"], [80, 80], [50.5, 99.9], [10] * 11, 80, None],
        "level": [[80], [0], None, [90]],
        "h": [3, 0, 41],
        "seasonality": [0, 7, 169, "7", None],
        "integer": [True, 1, "yes"],
        "covariates": [{}, {"price": [1.0] * 23}, {"price": "x"}, [], {"price": ["x"]}, None, {"x" * 201: [1.0]}],
        "start": ["2024-01-01", 5, ["2024-01-01"], "x" * 101, [5], None],
        "model": [*MODELS, "tiny-forecaster", "tiny-shop", "tiny-lstm@1"],
        "one": [1],
    }  # fmt: skip
    yield from wrong_fields(SERIES, good, wrong, ("values",))
    yield Recorded("series with Nixtla's names", "POST", SERIES, {"values": VALUES, "h": 2, "level": [50]})
    yield Recorded("series with repeated level", "POST", SERIES, {"values": VALUES, "level": [50, 50]})
    general = {**good, "model": "tiny-forecaster"}
    for i, changes in enumerate(
        ({"seasonality": 169}, {"seasonality": 7}, {"values": [1.0, 2.0]}, {"values": [VALUES, VALUES[:9]]},
         {"integer": True}, {"values": [*VALUES, None]}, {"values": [None] * 5}, {"levels": [99.99]}, {"start": "2024"})
    ):  # fmt: skip
        yield Recorded(f"series of the forecaster {i}", "POST", SERIES, {**general, **changes})
    shop = {**good, "model": "tiny-shop", "covariates": {"price": [2.0] * 23}, "start": "2024-01-02"}
    for i, changes in enumerate(
        ({}, {"covariates": None}, {"covariates": {"price": [2.0] * 22}}, {"covariates": {"rain": [1.0]}},
         {"covariates": {"price": [2.0] * 23, "rain": [1.0]}}, {"start": None}, {"start": "yesterday"},
         {"start": "2019-01-01"}, {"start": ["2024-01-02", "2024-01-02"]}, {"covariates": {"price": [[2.0] * 23]}},
         {"covariates": {"price": [2.0] * 400}}, {"values": [VALUES, VALUES]},
         {"values": [VALUES, VALUES], "covariates": {"price": [[2.0] * 23, [3.0] * 23]}},
         {"values": [VALUES] * 2, "covariates": {"price": [[2.0] * 23] * 2}, "start": ["2024-01-02", "x"]})
    ):  # fmt: skip
        yield Recorded(f"series with covariates {i}", "POST", SERIES, {**shop, **changes})


def sample_requests() -> Iterator[Recorded]:
    good = {"count": 2, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "count": [0, 9, "2", 1.5, None],
        "label": ["x", 5, "x" * 201, None],
        "seed": SEEDS,
        "end_seed": [*SEEDS, 7],
        "model": [*MODELS, "tiny-cgan", "tiny-gan@2", "tiny-gan@4"],
    }
    yield from wrong_fields(SAMPLE, good, wrong)
    labelled = {**good, "model": "tiny-cgan"}
    for label in ("y", "w", None):
        yield Recorded(f"sample label {label}", "POST", SAMPLE, {**labelled, "label": label})
    for accept in ("image/png", "image/*", "text/html", "image/png;q=0.1, application/json;q=0.2"):
        yield Recorded(f"sample accept {accept}", "POST", SAMPLE, {**labelled, "count": 5}, {"accept": accept})


def completion_requests() -> Iterator[Recorded]:
    good = {"model": "tiny-rnn", "prompt": "abc", "max_tokens": 6, "seed": 1}
    wrong: dict[str, list[Any]] = {
        "prompt": [
            1,
            None,
            "",
            [],
            [1, 2],
            [[1], "b"],
            [99],
            [-1],
            [1.5],
            [[1], [99]],
            ["a"] * 5,
            "x" * 201,
            {},
            [None],
        ],
        "max_tokens": [-1, 0, 101, "5", None],
        "temperature": [-1, 2.5, "1", None, 0],
        "top_p": [-0.1, 1.1, 0, None],
        "top_k": [0, 2, None],
        "n": [0, 5, 2, None],
        "best_of": [1, 2, 0, None],
        "echo": [True, 1],
        "logprobs": [0, 2, 6, -1, "1"],
        "logit_bias": [{"1": 5}, {"1": 101}, {"x": 1}, {"99": 1}, {"01": 1}, {"1": "x"}, []],
        "presence_penalty": [1, 3, "x"],
        "frequency_penalty": [-2, -3],
        "stop": ["", "a", ["a", "b"], [""], 5, [], None],
        "seed": SEEDS,
        "stream": [True, 1],
        "stream_options": [{}, {"include_usage": True}, {"usage": 1}, 5],
        "suffix": ["", "x", 5],
        "user": ["me", 5],
        "model": [*MODELS, None],
        "messages": [[]],
        "one": [1],
    }
    yield from wrong_fields(COMPLETIONS, good, wrong)
    for i, changes in enumerate(
        ({"echo": True, "logprobs": 1}, {"echo": True, "max_tokens": 0}, {"echo": True, "max_tokens": 0, "logprobs": 0},
         {"stream": True, "logprobs": 1, "echo": True}, {"stream": True, "stream_options": {"include_usage": True}},
         {"n": 2, "best_of": 2}, {"prompt": ["a", "b"], "n": 2}, {"prompt": "a" * 150, "echo": True, "logprobs": 1, "n": 2},
         {"presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {"3": 100}}, {"prompt": ["a"] * 3, "n": 2},
         {"stream": True, "n": 2, "stop": "a"}, {"prompt": ["a" * 150, "b" * 150]}, {"temperature": 0.5, "top_p": 0.9},
         {"prompt": ["abc", "de"], "n": 2}, {"prompt": [[2, 3, 4], [5, 6]], "n": 2}, {"logit_bias": {"3": -100}, "n": 4},
         {"prompt": "abcé", "echo": True, "logprobs": 0, "max_tokens": 0, "stop": [*VOCABULARY[:-1]]},
         {"prompt": "", "echo": True, "logprobs": 5}, {"temperature": 0, "presence_penalty": 2},
         {"temperature": 0, "frequency_penalty": -2})
    ):  # fmt: skip
        yield Recorded(f"completion {i}", "POST", COMPLETIONS, {**good, **changes})


def image_requests() -> Iterator[Recorded]:
    good = {"prompt": "digits", "n": 1, "model": "tiny-cgan", "seed": 1}
    wrong: dict[str, list[Any]] = {
        "prompt": [5, None, "x", "y", "w", "x" * 1001],
        "n": [0, 9, "1", 2, None],
        "response_format": ["url", "b64_json", 5, None],
        "size": ["auto", "28x28", "1024x1024", 5],
        "output_format": ["png", "jpeg"],
        "quality": ["auto", "hd"],
        "background": ["transparent", "opaque"],
        "moderation": ["low", "high"],
        "stream": [False, True],
        "seed": SEEDS,
        "user": ["me", 1],
        "safety_identifier": ["me"],
        "model": [*MODELS, "tiny-gan", None],
    }
    yield from wrong_fields(IMAGES, good, wrong, ("prompt",))


def timeseries_requests() -> Iterator[Recorded]:
    path, good_input = TIMESERIES, {"type": "univariate_time_series", "series": VALUES, "frequency": "hour"}
    good = {"model": "tiny-lstm", "inputs": [good_input], "options": {"horizon": 3, "quantiles": [0.1, 0.5]}}
    wrong: dict[str, list[Any]] = {
        "inputs": [[], None, 5, [5], [good_input] * 5, [good_input] * 2, [{**good_input, "type": "x"}],
                   [{**good_input, "frequency": "fortnight"}], [{**good_input, "series": ["x"]}],
                   [{**good_input, "series": []}], [{**good_input, "series": [0.5] * 301}], [{**good_input, "one": 1}],
                   [{**good_input, "name": "n", "start_timestamp": "2024-01-31T00:00:00Z", "frequency": "M"}],
                   [{**good_input, "start_timestamp": "soon"}], [good_input, {**good_input, "series": [1.0]}],
                   [{key: good_input[key] for key in ("type", "series")}]],
        "options": [{}, None, {"horizon": 0}, {"horizon": 41}, {"horizon": 3, "quantiles": [0]},
                    {"horizon": 3, "quantiles": [1e-13]}, {"horizon": 3, "quantiles": None},
                    {"horizon": 3, "quantiles": [1e-12, 0.5 - 1e-14, 0.5, 1 - 1e-12]}, {"horizon": 3, "x": 1}, {"horizon": 3}, {"horizon": "3"},
                    {"horizon": 2, "quantiles": [0.9, 0.1, 0.5, 0.25]}, {"horizon": 3, "quantiles": [0.5] * 11}],
        "metadata": [{"a": 1}, 5, None],
        "model": [*MODELS, "tiny-forecaster", "tiny-shop", "tiny-days"],
    }  # fmt: skip
    yield from wrong_fields(path, good, wrong, ("inputs", "options"))
    days = {**good, "model": "tiny-days"}
    for i, changes in enumerate(
        ({"frequency": "D", "start_timestamp": "2024-01-01"}, {"frequency": "day"}, {"frequency": "hour"},
         {"frequency": "D", "start_timestamp": "soon"}, {"frequency": "D", "start_timestamp": "2019-01-01"})
    ):  # fmt: skip
        yield Recorded(f"time series of days {i}", "POST", path, {**days, "inputs": [{**good_input, **changes}]})
    for i, (begin, frequency) in enumerate(
        (("2026-01-01", "day"), ("2026-01-01T00:00:00+02:00", "H"), ("2026-01-01T00:00:00Z", "week"),
         ("2024-06-30", "M"), ("2026-01-31", "quarter"), ("2023-04-30", "M"), ("2023-04-29", "M"), ("2024-02-29", "Y"),
         (None, "D"))
    ):  # fmt: skip
        start = {**good_input, "start_timestamp": begin, "frequency": frequency}
        yield Recorded(f"time series from {i}", "POST", path, {**good, "inputs": [start]})
    yield Recorded("time series models", "GET", "/v1/timeseries/models")
    yield from methods("/v1/timeseries/models")


def tensor(name: str, datatype: str, shape: list[int], data: Any = None, **parameters: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    return entry | ({} if data is None else {"data": data}) | ({"parameters": parameters} if parameters else {})


def infer(name: str, model: str, inputs: Any, headers: dict[str, str] | None = None, **fields: Any) -> Recorded:
    return Recorded(f"infer {name}", "POST", f"/v2/models/{model}/infer", {"inputs": inputs, **fields}, headers or {})


def infer_requests() -> Iterator[Recorded]:
    values = tensor("values", "FP64", [1, 20], VALUES)
    prompt = tensor("prompt", "BYTES", [2], ["abc", "é"])
    latents = tensor("latents", "FP32", [2, 4], [0.1, -0.2, 0.3, 0.4] * 2)
    classes = tensor("classes", "INT64", [2], [0, 2])
    for name, model, inputs, parameters in (
        ("values", "tiny-lstm", [values], {"horizon": 3, "levels": "50,90.5"}),
        ("values in a row", "tiny-lstm", [tensor("values", "FP64", [1, 20], [VALUES])], {"horizon": 2, "levels": 50}),
        ("values without levels", "tiny-forecaster", [values], {"horizon": 2, "levels": "", "integer": True}),
        ("prompt", "tiny-rnn", [prompt], {"seed": 1, "max_characters": 4}),
        ("latents", "tiny-gan", [latents], {}),
        ("latents and classes", "tiny-cgan", [latents, classes], {}),
        ("labels", "tiny-cgan", [latents, tensor("classes", "BYTES", [2, 1], ["x", "z"])], {}),
        ("covariates", "tiny-shop", [values, tensor("covariates", "FP32", [1, 22, 1], [1.0] * 22),
                                     tensor("start", "BYTES", [1], ["2024-01-02"])], {"horizon": 2}),
        ("image", "tiny-cnn", [tensor("image", "UINT8", [1, 3, 32, 32], [7] * 3072)], {}),
    ):  # fmt: skip
        yield infer(name, model, inputs, parameters=parameters, id="mine")
        yield infer(f"{name} binary", model, inputs, parameters={**parameters, "binary_data_output": True})
    seeded = {"seed": 1, "max_characters": 3}
    yield infer("one output", "tiny-rnn", [prompt], parameters=seeded, outputs=[{"name": "text"}])
    classification = {"name": "log_probabilities", "parameters": {"classification": 2}}
    yield infer("classification", "tiny-rnn", [prompt], parameters={"seed": 1}, outputs=[classification])
    for i, outputs in enumerate(
        ([{"name": "x"}], [{"name": "mean"}] * 2, [{"name": "mean", "parameters": {"shared_memory_region": "a"}}], 5,
         [{"name": "mean", "parameters": {"binary_data": 1}}], [{"name": "mean", "parameters": {"classification": 1}}],
         [], [{}], [{"name": "mean", "parameters": {"x": []}}], [{"name": "lower"}])
    ):  # fmt: skip
        yield infer(f"outputs {i}", "tiny-lstm", [values], outputs=outputs, parameters={"horizon": 2})
    yield infer(
        "no classes", "tiny-rnn", [prompt], outputs=[{"name": "log_probabilities", "parameters": {"classification": 0}}]
    )
    for i, parameters in enumerate(
        ({"horizon": 0}, {"horizon": "3"}, {"levels": "x"}, {"levels": "80,80"}, {"levels": 0}, {"x": 1}, {"horizon": 41},
         {"timeout": -1}, {"timeout": "1"}, {"timeout": 1}, {"priority": 1}, {"seasonality": 7}, {"triton_x": 1},
         {"binary_data_output": 1}, {"headers": "x"}, {"horizon": [1]}, {"integer": 1}, {"seed": 1}, {"timeout": 0},
         {"timeout": 10**400}, {"horizon": {}})
    ):  # fmt: skip
        yield infer(f"parameters {i}", "tiny-lstm", [values], parameters=parameters)
    for i, parameters in enumerate(
        (
            {"max_characters": 0},
            {"temperature": 11},
            {"top_k": 0},
            {"stop": ""},
            {"seed": -1},
            {"prompt": "x"},
            {"n": 2},
        )
    ):
        yield infer(f"text parameters {i}", "tiny-rnn", [prompt], parameters=parameters)
    for i, inputs in enumerate(
        ([], None, 5, [5], [{}], [tensor("x", "FP64", [1, 20], VALUES)], [values, values], [tensor("values", "FP64", [1, 20])],
         [tensor("values", "INT8", [1, 2], [1, 2])], [tensor("values", "FP64", [20], VALUES)],
         [tensor("values", "FP64", [1, 19], VALUES)], [tensor("values", "FP64", [1, 20], "x")],
         [tensor("values", "FP64", [1, 20], ["1"] * 20)], [tensor("values", "FP64", [1, 20], [[1], [2]])],
         [tensor("values", "FP64", [1, 20], [[1.0] * 19, [1.0]])], [tensor("values", "FP16", [1, 20], VALUES)],
         [tensor("values", "XX", [1, 20], VALUES)], [tensor("values", "FP64", [5, 20], VALUES * 5)],
         [tensor("values", "FP64", [0, 20], [])], [tensor("values", "FP64", [1, 301], [1.0] * 301)],
         [tensor("values", "FP64", [1, 20], VALUES, binary_data_size=8)], [tensor("values", "FP64", [1, -1], VALUES)],
         [tensor("values", "FP64", [1, 20], shared_memory_region="x")], [tensor("values", "FP32", [1, 20], [1e39] * 20)],
         [tensor("values", "FP64", [1, 20], [1e301] * 20)], [tensor("values", "FP64", [1, 2], [1, 2])],
         [tensor("values", "FP64", [1] * 9, [1])], [tensor("values", "FP64", [1, 20], [None] * 20)],
         [tensor("values", "FP64", [1, 20], binary_data_size="8")], [tensor("values", "FP64", [1, 20], VALUES, x=[1])],
         [tensor("values", "FP64", [1, 20], [math.inf] * 20)], [tensor("values", "FP64", [1, 20], [[VALUES]])],
         [{**values, "parameters": None, "x": 1}], [tensor("values", "FP64", [1, 20, 1], VALUES)],
         [tensor("values", "FP64", [1, 20, 2], VALUES * 2)], [tensor("values", "FP64", [1, 20], [[*VALUES[:9]], 1])],
         *([tensor("values", "FP64", [1, 20], binary_data_size=size)] for size in (-1, 0, 8.0)))
    ):  # fmt: skip
        yield infer(f"inputs {i}", "tiny-lstm", inputs)
    for i, (model, inputs) in enumerate(
        (
            ("tiny-cgan", [latents]), ("tiny-cgan", [latents, tensor("classes", "INT64", [2], [0, 3])]),
            ("tiny-cgan", [latents, tensor("classes", "INT64", [3], [0, 1, 2])]),
            ("tiny-cgan", [latents, tensor("classes", "BYTES", [2], ["x", "w"])]),
            ("tiny-cgan", [latents, tensor("classes", "INT32", [2], [0, 2**31])]),
            ("tiny-cgan", [latents, tensor("classes", "INT8", [2], [0, 128])]),
            ("tiny-cgan", [latents, tensor("classes", "INT64", [2], [0, 1.5])]),
            ("tiny-cgan", [latents, tensor("classes", "INT64", [2], [0, None])]),
            ("tiny-gan", [tensor("latents", "FP64", [1, 4], [1e4, 0, 0, 0])]),
            ("tiny-gan", [tensor("latents", "FP64", [9, 4], [0] * 36)]),
            ("tiny-cnn", [tensor("image", "FP32", [1, 3, 32, 32], [256] * 3072)]),
            ("tiny-cnn", [tensor("image", "UINT8", [1, 3, 32, 32], [256] * 3072)]),
            ("tiny-rnn", [tensor("prompt", "BYTES", [5], ["a"] * 5)]),
            ("tiny-rnn", [tensor("prompt", "BYTES", [1], ["x" * 201])]),
            ("tiny-rnn", [tensor("prompt", "BYTES", [1], [5])]),
            ("tiny-shop", [values, tensor("covariates", "FP32", [1, 22, 1], [1.0] * 22)]),
            ("tiny-none", [values]), ("tiny-lstm@1", [values]), ("tiny-lstm@2", [values]), ("tiny-gan@1", [latents]),
            ("tiny-pets", [latents]), ("tiny-lstm/versions/1", [values]), ("tiny-lstm/versions/x", [values]),
            ("tiny-lstm/versions/2", [values]),
        )
    ):  # fmt: skip
        yield infer(f"model {i}", model, inputs)
    path = "/v2/models/tiny-lstm/infer"
    row = struct.pack("<20d", *VALUES)
    head = json.dumps({"inputs": [tensor("values", "FP64", [1, 20], binary_data_size=160)]}).encode()
    length = {"inference-header-content-length": str(len(head))}
    yield Recorded("infer binary", "POST", path, head + row, length)
    yield Recorded("infer binary too short", "POST", path, head + row[:-1], length)
    yield Recorded("infer binary too long", "POST", path, head + row + b"1", length)
    yield Recorded("infer raw", "POST", path, row, {"inference-header-content-length": "0"})
    yield Recorded("infer raw wrong size", "POST", path, row[:-1], {"inference-header-content-length": "0"})
    zero = {"inference-header-content-length": "0"}
    yield Recorded("infer raw text", "POST", "/v2/models/tiny-rnn/infer", b"abc\xff", zero)
    yield Recorded("infer raw two inputs", "POST", "/v2/models/tiny-cgan/infer", row, zero)
    yield Recorded("infer raw two dimensions", "POST", "/v2/models/tiny-cnn/infer", bytes(3072), zero)
    yield Recorded("infer raw without a row", "POST", "/v2/models/tiny-cnn/infer", bytes(3071), zero)
    yield Recorded("infer raw two varying dimensions", "POST", "/v2/models/tiny-shop/infer", row, zero)
    for i, value in enumerate(("x", "-1", "99999", "1" * 20, "000000000001", "²".encode())):
        yield Recorded(f"infer header {i}", "POST", path, head, {"inference-header-content-length": value})
    body = json.dumps({"inputs": [values], "parameters": {"horizon": 2}}).encode()
    for name, content, coding in (
        ("gzip", gzip.compress(body), "gzip"), ("not gzip", body, "gzip"), ("truncated", gzip.compress(body)[:-9], "gzip"),
        ("too large", gzip.compress(b" " * 300_000), "gzip"), ("br", body, "br"), ("deflate", zlib.compress(body), "deflate"), ("data after", gzip.compress(body) + b"x", "GZIP"),
    ):  # fmt: skip
        yield Recorded(f"infer {name}", "POST", path, content, {"content-encoding": coding})
    strings = struct.pack("<I", 3) + b"abc"
    minus_one = b"\xff\xff\xff\xff\0\0\0"
    for i, content in enumerate((strings, strings[:-1], strings * 2, strings[:3], minus_one, b"")):
        sized = {"inputs": [tensor("prompt", "BYTES", [1], binary_data_size=len(content))], "parameters": seeded}
        text = json.dumps(sized).encode()
        header = {"inference-header-content-length": str(len(text))}
        yield Recorded(f"infer strings {i}", "POST", "/v2/models/tiny-rnn/infer", text + content, header)
    for name, content in (
        ("null", b"null"),
        ("empty", b""),
        ("not JSON", b"{"),
        ("commas", b'{"x":[' + b"1," * 999 + b"1]}"),
    ):
        yield Recorded(f"infer body {name}", "POST", path, content)
    yield Recorded("infer body too large", "POST", path, b" " * 200_001)
    yield from deadlines(path, {"inputs": [values]})
    yield from methods(path)


def generate_requests() -> Iterator[Recorded]:
    good = {"text_input": "abc", "parameters": {"seed": 1, "max_tokens": 5}}
    for path in ("/v2/models/tiny-rnn/generate", "/v2/models/tiny-rnn/versions/1/generate_stream"):
        for i, body in enumerate(
            (good, {**good, "id": "mine"}, {"text_input": "abc", "seed": 1, "max_characters": 4, "stop": ["a", "b"]})
        ):
            yield Recorded(f"{path} {i}", "POST", path, body)
    path = "/v2/models/tiny-rnn/generate"
    for i, body in enumerate(
        ({}, [], {"text_input": 5}, {"text_input": "x" * 201}, {**good, "id": 5}, {**good, "id": "x" * 1001},
         {**good, "parameters": 5}, {**good, "seed": 2}, {**good, "stream": True}, {**good, "stream": 5},
         {**good, "max_characters": 5}, {**good, "x": 1}, {"text_input": "a", "max_tokens": 0},
         {"text_input": "a", "max_tokens": 101}, {"text_input": "a", "top_p": 2}, {"text_input": "a", "timeout": -1},
         {"text_input": "a", "timeout": 1}, {"text_input": "a", "priority": 2}, {**good, "parameters": {"seed": "x"}},
         {**good, "parameters": None, "seed": 1}, {"text_input": "a", "stop": 5}, {"text_input": "a", "n": 2},
         {"text_input": "a", "max_tokens": None})
    ):  # fmt: skip
        yield Recorded(f"generate {i}", "POST", path, body)
    for i, model in enumerate(("tiny-none", "tiny-gan", "tiny-rnn@2", "tiny-rnn/versions/x", "tiny-pets")):
        yield Recorded(f"generate model {i}", "POST", f"/v2/models/{model}/generate", good)
    yield Recorded("generate too large", "POST", path, {"text_input": " " * 200_001})
    yield from methods(path)


def description_requests() -> Iterator[Recorded]:
    """Yield requests for descriptions of the service and its models, and for pages."""
    for path in (
        "/health/live", "/health/ready", "/v1/models", "/v1/models/tiny-cnn", "/v1/models/tiny-gan@2", "/v1/models/tiny-none",
        "/v1/models/tiny-gan@1", "/v1/models/tiny-gan@9", "/v1/models/tiny-pets", "/v1/models/tiny-cnn/pictures/a.png",
        "/v1/models/tiny-none/pictures/a.png", "/v1/models/tiny-cnn@7/pictures/a.png", "/v1/models/../pictures/a.png", "/v1/models/", "/v1", "/v1/nothing", "/v2", "/v2/", "/v2/nothing",
        "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/stats", "/web/none.js", "/nothing?x=%ff", "/v1/models?",
        "/v1/models/tiny-gan/versions/2", "/health", "/v1/Images/classify", "//v1/models", "/v1/models/%2e%2e", "/", "/web/app.js",
        "/docs", "/openapi.json", "/redoc",
    ):  # fmt: skip
        yield Recorded(f"GET {path}", "GET", path)
    for path in ("/v1/models", "/v1/models/tiny-gan", "/v2/models/tiny-gan/config", "/v2"):
        yield Recorded(f"GET {path} with a query", "GET", f"{path}?versoin=1")
    for path in (
        "/health/live",
        "/v1/models",
        "/v2/models/tiny-cnn",
        "/nothing",
        "/v1/chat/completions",
        "/",
        "/v2",
        "/openapi.json",
        "/v1/models/x",
    ):
        yield Recorded(f"HEAD {path}", "HEAD", path)
        yield Recorded(f"DELETE {path}", "DELETE", path)
        yield Recorded(f"POST {path}", "POST", path, {})
    for model in (
        "tiny-cnn", "tiny-rnn", "tiny-lstm", "tiny-forecaster", "tiny-gan", "tiny-cgan", "tiny-shop", "tiny-gan@3", "tiny-gan@1",
        "tiny-none", "tiny-pets", "tiny-gan/versions/4", "tiny-gan/versions/x", "tiny-gan/versions/9", "tiny-gan@x",
    ):  # fmt: skip
        for part in ("", "/config", "/ready"):
            yield Recorded(f"GET {model}{part}", "GET", f"/v2/models/{model}{part}")
    for model in ("tiny-none", "tiny-pets", "tiny-gan@1", "tiny-gan/versions/x"):
        yield Recorded(f"GET {model}/stats", "GET", f"/v2/models/{model}/stats")
    cached = {"if-none-match": "*"}
    yield Recorded("page in the cache", "GET", "/", headers=cached)
    yield Recorded("picture path", "GET", "/v1/models/tiny-cnn/pictures/..%2fcard.json")


def repository_requests() -> Iterator[Recorded]:
    index = "/v2/repository/index"
    for i, body in enumerate((b"", {}, {"ready": True}, {"ready": 1}, {"x": 1}, [], b"{", {"ready": None})):
        yield Recorded(f"index {i}", "POST", index, body)
    load, unload = (f"/v2/repository/models/{{}}/{verb}" for verb in ("load", "unload"))
    for name, path, body, headers in (
        ("without key", load.format("tiny-pets"), {}, {}),
        ("wrong key", unload.format("tiny-pets"), {}, {"authorization": "Bearer x"}),
        ("basic key", unload.format("tiny-pets"), {}, {"authorization": "Basic x"}),
        ("unknown", load.format("tiny-none"), {}, ADMIN_HEADERS),
        ("unknown version", load.format("tiny-gan@9"), {}, ADMIN_HEADERS),
        ("config", load.format("tiny-gan"), {"parameters": {"config": "{}"}}, ADMIN_HEADERS),
        ("file", load.format("tiny-gan"), {"parameters": {"file:x": "y"}}, ADMIN_HEADERS),
        ("wrong parameters", load.format("tiny-gan"), {"parameters": 5}, ADMIN_HEADERS),
        ("load", load.format("tiny-gan"), {"parameters": {"unload_dependents": True}}, ADMIN_HEADERS),
        ("load a version", load.format("tiny-gan@2"), b"", ADMIN_HEADERS),
        ("unload a default", unload.format("tiny-gan"), {}, ADMIN_HEADERS),
        ("unload a version", unload.format("tiny-cgan@1"), {}, ADMIN_HEADERS),
        ("unload", unload.format("tiny-cgan"), {}, ADMIN_HEADERS),
        ("unload unknown", unload.format("tiny-none"), {}, ADMIN_HEADERS),
        ("load again", load.format("tiny-cgan"), {}, ADMIN_HEADERS),
        ("not JSON", unload.format("tiny-cgan"), b"{", ADMIN_HEADERS),
    ):
        yield Recorded(f"repository {name}", "POST", path, body, headers)
    yield from methods(index)
    yield from methods(load.format("tiny-gan"))


def admin_requests() -> Iterator[Recorded]:
    admin = "/v1/admin"
    for i, path in enumerate(
        ("/models", "/models/tiny-gan", "/models/tiny-none", "/verify", "/nothing", "/models/tiny-pets")
    ):
        yield Recorded(f"admin {i}", "GET", admin + path, headers=ADMIN_HEADERS)
        yield Recorded(f"admin {i} without key", "GET", admin + path)
    for i, body in enumerate(
        ({"version": 2}, {"version": 3, "share": 25}, {"version": "latest"}, {"version": 0}, {"version": 9}, {}, {"version": 1},
         {"version": "2"}, {"version": 2, "share": 0}, {"version": 2, "share": 101}, {"version": True}, {"x": 1}, b"{",
         {"version": 2, "share": "x"}, {"version": 10**9}, {"version": 1.5})
    ):  # fmt: skip
        yield Recorded(f"activate {i}", "POST", f"{admin}/models/tiny-gan/activate", body, ADMIN_HEADERS)
    yield Recorded("activate unknown", "POST", f"{admin}/models/tiny-none/activate", {"version": 1}, ADMIN_HEADERS)
    yield Recorded(
        "activate with query", "POST", f"{admin}/models/tiny-gan/activate?x=1", {"version": 2}, ADMIN_HEADERS
    )
    rollback = f"{admin}/models/tiny-gan/rollback"
    yield Recorded("roll back to a version", "POST", rollback, {"version": 1}, ADMIN_HEADERS)
    yield Recorded("roll back with query", "POST", f"{rollback}?version=1", headers=ADMIN_HEADERS)
    yield Recorded("roll back", "POST", rollback, {}, ADMIN_HEADERS)
    yield Recorded("roll back unknown", "POST", f"{admin}/models/tiny-none/rollback", headers=ADMIN_HEADERS)
    yield Recorded("roll back impossible", "POST", f"{admin}/models/tiny-cnn/rollback", headers=ADMIN_HEADERS)
    for i, body in enumerate(
        ({"version": 2}, {"version": 2, "undo": True}, {"version": 0}, {"version": 9}, {}, {"version": 1, "undo": 1}, {"version": "1"})
    ):  # fmt: skip
        yield Recorded(f"retire {i}", "POST", f"{admin}/models/tiny-gan/retire", body, ADMIN_HEADERS)
    yield Recorded(
        "retire the active version", "POST", f"{admin}/models/tiny-cnn/retire", {"version": 1}, ADMIN_HEADERS
    )
    yield Recorded("retire too large", "POST", f"{admin}/models/tiny-gan/retire", {"x": " " * 2**14}, ADMIN_HEADERS)
    for i, (query, body) in enumerate((("", b"no archive"), ("?renumber=x", b""), ("?x=1", b""), ("", b""))):
        yield Recorded(f"import {i}", "POST", f"{admin}/import{query}", body, ADMIN_HEADERS)
    for i, query in enumerate(("", "?name=../x", "?name=a&task=b", "?name=a&size=x", "?x=1", "?name=a&title=%00")):
        yield Recorded(f"add {i}", "POST", f"{admin}/add{query}", b"no network", ADMIN_HEADERS)
    for i, path in enumerate(
        ("tiny-cnn/export", "tiny-gan/export?version=2", "tiny-cnn/export?version=9", "tiny-cnn/export?version=x",
         "tiny-cnn/export?version=0", "tiny-none/export", "tiny-cnn/export?x=1")
    ):  # fmt: skip
        yield Recorded(f"export {i}", "GET", f"{admin}/models/{path}", headers=ADMIN_HEADERS)
    for path in ("models", "import", "add", "verify", "models/tiny-cnn/activate", "models/tiny-cnn/rollback"):
        yield from methods(f"{admin}/{path}")


def all_requests() -> list[Recorded]:
    """Return all requests in the order in which they are sent. Later ones may change the store."""
    return [
        *classify_requests(), *text_requests(), *series_requests(), *sample_requests(), *completion_requests(),
        *image_requests(), *timeseries_requests(), *infer_requests(), *generate_requests(), *description_requests(),
        *repository_requests(), *admin_requests(), Recorded("metrics", "GET", "/metrics"),
    ]  # fmt: skip


def protected_requests(key: str) -> list[Recorded]:
    """Return requests to a service with API keys, CORS, trusted host names and no admin key."""
    good, bearer = {"count": 1, "seed": 1}, {"authorization": f"Bearer {key}"}
    origin = {"origin": "https://page.example"}
    preflight = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    sent = "content-type, x-stainless-lang, x-stainless-os, inference-header-content-length"
    keys: tuple[dict[str, Any], ...] = (
        {"authorization": f"bearer  {key}"}, {"authorization": "Bearer"}, {"x-api-key": ""}, {"x-api-key": key[:-1]},
        {"x-api-key": f"{key}x"}, {"x-api-key": key.upper()}, {"x-api-key": "x" * 10_000}, {"x-api-key": "é".encode()},
        {"x-api-key": key_file.digest(key).hex()},
    )  # fmt: skip
    return [
        *(Recorded(f"keys {i}", "POST", SAMPLE, good, headers) for i, headers in enumerate(keys)),
        Recorded("keys none", "POST", SAMPLE, good),
        Recorded("keys wrong", "POST", SAMPLE, good, {"authorization": "Bearer nobody"}),
        Recorded("keys other scheme", "POST", SAMPLE, good, {"authorization": f"Basic {key}"}),
        Recorded("keys bearer", "POST", SAMPLE, good, bearer),
        Recorded("keys header", "POST", SAMPLE, good, {"x-api-key": key}),
        Recorded("keys v2", "GET", "/v2/models"),
        Recorded("keys v2 health", "GET", "/v2/health/ready"),
        Recorded("keys page", "HEAD", "/"),
        Recorded("keys document", "GET", "/openapi.json"),
        Recorded("keys metrics", "GET", "/metrics"),
        Recorded("keys v2 model", "GET", "/v2/models/tiny-gan", headers=bearer),
        Recorded("keys unknown path", "GET", "/nothing"),
        Recorded("keys admin", "GET", "/v1/admin/models"),
        Recorded("keys load", "POST", "/v2/repository/models/tiny-pets/load", {}, bearer),
        Recorded("cors allowed", "POST", SAMPLE, good, {**bearer, **origin}),
        Recorded("cors other", "POST", SAMPLE, good, {**bearer, "origin": "https://other.example"}),
        Recorded("cors error", "POST", SAMPLE, good, origin),
        Recorded("cors preflight", "OPTIONS", SAMPLE, headers=preflight),
        Recorded("cors headers", "OPTIONS", SAMPLE, headers={**preflight, "access-control-request-headers": sent}),
        Recorded("cors preflight other", "OPTIONS", SAMPLE, headers={**preflight, "origin": "https://other.example"}),
        Recorded("host trusted", "GET", "/health/live", headers={"host": "www.example.org"}),
        Recorded("host foreign", "GET", "/health/live", headers={"host": "attacker.example"}),
        Recorded("host foreign v2", "GET", "/v2", headers={"host": "attacker.example"}),
    ]
