"""Networks that hang, raise errors, return wrong rows or NaN, or run out of memory.

Every request gets a response. Only the failing request or model is affected. The readiness endpoint reports the problem
until it is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from support.faults import Fault, Hold, raising
from support.images import image_bytes, save_image
from support.networks import publish_tiny
from support.responses import CLASSIFY, CONTINUE, FORECAST, PNG, SAMPLE, SERIES, metric_samples
from support.service import Serve
from support.waiting import wait_until

from app.api.routes.classify import SMALL_BYTES
from app.limits import Limits
from app.tasks.classification import ImageClassifier

REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {  # task, path and body
    "tiny-cnn": ("classify", CLASSIFY, {"content": PNG}),
    "tiny-rnn": ("continue", CONTINUE, {"json": {"prompt": "abc", "max_characters": 3}}),
    "tiny-lstm": ("forecast", FORECAST, {"json": {"values": SERIES, "horizon": 3}}),
    "tiny-gan": ("sample", SAMPLE, {"json": {"count": 2, "seed": 1}}),
}

TENSORS: dict[str, dict[str, Any]] = {
    "tiny-cnn": {"name": "image", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": [0] * 3072},
    "tiny-rnn": {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["abc"]},
    "tiny-lstm": {"name": "values", "datatype": "FP64", "shape": [1, 20], "data": SERIES},
    "tiny-gan": {"name": "latents", "datatype": "FP64", "shape": [1, 4], "data": [0.0] * 4},
}


OUT_OF_MEMORY = [
    raising(MemoryError("secret")),
    raising(RuntimeError("could not create a primitive")),
    raising(torch.OutOfMemoryError("CUDA out of memory: secret")),
]
FAULTS: list[Fault] = [raising(RuntimeError("secret")), *OUT_OF_MEMORY]
WRONG_ROWS: list[Fault] = [lambda outputs, *_: outputs[:0], lambda outputs, *_: torch.cat([outputs, outputs])]


def test_requests_to_a_broken_network_get_an_error_until_it_works_again(serve: Serve, faults: dict[str, Fault]) -> None:
    with serve() as client:
        for model, (task, path, body) in REQUESTS.items():
            kinds = FAULTS + WRONG_ROWS * (task == "classify")
            assert client.post(path, **body).status_code == 200
            for fault in kinds:
                faults[task] = fault
                assert_all_requests_fail(client, model, out_of_memory=fault in OUT_OF_MEMORY)
                del faults[task]
                assert client.post(path, **body).status_code == 200
                assert client.get("/health/ready").status_code == 200
            failures = metric_samples(client)["quartet_failures_total", ("model", model), ("version", "1")]
            assert failures >= 8 * len(kinds)


def assert_all_requests_fail(client: httpx.Client, model: str, out_of_memory: bool) -> None:
    """Check that requests to a broken model get a clear error, that only its readiness fails, and that others work."""
    status, code, retry = (503, "out_of_memory", None) if out_of_memory else (500, "inference_failed", "false")
    _, path, body = REQUESTS[model]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post(path, **body), range(8)))
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers.get("x-should-retry") == retry
        assert answer.headers.get("retry-after") == ("1" if out_of_memory else None)
        assert "secret" not in answer.text
    ready = client.get("/health/ready")
    unready = [] if out_of_memory else [model]  # without enough memory, a smaller request may succeed
    assert ready.json()["problems"] == [f"{name}@1 fails on every input" for name in unready]
    assert ready.status_code == (503 if unready else 200)
    for name, (_, other_path, other_body) in REQUESTS.items():
        assert client.get(f"/v2/models/{name}/ready").status_code == (503 if name in unready else 200)
        assert (client.post(other_path, **other_body).status_code == 200) is (name != model)


def test_nan_or_infinite_outputs_give_500(serve: Serve, tiny_store: Path, faults: dict[str, Fault]) -> None:
    publish_tiny(tiny_store, "tiny-forecaster")
    with serve() as client:
        series = partial(client.post, FORECAST, json={"values": SERIES, "model": "tiny-forecaster"})
        stream = partial(client.post, CONTINUE, json={"prompt": "abc", "stream": True})
        requests: list[tuple[str, Callable[[], httpx.Response]]] = [("forecast", series), ("continue", stream)]
        for model, (task, path, body) in REQUESTS.items():
            requests.append((task, partial(client.post, path, **body)))
            requests.append(
                (task, partial(client.post, f"/v2/models/{model}/infer", json={"inputs": [TENSORS[model]]}))
            )
        for task, send in requests:
            for value in (float("nan"), float("inf")):
                faults[task] = lambda outputs, *_, value=value: outputs * value
                answer = send()
                error = answer.json()["error"]
                assert answer.status_code == 500
                assert isinstance(error, str) or error["code"] == "inference_failed"
                del faults[task]
                assert send().status_code == 200


def test_one_failing_image_does_not_make_the_service_unready(serve: Serve, faults: dict[str, Fault]) -> None:
    def fail_on_white(maps: torch.Tensor, _: object, pixels: torch.Tensor) -> torch.Tensor:
        if any(int(image.min()) == 255 for image in pixels):
            raise RuntimeError
        return maps

    faults["classify"] = fail_on_white
    white = save_image(Image.new("RGB", (32, 32), "white"), "PNG")
    with serve() as client:
        for _ in range(5):
            assert client.post(CLASSIFY, content=white).status_code == 500
            assert client.post(CLASSIFY, content=PNG).status_code == 200
            assert client.get("/health/ready").status_code == 200


def test_a_hung_network_makes_requests_fail_at_their_deadline_only(serve: Serve, held: Hold) -> None:
    assert Limits().unready_after_seconds <= 5  # the default value is short enough
    with serve(unready_after_seconds=0.2, inline_seconds=0) as client, ThreadPoolExecutor(12) as pool:
        held.armed.set()

        def send(model: str) -> httpx.Response:
            _, path, body = REQUESTS[model]
            return client.post(path, headers={"x-request-timeout": "0.6"}, **body)

        answers = [pool.submit(send, "tiny-gan")]
        assert held.entered.wait(30)
        answers += [pool.submit(send, model) for model in REQUESTS for _ in range(3)]
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert "has not answered for" in client.get("/health/ready").json()["problems"][0]
        assert client.get("/health/live").status_code == 200  # liveness_timeout_seconds has not passed
        # All models have the same thread. Their requests end at their own deadline.
        assert {answer.result().status_code for answer in answers} == {504}
        held.release.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        for _, path, body in REQUESTS.values():
            assert client.post(path, **body).status_code == 200


def test_hung_decoding_threads_turn_readiness_off_after_their_clients_left(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, decode = threading.Event(), ImageClassifier.decode

    def hang(self: ImageClassifier, *arguments: Any) -> torch.Tensor:
        assert release.wait(60)
        return decode(self, *arguments)

    monkeypatch.setattr(ImageClassifier, "decode", hang)
    large = image_bytes(size=(120, 120))
    assert len(large) > SMALL_BYTES  # smaller files are decoded on the event loop
    with serve(unready_after_seconds=0.2) as client, ThreadPoolExecutor(2) as pool:

        def classify() -> httpx.Response:
            return client.post(CLASSIFY, content=large, headers={"x-request-timeout": "0.5"})

        answers = [pool.submit(classify) for _ in range(Limits().parse_threads)]
        assert {answer.result().status_code for answer in answers} == {504}
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert "the decoding threads have not answered for" in client.get("/health/ready").json()["problems"][0]
        release.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        assert client.post(CLASSIFY, content=large).status_code == 200
