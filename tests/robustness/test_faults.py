"""Networks that hang, raise errors, return wrong rows or NaN, or run out of memory.

Every request gets a response. Only the failing request or model is affected. The readiness endpoint reports the problem
until it is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.images import image_bytes
from support.networks import publish_tiny
from support.responses import metric_samples
from support.service import HeldGenerator, Serve
from support.waiting import wait_until

from app.api.image_decoding import SMALL_BYTES
from app.networks.cnn import LeNet
from app.networks.forecaster import Forecaster
from app.networks.gan import Generator
from app.networks.lstm import SeriesLSTM
from app.settings import Settings
from app.tasks.classification import ImageClassifier
from app.tasks.forecasting import WindowForecaster
from app.tasks.image_generation import ImageSampler
from app.tasks.text_generation import TextGenerator

SERIES = [float(i % 7) for i in range(20)]
REQUESTS: dict[str, tuple[type, str, str, dict[str, Any]]] = {
    "tiny-cnn": (ImageClassifier, "predict", "/v1/images/classify", {"content": image_bytes()}),
    "tiny-rnn": (TextGenerator, "step", "/v1/text/continue", {"json": {"prompt": "abc", "max_characters": 3}}),
    "tiny-lstm": (WindowForecaster, "predict", "/v1/series/forecast", {"json": {"values": SERIES, "horizon": 3}}),
    "tiny-gan": (ImageSampler, "predict", "/v1/images/sample", {"json": {"count": 2, "seed": 1}}),
}

TENSORS: dict[str, dict[str, Any]] = {
    "tiny-cnn": {"name": "image", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": [0] * 3072},
    "tiny-rnn": {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["abc"]},
    "tiny-lstm": {"name": "values", "datatype": "FP64", "shape": [1, 20], "data": SERIES},
    "tiny-gan": {"name": "latents", "datatype": "FP64", "shape": [1, 4], "data": [0.0] * 4},
}


def infer(client: httpx.Client, model: str) -> httpx.Response:
    """Send a valid request to a model through the Open Inference Protocol."""
    return client.post(f"/v2/models/{model}/infer", json={"inputs": [TENSORS[model]]})


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


FAULTS: dict[str, Callable[..., Any]] = {
    "raises an error": raising(RuntimeError("secret")),
    "is out of memory": raising(MemoryError("secret")),
    "is out of memory for a convolution": raising(RuntimeError("could not create a primitive")),
    "is out of the GPU's memory": raising(torch.OutOfMemoryError("CUDA out of memory: secret")),
    "returns no rows": lambda self, items: [],
    "returns too many rows": lambda self, items: [None] * (len(items) + 1),
}
OUT_OF_MEMORY = [fault for name, fault in FAULTS.items() if "memory" in name]


@pytest.mark.parametrize("model", REQUESTS)
def test_requests_to_a_broken_network_get_an_error_until_it_works_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    predictor, method, path, body = REQUESTS[model]
    original, broken = getattr(predictor, method), list[Callable[..., Any]]()
    monkeypatch.setattr(predictor, method, lambda *arguments: broken[0](*arguments) if broken else original(*arguments))
    # Steps return no rows.
    faults = [fault for name, fault in FAULTS.items() if method != "step" or "row" not in name]
    with serve() as client:
        first = client.post(path, **body)
        for fault in faults:
            broken.append(fault)
            assert_all_requests_fail(client, model, out_of_memory=fault in OUT_OF_MEMORY)
            broken.clear()
            assert client.post(path, **body).status_code == first.status_code == 200
            assert client.get("/health/ready").status_code == 200
        assert metric_samples(client)["quartet_failures_total", ("model", model), ("version", "1")] >= 8 * len(faults)


def assert_all_requests_fail(client: httpx.Client, model: str, out_of_memory: bool) -> None:
    """Check that requests to a broken model get a clear error, that only its readiness fails, and that others work."""
    status, code, retry = (503, "out_of_memory", None) if out_of_memory else (500, "inference_failed", "false")
    _, _, path, body = REQUESTS[model]
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
    for name, (_, _, other_path, other_body) in REQUESTS.items():
        assert client.get(f"/v2/models/{name}/ready").status_code == (503 if name in unready else 200)
        assert (client.post(other_path, **other_body).status_code == 200) is (name != model)


@pytest.mark.parametrize(
    ("model", "network", "method"),
    [
        ("tiny-cnn", LeNet, "forward"), ("tiny-gan", Generator, "forward"), ("tiny-lstm", SeriesLSTM, "forward"),
    ],
)  # fmt: skip
def test_nan_or_infinite_outputs_give_500(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, model: str, network: type, method: str
) -> None:
    _, _, path, body = REQUESTS[model]
    forward = getattr(network, method)
    with serve() as client:
        for value in (float("nan"), float("inf")):
            with monkeypatch.context() as patch:
                patch.setattr(network, method, lambda *arguments, value=value: forward(*arguments) * value)
                answer = client.post(path, **body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "inference_failed")
                answer = infer(client, model)
                assert (answer.status_code, answer.json()) == (500, {"error": answer.json()["error"]})
        assert client.post(path, **body).status_code == infer(client, model).status_code == 200


def test_nan_or_infinite_quantiles_give_500(serve: Serve, tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_tiny(tiny_store, "tiny-forecaster")
    forecast, body = Forecaster.forecast, {"values": SERIES, "horizon": 3, "model": "tiny-forecaster"}
    with serve() as client:
        for value in (float("nan"), float("inf")):
            with monkeypatch.context() as patch:
                patch.setattr(Forecaster, "forecast", lambda *arguments, value=value: forecast(*arguments) * value)
                answer = client.post("/v1/series/forecast", json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "inference_failed")
        assert client.post("/v1/series/forecast", json=body).status_code == 200


def test_nan_logits_give_500(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, path, body = REQUESTS["tiny-rnn"]
    with serve() as client:
        steps = type(recurrent_steps())
        logits = steps.logits
        monkeypatch.setattr(steps, "logits", lambda self, outputs: logits(self, outputs) * float("nan"))
        for fields in ({}, {"stream": True}):
            answer = client.post(path, json={**body["json"], **fields})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "inference_failed")
        assert infer(client, "tiny-rnn").status_code == 500
        monkeypatch.undo()
        assert client.post(path, **body).status_code == infer(client, "tiny-rnn").status_code == 200


def recurrent_steps() -> Any:
    from support.networks import TINY

    from app.networks import build

    _, kind, sizes, _ = TINY["tiny-rnn"]
    return build(kind, sizes).for_generation()


def test_one_failing_image_does_not_make_the_service_unready(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = ImageClassifier.predict

    def fail_on_white(self: ImageClassifier, items: Sequence[torch.Tensor]) -> list[list[float]]:
        if any(int(item.min()) == 255 for item in items):
            raise RuntimeError
        return predict(self, items)

    monkeypatch.setattr(ImageClassifier, "predict", fail_on_white)
    from PIL import Image
    from support.images import save_image

    white = save_image(Image.new("RGB", (32, 32), "white"), "PNG")
    with serve() as client:
        for _ in range(5):
            assert client.post("/v1/images/classify", content=white).status_code == 500
            assert client.post("/v1/images/classify", content=image_bytes()).status_code == 200
            assert client.get("/health/ready").status_code == 200


def test_a_hung_network_makes_requests_fail_at_their_deadline_only(serve: Serve, held: HeldGenerator) -> None:
    assert Settings().unready_after_seconds <= 5  # the default value is short enough
    with serve(unready_after_seconds=0.2, inline_seconds=0) as client, ThreadPoolExecutor(12) as pool:
        held.armed.set()

        def send(model: str) -> httpx.Response:
            _, _, path, body = REQUESTS[model]
            return client.post(path, headers={"x-request-timeout": "0.5"}, **body)

        answers = [pool.submit(send, model) for model in REQUESTS for _ in range(3)]
        assert held.entered.wait(30)
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert "has not answered for" in client.get("/health/ready").json()["problems"][0]
        assert client.get("/health/live").status_code == 200  # liveness_timeout_seconds has not passed
        assert {answer.result().status_code for answer in answers} <= {200, 504}
        held.release.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        for _, _, path, body in REQUESTS.values():
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
            return client.post("/v1/images/classify", content=large, headers={"x-request-timeout": "0.5"})

        answers = [pool.submit(classify) for _ in range(Settings().parse_threads)]
        assert {answer.result().status_code for answer in answers} == {504}
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert "the decoding threads have not answered for" in client.get("/health/ready").json()["problems"][0]
        release.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        assert client.post("/v1/images/classify", content=large).status_code == 200
