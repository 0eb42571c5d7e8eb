"""The Open Inference Protocol V2 with an unmodified tritonclient: synchronous and asyncio, JSON and binary tensors."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from support import tensors as inputs
from support.faults import Fault, Hold
from support.networks import publish_tiny
from support.service import Serve, address
from support.tensors import INPUTS, PIXELS, SHAPES, SINE
from support.waiting import wait_until
from tritonclient.utils import InferenceServerException


@pytest.fixture
def client(tiny: httpx.Client) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address(tiny)) as client:
        yield client


def infer(client: httpx.Client, name: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(f"/v2/models/{name}/infer", content=content, headers=headers)


SERIES = {"name": "values", "datatype": "FP64", "shape": [1, 12], "data": list(range(12))}


def test_the_client_reads_metadata_of_server_and_models(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny-cnn")
    assert client.is_model_ready("tiny-cnn", "1")
    assert not client.is_model_ready("tiny-cnn", "2")
    assert not client.is_model_ready("nothing")
    server = client.get_server_metadata()
    assert server["name"] == "quartet"
    assert {"binary_tensor_data", "classification", "statistics"} <= set(server["extensions"])
    for name, tensors in INPUTS.items():
        metadata, config = client.get_model_metadata(name, "1"), client.get_model_config(name)
        assert metadata["versions"] == ["1"]
        assert [tensor["name"] for tensor in metadata["inputs"]] == list(tensors)
        assert [tensor["name"] for tensor in metadata["outputs"]] == list(SHAPES[name])
        assert config["max_batch_size"] >= 3
        for described, configured in zip(metadata["inputs"], config["input"], strict=True):
            assert configured["dims"] == (described["shape"][1:] or [1])
            assert configured["data_type"] == {"BYTES": "TYPE_STRING"}.get(
                described["datatype"], f"TYPE_{described['datatype']}"
            )
    index = client.get_model_repository_index()
    assert [entry["name"] for entry in index] == sorted(INPUTS)
    assert {(entry["version"], entry["state"]) for entry in index} == {("1", "READY")}


@pytest.mark.parametrize("name", list(INPUTS))
def test_every_network_takes_json_binary_and_compressed_tensors(
    client: triton.InferenceServerClient, name: str
) -> None:
    parameters = {"seed": 3} if name == "tiny-rnn" else None
    results = []
    for binary_input, binary_output, compression in (
        (False, False, None),
        (True, True, None),
        (True, False, "gzip"),
        (False, True, "deflate"),
    ):
        outputs = [triton.InferRequestedOutput(output, binary_data=binary_output) for output in SHAPES[name]]
        answer = client.infer(
            name,
            inputs.infer_inputs(name, binary_input),
            outputs=outputs,
            request_id="mine",
            parameters=parameters,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        head = answer.get_response()
        assert (head["model_name"], head["model_version"], head["id"]) == (name, "1", "mine")
        assert all(("data" in output) is not binary_output for output in head["outputs"])
        results.append({output: answer.as_numpy(output) for output in SHAPES[name]})
        assert {output: array.shape for output, array in results[-1].items()} == SHAPES[name]
    for other in results[1:]:
        for output, array in other.items():
            if array.dtype == object:
                assert [_text(value) for value in array] == [_text(value) for value in results[0][output]]
            else:
                np.testing.assert_allclose(array, results[0][output], rtol=1e-6, atol=1e-12)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def test_the_asyncio_client_gets_the_same_results_concurrently(tiny: httpx.Client) -> None:
    async def infer_all() -> list[Any]:
        async with triton_aio.InferenceServerClient(address(tiny)) as client:
            assert await client.is_server_ready()
            assert (await client.get_model_metadata("tiny-cnn"))["name"] == "tiny-cnn"
            requests = [
                client.infer(name, inputs.infer_inputs(name, binary, triton_aio))
                for name in INPUTS
                for binary in (True, False)
            ]
            answers = await asyncio.gather(*requests)
            with pytest.raises(InferenceServerException, match="unknown input 'pixels'"):
                await client.infer(
                    "tiny-cnn", [triton_aio.InferInput("pixels", [1], "UINT8").set_data_from_numpy(PIXELS[0, 0, 0, :1])]
                )
            return answers

    answers = asyncio.run(infer_all())
    for name, binary, other in zip(INPUTS, answers[::2], answers[1::2], strict=True):
        for output, shape in SHAPES[name].items():
            assert binary.as_numpy(output).shape == other.as_numpy(output).shape == shape
    np.testing.assert_allclose(answers[0].as_numpy("probabilities"), answers[1].as_numpy("probabilities"), rtol=1e-6)


def test_the_classification_parameter_returns_value_index_and_label(client: triton.InferenceServerClient) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", class_count=2)]
    plain = client.infer("tiny-cnn", inputs.infer_inputs("tiny-cnn", True)).as_numpy("probabilities")
    best = client.infer("tiny-cnn", inputs.infer_inputs("tiny-cnn", True), outputs=outputs).as_numpy("probabilities")
    assert best.shape == (3, 2)
    for row, shares in zip(best, plain, strict=True):
        order = np.argsort(-shares)
        for entry, index in zip(row, order[:2], strict=True):
            value, position, label = entry.decode().split(":")
            assert (int(position), label) == (index, "abcdefghij"[index])
            assert float(value) == pytest.approx(shares[index], abs=1e-6)
    with pytest.raises(InferenceServerException, match="output 'images' has no classes"):
        client.infer(
            "tiny-gan",
            inputs.infer_inputs("tiny-gan", True),
            outputs=[triton.InferRequestedOutput("images", class_count=1)],
        )


def test_a_body_may_be_one_raw_tensor(tiny: httpx.Client) -> None:
    raw = {"inference-header-content-length": "0"}
    for name, content in (("tiny-cnn", PIXELS[:1].tobytes()), ("tiny-lstm", SINE[0].tobytes()), ("tiny-rnn", b"abc")):
        answer = infer(tiny, name, content, **raw)
        assert answer.status_code == 200, answer.text
        length = int(answer.headers["inference-header-content-length"])
        outputs = json.loads(answer.content[:length])["outputs"]
        sizes = [output["parameters"]["binary_data_size"] for output in outputs]
        assert sum(sizes) == len(answer.content) - length
        assert all(output["shape"][0] == 1 for output in outputs)
    assert infer(tiny, "tiny-cnn", b"1234", **raw).json() == {
        "error": "unexpected size for input 'image': 4 bytes, expected 3,072"
    }
    assert infer(tiny, "tiny-cgan", b"1234", **raw).status_code == 400


def test_json_and_binary_inputs_may_be_mixed_and_pixels_may_be_floats(tiny: httpx.Client) -> None:
    latents = np.random.default_rng(2).standard_normal((2, 4))
    inputs = [
        {"name": "classes", "datatype": "BYTES", "shape": [2, 1], "data": ["z", "x"]},
        {"name": "latents", "datatype": "FP64", "shape": [2, 4], "parameters": {"binary_data_size": 64}},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    mixed = infer(tiny, "tiny-cgan", head + latents.tobytes(), **{"Inference-Header-Content-Length": str(len(head))})
    nested = {"name": "latents", "datatype": "FP64", "shape": [2, 4], "data": latents.tolist()}
    classes = {"name": "classes", "datatype": "INT32", "shape": [2], "data": [2, 0]}
    plain = infer(tiny, "tiny-cgan", {"inputs": [nested, classes]})
    assert mixed.json()["outputs"] == plain.json()["outputs"]
    as_floats = {
        "name": "image",
        "datatype": "FP32",
        "shape": [1, 3, 32, 32],
        "data": PIXELS[:1].astype(float).tolist(),
    }
    as_bytes = {"name": "image", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": PIXELS[:1].reshape(-1).tolist()}
    results = [
        infer(tiny, "tiny-cnn", {"inputs": [each]}).json()["outputs"][0]["data"] for each in (as_floats, as_bytes)
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


def test_statistics_count_requests_rows_and_batches(client: triton.InferenceServerClient) -> None:
    def figures(name: str, version: str = "") -> dict[str, Any]:
        (row,) = client.get_inference_statistics(name, version)["model_stats"]
        figures: dict[str, Any] = row
        return figures

    before = figures("tiny-cnn"), figures("tiny-rnn")
    client.infer("tiny-cnn", inputs.infer_inputs("tiny-cnn", True))
    client.infer("tiny-rnn", inputs.infer_inputs("tiny-rnn", True))
    images, texts = figures("tiny-cnn"), figures("tiny-rnn", "1")
    assert images["inference_count"] == before[0]["inference_count"] + 3
    assert images["execution_count"] == before[0]["execution_count"] + 1
    for stage, times in (("success", 1), ("queue", 3), ("compute_infer", 1), ("fail", 0)):
        now, then = images["inference_stats"][stage], before[0]["inference_stats"][stage]
        assert now["count"] == then["count"] + times
        assert now["ns"] >= then["ns"]
    assert images["inference_stats"]["compute_infer"]["ns"] > before[0]["inference_stats"]["compute_infer"]["ns"]
    assert before[0]["last_inference"] < images["last_inference"] <= time.time() * 1000
    assert texts["inference_stats"]["success"]["count"] == before[1]["inference_stats"]["success"]["count"] + 1
    assert texts["inference_count"] == before[1]["inference_count"] + 3
    assert texts["execution_count"] > before[1]["execution_count"]
    assert [entry["name"] for entry in client.get_inference_statistics()["model_stats"]] == sorted(INPUTS)


def test_the_repository_index_lists_broken_versions_with_their_reason(serve: Serve, tiny_store: Any) -> None:
    (publish_tiny(tiny_store, "tiny-gan").folder / "model.safetensors").write_bytes(b"cut")
    with serve() as service, triton.InferenceServerClient(address(service)) as client:
        (broken,) = [entry for entry in client.get_model_repository_index() if entry["state"] == "UNAVAILABLE"]
        assert (broken["name"], broken["version"]) == ("tiny-gan", "2")
        assert "sha256" in broken["reason"]
        ready = service.post("/v2/repository/index", json={"ready": True}).json()
        assert {entry["state"] for entry in ready} == {"READY"}
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="require an admin key"):
                change("tiny-gan")


def test_a_streamed_text_equals_the_unstreamed_one(tiny: httpx.Client) -> None:
    body = {"id": "7", "text_input": "abc", "parameters": {"max_tokens": 30, "seed": 4}}
    unstreamed = tiny.post("/v2/models/tiny-rnn/generate", json=body).json()
    assert (unstreamed["id"], unstreamed["model_name"], unstreamed["model_version"]) == ("7", "tiny-rnn", "1")
    assert len(unstreamed["text_output"]) == 30
    top_level = {"text_input": "abc", "max_characters": 30, "seed": 4, "stream": False}
    for nulls in ({}, {"id": None, "parameters": None}):
        answer = tiny.post("/v2/models/tiny-rnn/versions/1/generate", json={**top_level, **nulls}).json()
        assert (answer["text_output"], answer.get("id")) == (unstreamed["text_output"], None)
    with tiny.stream("POST", "/v2/models/tiny-rnn/generate_stream", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["text_output"] for event in events) == unstreamed["text_output"]
    assert events[-1]["finish_reason"] == "length"
    urgent = tiny.post("/v2/models/tiny-rnn/generate", json={**body, "parameters": {"priority": 2}})
    assert (urgent.status_code, urgent.json()["error"].partition(";")[0]) == (400, "priority is 2")
    usual = tiny.post("/v2/models/tiny-rnn/generate", json={**body, "parameters": {"priority": 0, "max_tokens": 3}})
    assert usual.status_code == 200
    invalid = tiny.post("/v2/models/tiny-rnn/generate", json={**body, "parameters": {"stream": True}})
    assert invalid.json() == {"error": "stream is true; use generate_stream instead"}


@pytest.mark.usefixtures("slow")
def test_an_error_in_a_stream_is_an_event_with_the_protocol_s_schema(serve: Serve) -> None:
    body = {"text_input": "a", "max_characters": 4000}
    url, headers = "/v2/models/tiny-rnn/generate_stream", {"x-request-timeout": "1"}
    with serve(inline_seconds=0) as client, client.stream("POST", url, json=body, headers=headers) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    last = json.loads(lines[-1].removeprefix("data: "))
    assert last == {"error": "the deadline passed before the answer was complete; x-request-timeout is in seconds"}


def length_prefixed(values: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def binary(
    size: int, content: bytes, datatype: str = "FP64", shape: Any = (1, 12), name: str = "values"
) -> tuple[bytes, int]:
    head = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [head]}).encode()
    return text + content, len(text)


INVALID: list[tuple[str, Any, str]] = [
    ("tiny-lstm", b"", "inputs is missing"),
    ("tiny-lstm", b"[]", "it should be an object"),
    ("tiny-lstm", b"{", "the body is not JSON"),
    ("tiny-lstm", b"[" * 100_000, "the body is not JSON"),
    ("tiny-lstm", {"inputs": []}, "inputs is"),
    ("tiny-lstm", {"inputs": [{"name": "values"}]}, "inputs.0.shape is missing"),
    ("tiny-lstm", {"inputs": [{**SERIES, "datatype": "BF16"}]}, "inputs.0.datatype is 'BF16'"),
    ("tiny-lstm", {"inputs": [{**SERIES, "datatype": "FP16"}]}, "FP16 data via JSON is not supported"),
    ("tiny-lstm", {"inputs": [{**SERIES, "datatype": "INT64"}]}, "input 'values' is of INT64; allowed types: FP64, FP32"),
    ("tiny-lstm", {"inputs": [{**SERIES, "shape": [1, 13]}]}, "has 12 values; its shape [1, 13] has 13"),
    ("tiny-lstm", {"inputs": [{**SERIES, "shape": [12]}]}, "has the shape [12], expected [-1, -1]"),
    ("tiny-lstm", {"inputs": [{**SERIES, "shape": [-1, 12]}]}, "inputs.0.shape.0 is -1"),
    ("tiny-lstm", {"inputs": [{**SERIES, "shape": [2**40, 2**40]}]}, "all inputs together should have 1 to"),
    ("tiny-lstm", {"inputs": [{**SERIES, "shape": [0, 12], "data": []}]}, "all inputs together should have 1 to 100,000 values"),
    ("tiny-lstm", {"inputs": [{**SERIES, "shape": [0, 2**70]}]}, "all inputs together should have 1 to"),
    ("tiny-lstm", {"inputs": [{**SERIES, "shape": [65, 10], "data": [1] * 650}]}, "has 65 rows; it should have 1 to 64"),
    ("tiny-lstm", {"inputs": [{**SERIES, "datatype": "FP32", "data": [1e39] * 12}]}, "inputs.0.data has 1e+39, which no FP32 can hold"),
    ("tiny-lstm", {"inputs": [{**SERIES, "data": [10**400] * 12}]}, "which no FP64 can hold"),
    ("tiny-lstm", {"inputs": [{**SERIES, "data": None}]}, "either data or parameters.binary_data_size"),
    ("tiny-lstm", {"inputs": [{**SERIES, "data": "abc"}]}, "inputs.0.data is 'abc'; it should be a list"),
    ("tiny-lstm", {"inputs": [{**SERIES, "data": ["7"] * 12}]}, "inputs.0.data has '7'"),
    ("tiny-lstm", {"inputs": [{**SERIES, "data": [True] * 12}]}, "inputs.0.data has true"),
    ("tiny-lstm", {"inputs": [{**SERIES, "data": [[1] * 6, [1] * 6]}]}, "is nested as [2, 6]"),
    ("tiny-lstm", {"inputs": [{**SERIES, "data": [[1] * 6, [1] * 5]}]}, "is nested unevenly"),
    ("tiny-lstm", {"inputs": [{**SERIES, "data": [1] * 11 + [1e308]}]}, "values has 1e+308; allowed values: -1e300 to 1e300"),
    ("tiny-lstm", {"inputs": [{**SERIES, "data": [None] * 12}]}, "only missing values"),
    ("tiny-lstm", {"inputs": [{**SERIES, "shape": [1, 9], "data": [1] * 9}]}, "has 9 values; tiny-lstm needs at least 10"),
    ("tiny-lstm", {"inputs": [SERIES, SERIES]}, "which an earlier input already has"),
    ("tiny-lstm", {"inputs": [{**SERIES, "name": "x"}]}, "unknown input 'x'; known inputs: values"),
    ("tiny-lstm", {"inputs": [{**SERIES, "parameters": {"shared_memory_region": "a"}}]}, "shared memory, which is not"),
    ("tiny-lstm", {"inputs": [SERIES], "outputs": [{"name": "mean", "parameters": {"shared_memory_region": "a"}}]}, "output 'mean' is for shared memory, which is not"),
    ("tiny-lstm", {"inputs": [SERIES], "outputs": [{"name": "x"}]}, "unknown output 'x'; known outputs: mean, lower, upper"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"horizn": 3}}, "unknown parameter 'horizn'; known parameters: horizon"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"horizon": 0}}, "horizon is 0"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"levels": "x"}}, "levels is 'x'; it should be like '80,95'"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"sequence_id": 3}}, "unknown parameter 'sequence_id'"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"timeout": -1}}, "timeout is -1"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"priority": 1}}, "priority is 1; this service has one priority level, so send 0 or leave it out"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"priority": False}}, "priority is false"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"horizon": [1]}}, "parameters.horizon is [1]; it should be a string, a number or a boolean"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"x" * 10**4: None}}, f"parameters.{'x' * 89} is null; it should be"),
    ("tiny-lstm", {"inputs": [SERIES], "outputs": [{"name": "mean", "parameters": {"classification": 1}}]}, "has no classes"),
    ("tiny-lstm", {"inputs": [SERIES], "outputs": [{"name": "mean"}, {"name": "mean"}]}, "output 'mean' was sent more than once"),
    ("tiny-lstm", {"inputs": [SERIES], "outputs": [{"name": "mean", "parameters": {"binary_data": "false"}}]}, "binary_data is 'false'; it should be a boolean"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {"binary_data_output": "no"}}, "binary_data_output is 'no'; it should be a boolean"),
    ("tiny-rnn", {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]}], "outputs": [{"name": "log_probabilities", "parameters": {"classification": 0}}]}, "classification is 0; it should be a number"),
    ("tiny-lstm", {"inputs": [SERIES], "parameters": {f"x{i}": None for i in range(5000)}}, "fields; the maximum is 2,000"),
    ("tiny-lstm", {"inputs": [SERIES], "id": 7}, "id is 7"),
    ("tiny-lstm", binary(95, bytes(96)), "unexpected size for input 'values': 95 bytes, expected 96"),
    ("tiny-lstm", binary(95, bytes(96), name="\0" * 200), "(200 characters): 95 bytes, expected 96"),
    ("tiny-lstm", binary(97, bytes(96)), "unexpected size for input 'values'"),
    ("tiny-lstm", binary(96, bytes(97)), "unexpected additional input data: 1 bytes follow"),
    ("tiny-lstm", binary(96, np.full(12, np.inf).tobytes()), "values has inf; allowed values:"),
    ("tiny-lstm", (b"{}", 3), "inference-header-content-length is '3'; the body has 2 bytes"),
    ("tiny-lstm", (b"{}", -1), "inference-header-content-length is '-1'"),
    ("tiny-rnn", binary(7, length_prefixed([b"abc"]), "BYTES", [2], "prompt"), "its data are not 2 strings"),
    ("tiny-rnn", binary(6, length_prefixed([b"abc"])[:6], "BYTES", [1], "prompt"), "its data are not 1 strings"),
    ("tiny-rnn", binary(8, b"\xff\xff\xff\xffabcd", "BYTES", [1], "prompt"), "its data are not 1 strings"),
    ("tiny-rnn", binary(5, length_prefixed([b"\xff"]), "BYTES", [1], "prompt"), "not UTF-8"),
    ("tiny-rnn", binary(17 * 5, length_prefixed([b"a"] * 17), "BYTES", [17], "prompt"), "all inputs together should have 1 to 16 values"),
    ("tiny-gan", binary(16, np.full(4, np.nan, np.float32).tobytes(), "FP32", [1, 4], "latents"), "latents has nan"),
    ("tiny-cnn", binary(3072 * 4, np.full(3072, 256, np.float32).tobytes(), "FP32", [1, 3, 32, 32], "image"), "image has 256.0; pixels are"),
    ("tiny-cnn", {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1], "data": [256]}]}, "inputs.0.data has 256, which no UINT8 can hold"),
    ("tiny-cgan", {"inputs": [{"name": "latents", "datatype": "FP32", "shape": [1, 4], "data": [0] * 4}]}, "input 'classes' is missing"),
    ("tiny-cgan", {"inputs": [{"name": "latents", "datatype": "FP32", "shape": [1, 4], "data": [0] * 4}, {"name": "classes", "datatype": "INT64", "shape": [1], "data": [3]}]}, "classes has 3; allowed values: 0 to 2, or x, y, z"),
    ("tiny-cgan", {"inputs": [{"name": "latents", "datatype": "FP32", "shape": [1, 4], "data": [0] * 4}, {"name": "classes", "datatype": "INT64", "shape": [2], "data": [1, 1]}]}, "the same number in each"),
]  # fmt: skip


def test_a_timeout_may_be_zero_or_any_large_number(tiny: httpx.Client) -> None:
    for timeout in (0, 60_000_000, 2**64, 10**400):
        answer = infer(tiny, "tiny-lstm", {"inputs": [SERIES], "parameters": {"timeout": timeout}})
        assert answer.status_code == 200, answer.text


@pytest.mark.usefixtures("slow")
def test_a_timeout_applies_to_generate_and_generate_stream(serve: Serve) -> None:
    body = {"text_input": "a", "max_characters": 4000, "parameters": {"timeout": 300_000}}
    with serve(inline_seconds=0) as client:
        whole = client.post("/v2/models/tiny-rnn/generate", json=body)
        *_, last = client.post("/v2/models/tiny-rnn/generate_stream", json=body).text.split("data: ")
    message = "the deadline passed before the answer was complete; timeout is in microseconds"
    assert (whole.status_code, whole.json()) == (504, {"error": message})
    assert json.loads(last) == whole.json()


def test_an_empty_list_of_levels_gives_bounds_without_rows(tiny: httpx.Client) -> None:
    answer = infer(tiny, "tiny-lstm", {"inputs": [SERIES], "parameters": {"levels": "", "horizon": 3}}).json()
    assert [output["shape"] for output in answer["outputs"]] == [[1, 3], [1, 0, 3], [1, 0, 3]]


def test_a_prompt_of_commas_does_not_count_as_json_values(tiny: httpx.Client) -> None:
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["," * 5000]}
    answer = infer(tiny, "tiny-rnn", {"inputs": [prompt], "parameters": {"max_characters": 1, "stop": "," * 100}})
    assert answer.status_code == 200, answer.text
    too_long = infer(tiny, "tiny-rnn", {"inputs": [{**prompt, "data": ["," * 110_000]}]})
    assert "the body has 110," in too_long.json()["error"]


def test_oversized_headers_give_431_with_the_protocol_s_schema(tiny: httpx.Client) -> None:
    host, port = address(tiny).split(":")
    with socket.create_connection((host, int(port))) as connection, connection.makefile("rb") as answer:
        connection.sendall(b"GET /v2/models HTTP/1.1\r\nHost: x\r\nX-Long: %s\r\n\r\n" % (b"a" * 70_000))
        content = answer.read()
    assert content.startswith(b"HTTP/1.1 431 ")
    assert list(json.loads(content.partition(b"\r\n\r\n")[2])) == ["error"]


def test_a_full_queue_gives_429_and_a_passed_deadline_504(serve: Serve, faults: dict[str, Fault]) -> None:
    faults["forecast"] = hold = Hold()
    with serve(inline_seconds=0, queue_rows=2) as service, ThreadPoolExecutor(2) as pool:
        hold.armed.set()
        body: dict[str, Any] = {"inputs": [SERIES], "parameters": {"horizon": 7}}
        requests = [pool.submit(infer, service, "tiny-lstm", body)]
        assert hold.entered.wait(30)
        expired = infer(service, "tiny-lstm", {**body, "parameters": {"timeout": 20_000, "horizon": 7}})
        assert (expired.status_code, expired.json()["error"][:19]) == (504, "the deadline passed")

        def infer_until_admitted() -> httpx.Response:
            answers: list[httpx.Response] = []

            def admitted() -> bool:
                answers.append(infer(service, "tiny-lstm", body))
                return answers[-1].status_code != 429

            wait_until(admitted)
            return answers[-1]

        requests.append(pool.submit(infer_until_admitted))
        with triton.InferenceServerClient(address(service)) as client:
            statuses = {"504"}
            while statuses == {"504"}:  # until the second request waits and three more rows do not fit
                with pytest.raises(InferenceServerException) as rejection:
                    client.infer("tiny-lstm", inputs.infer_inputs("tiny-lstm", True), timeout=20_000)
                statuses.add(rejection.value.status())
            assert statuses == {"504", "429"}
            assert "the queue of tiny-lstm@1 is full" in rejection.value.message()
        hold.release.set()
        assert [request.result().status_code for request in requests] == [200, 200]
