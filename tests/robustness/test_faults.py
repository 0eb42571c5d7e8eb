"""A network that hangs, raises, gives too few rows or no numbers, or runs out of memory: everybody is answered, the
guilty one alone is told, readiness says so, and it is over when it is over.
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

from app.engine import circuit_breaker
from app.networks.cnn import LeNet
from app.networks.forecaster import Forecaster
from app.networks.gan import Generator
from app.networks.lstm import SeriesLSTM
from app.settings import Settings
from app.tasks.classification import ImageClassifier
from app.tasks.forecasting import WindowForecaster
from app.tasks.image_generation import ImageSampler
from app.tasks.text_generation import TextGenerator

LINE = [float(i % 7) for i in range(20)]
ASKED: dict[str, tuple[type, str, str, dict[str, Any]]] = {
    "tiny-cnn": (ImageClassifier, "predict", "/v1/images/classify", {"content": image_bytes()}),
    "tiny-rnn": (TextGenerator, "step", "/v1/text/continue", {"json": {"prompt": "abc", "max_characters": 3}}),
    "tiny-lstm": (WindowForecaster, "predict", "/v1/series/forecast", {"json": {"values": LINE, "horizon": 3}}),
    "tiny-gan": (ImageSampler, "predict", "/v1/images/sample", {"json": {"count": 2, "seed": 1}}),
}

TENSORS: dict[str, dict[str, Any]] = {
    "tiny-cnn": {"name": "image", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": [0] * 3072},
    "tiny-rnn": {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["abc"]},
    "tiny-lstm": {"name": "values", "datatype": "FP64", "shape": [1, 20], "data": LINE},
    "tiny-gan": {"name": "latents", "datatype": "FP64", "shape": [1, 4], "data": [0.0] * 4},
}


def infer(client: httpx.Client, model: str) -> httpx.Response:
    """The same by the Open Inference Protocol."""
    return client.post(f"/v2/models/{model}/infer", json={"inputs": [TENSORS[model]]})


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


FAULTS: dict[str, Callable[..., Any]] = {
    "raises": raising(RuntimeError("secret")),
    "is out of memory": raising(MemoryError("secret")),
    "is out of the GPU's memory": raising(torch.OutOfMemoryError("CUDA out of memory: secret")),
    "gives no rows": lambda self, items: [],
    "gives a row too many": lambda self, items: [None] * (len(items) + 1),
}


@pytest.mark.parametrize("model", ASKED)
def test_every_caller_of_a_broken_network_is_told_and_recovers_with_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    predictor, method, path, asked = ASKED[model]
    works, broken = getattr(predictor, method), list[Callable[..., Any]]()
    monkeypatch.setattr(predictor, method, lambda *given: broken[0](*given) if broken else works(*given))
    faults = [fault for told, fault in FAULTS.items() if method != "step" or "row" not in told]  # a step gives nothing
    with serve() as client:
        good = client.post(path, **asked)
        for fault in faults:
            broken.append(fault)
            all_are_told(client, model)
            broken.clear()
            assert client.post(path, **asked).status_code == good.status_code == 200
            assert client.get("/health/ready").status_code == 200
        assert metric_samples(client)["quartet_failures_total", ("model", model), ("version", "1")] >= 8 * len(faults)


def all_are_told(client: httpx.Client, model: str) -> None:
    """Callers of a broken model are told of it and of nothing inside, readiness is off, and the others are served."""
    _, _, path, asked = ASKED[model]
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda _: client.post(path, **asked), range(8)))
    for answer in answers:
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "inference_failed"
        assert answer.headers["x-should-retry"] == "false"
        assert "secret" not in answer.text
    ready = client.get("/health/ready")
    assert (ready.status_code, ready.json()["problems"]) == (503, [f"{model}@1 fails on every input"])
    for name, (_, _, other, body) in ASKED.items():
        assert (client.post(other, **body).status_code == 200) is (name != model)


@pytest.mark.parametrize(
    ("model", "network", "method"),
    [
        ("tiny-cnn", LeNet, "forward"), ("tiny-gan", Generator, "forward"), ("tiny-lstm", SeriesLSTM, "forward"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_no_answer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, model: str, network: type, method: str
) -> None:
    _, _, path, asked = ASKED[model]
    forward = getattr(network, method)
    with serve() as client:
        for value in (float("nan"), float("inf")):
            with monkeypatch.context() as broken:
                broken.setattr(network, method, lambda *given, value=value: forward(*given) * value)
                answer = client.post(path, **asked)
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "inference_failed")
                answer = infer(client, model)
                assert (answer.status_code, answer.json()) == (500, {"error": answer.json()["error"]})
        assert client.post(path, **asked).status_code == infer(client, model).status_code == 200


def test_quantiles_that_are_no_numbers_are_no_forecast(
    serve: Serve, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(tiny_store, "tiny-forecaster")
    forecast, body = Forecaster.forecast, {"values": LINE, "horizon": 3, "model": "tiny-forecaster"}
    with serve() as client:
        for value in (float("nan"), float("inf")):
            with monkeypatch.context() as broken:
                broken.setattr(Forecaster, "forecast", lambda *given, value=value: forecast(*given) * value)
                answer = client.post("/v1/series/forecast", json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "inference_failed")
        assert client.post("/v1/series/forecast", json=body).status_code == 200


def test_logits_that_are_no_numbers_are_no_text(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, path, asked = ASKED["tiny-rnn"]
    with serve() as client:
        steps = type(client_steps())
        logits = steps.logits
        monkeypatch.setattr(steps, "logits", lambda self, above: logits(self, above) * float("nan"))
        for more in ({}, {"stream": True}):
            answer = client.post(path, json={**asked["json"], **more})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "inference_failed")
        assert infer(client, "tiny-rnn").status_code == 500
        monkeypatch.undo()
        assert client.post(path, **asked).status_code == infer(client, "tiny-rnn").status_code == 200


def client_steps() -> Any:
    from support.networks import TINY

    from app.networks import build

    _, kind, sizes, _ = TINY["tiny-rnn"]
    return build(kind, sizes).steps()


def test_one_guilty_image_does_not_make_a_service_unready(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = ImageClassifier.predict

    def fails_on_white(self: ImageClassifier, items: Sequence[torch.Tensor]) -> list[list[float]]:
        if any(int(item.min()) == 255 for item in items):
            raise RuntimeError
        return predict(self, items)

    monkeypatch.setattr(ImageClassifier, "predict", fails_on_white)
    from PIL import Image
    from support.images import save_image

    white = save_image(Image.new("RGB", (32, 32), "white"), "PNG")
    with serve() as client:
        for _ in range(5):
            assert client.post("/v1/images/classify", content=white).status_code == 500
            assert client.post("/v1/images/classify", content=image_bytes()).status_code == 200
            assert client.get("/health/ready").status_code == 200


def test_a_process_that_gets_no_requests_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(circuit_breaker.time, "monotonic", lambda: now[0])
    found = circuit_breaker.CircuitBreaker()
    for expected in (False, False, True):
        found.record_failure()
        assert found.is_open() is expected
    now[0] += circuit_breaker.RESET_SECONDS
    assert not found.is_open()
    found.record_failure()
    assert found.is_open()
    found.record_failure()
    assert found.failed_recoveries == 1
    found.record_success()
    assert not found.is_open()
    assert found.failed_recoveries == 0


def test_a_hung_network_costs_its_callers_their_deadline_and_nothing_else(serve: Serve, held: HeldGenerator) -> None:
    assert Settings().unready_after_seconds <= 5  # the truth within five seconds, by default
    with serve(unready_after_seconds=0.2, inline_seconds=0) as client, ThreadPoolExecutor(12) as callers:
        held.armed.set()

        def ask(model: str) -> httpx.Response:
            _, _, path, asked = ASKED[model]
            return client.post(path, headers={"x-request-timeout": "0.5"}, **asked)

        answers = [callers.submit(ask, model) for model in ASKED for _ in range(3)]
        assert held.entered.wait(30)
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert "has not answered for" in client.get("/health/ready").json()["problems"][0]
        assert client.get("/health/live").status_code == 200  # not yet hung for so long that a restart is due
        assert {answer.result().status_code for answer in answers} <= {200, 504}
        held.release.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        for _, _, path, asked in ASKED.values():
            assert client.post(path, **asked).status_code == 200


def test_hung_decoding_threads_turn_readiness_off_after_their_callers_have_left(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, decode = threading.Event(), ImageClassifier.decode

    def hang(self: ImageClassifier, *arguments: Any) -> torch.Tensor:
        assert release.wait(60)
        return decode(self, *arguments)

    monkeypatch.setattr(ImageClassifier, "decode", hang)
    large = image_bytes(size=(1000, 1000))
    with serve(unready_after_seconds=0.2) as client, ThreadPoolExecutor(2) as callers:

        def classify() -> httpx.Response:
            return client.post("/v1/images/classify", content=large, headers={"x-request-timeout": "0.1"})

        answers = [callers.submit(classify) for _ in range(Settings().parse_threads)]
        assert {answer.result().status_code for answer in answers} == {504}
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert "the decoding threads have not answered for" in client.get("/health/ready").json()["problems"][0]
        release.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        assert client.post("/v1/images/classify", content=large).status_code == 200
