"""The Open Inference Protocol V2 with an unmodified tritonclient: synchronous and asyncio, JSON and binary tensors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from support import tensors as inputs
from support.faults import Fault, Hold
from support.responses import metric_samples, send_raw
from support.service import Serve, address
from support.tensors import INPUTS, SHAPES
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
    assert "statistics" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("tiny-cnn", "1")["versions"] == ["1"]
    assert client.get_model_config("tiny-cnn")["max_batch_size"] >= 3
    assert [entry["name"] for entry in client.get_model_repository_index()] == sorted(INPUTS)


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


@pytest.mark.usefixtures("slow")
def test_a_timeout_applies_to_generate_and_generate_stream(serve: Serve) -> None:
    body = {"text_input": "a", "max_characters": 4000, "parameters": {"timeout": 300_000}}
    with serve(inline_seconds=0) as client:
        whole = client.post("/v2/models/tiny-rnn/generate", json=body)
        *_, last = client.post("/v2/models/tiny-rnn/generate_stream", json=body).text.split("data: ")
    message = "the deadline passed before the answer was complete; timeout is in microseconds"
    assert (whole.status_code, whole.json()) == (504, {"error": message})
    assert json.loads(last) == whole.json()


def test_a_prompt_of_commas_does_not_count_as_json_values(tiny: httpx.Client) -> None:
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["," * 5000]}
    answer = infer(tiny, "tiny-rnn", {"inputs": [prompt], "parameters": {"max_characters": 1, "stop": "," * 100}})
    assert answer.status_code == 200, answer.text
    too_long = infer(tiny, "tiny-rnn", {"inputs": [{**prompt, "data": ["," * 110_000]}]})
    assert "the body has 110," in too_long.json()["error"]


def test_oversized_headers_give_431_with_the_protocol_s_schema(tiny: httpx.Client) -> None:
    content = send_raw(tiny, b"GET /v2/models HTTP/1.1\r\nHost: x\r\nX-Long: %s\r\n\r\n" % (b"a" * 70_000))
    assert content.startswith(b"HTTP/1.1 431 ")
    assert list(json.loads(content.partition(b"\r\n\r\n")[2])) == ["error"]


def test_a_full_queue_gives_429_and_a_passed_deadline_504(serve: Serve, faults: dict[str, Fault]) -> None:
    faults["forecast"] = hold = Hold()
    body: dict[str, Any] = {"inputs": [SERIES], "parameters": {"horizon": 7}}
    with (
        serve(inline_seconds=0, queue_rows=2) as service,
        triton.InferenceServerClient(address(service)) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        hold.armed.set()
        requests = [pool.submit(infer, service, "tiny-lstm", body)]
        assert hold.entered.wait(30)
        requests.append(pool.submit(infer, service, "tiny-lstm", body))
        queued = "quartet_queued_rows", ("model", "tiny-lstm"), ("version", "1")
        wait_until(lambda: metric_samples(service)[queued] == 1)
        expired = infer(service, "tiny-lstm", {**body, "parameters": {"timeout": 20_000, "horizon": 7}})
        assert (expired.status_code, expired.json()["error"][:19]) == (504, "the deadline passed")
        with pytest.raises(InferenceServerException, match="the queue of tiny-lstm@1 is full") as rejection:
            client.infer("tiny-lstm", inputs.infer_inputs("tiny-lstm", True))  # three more rows do not fit
        assert rejection.value.status() == "429"
        hold.release.set()
        assert [request.result().status_code for request in requests] == [200, 200]
