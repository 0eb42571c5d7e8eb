"""The service and the trainings on a device other than the CPU.

The device stands in for a GPU. Operators fail if a tensor is on the wrong device, or is read without a copy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.fake_device import fake_device
from support.images import image_bytes
from support.imported.onnx_models import linear_model
from support.networks import SMALL, publish_small
from support.responses import CLASSIFY, CONTINUE, FORECAST, PNG, SAMPLE
from support.service import TEST, serving

from app.cli import models
from app.limits import Limits
from app.networks import KINDS
from app.networks.imported import onnx_runner
from app.settings import Settings
from app.store import Store
from app.tasks import TASKS

PATHS = {"classify": CLASSIFY, "continue": CONTINUE, "forecast": FORECAST, "sample": SAMPLE}
SERIES = [float(i % 7) for i in range(30)]
BODIES: dict[str, list[dict[str, Any]]] = {
    "continue": [
        {"prompt": "abc" * 30, "max_characters": 8, "n": 3, "seed": 1},
        {"prompt": "", "max_characters": 3, "temperature": 0, "seed": 2},
    ],
    "forecast": [{"values": SERIES, "horizon": 9}, {"values": [SERIES[:12], SERIES], "horizon": 2}],
    "sample": [{"count": 20, "seed": 3}],
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Yield the device. Services that the test starts after this compute on it."""
    with fake_device.enabled() as device:
        monkeypatch.setattr("app.serving.models.find_device", lambda name: device)
        monkeypatch.setitem(onnx_runner.PROVIDERS, device.type, "CPUExecutionProvider")
        yield device


def test_tensors_of_two_devices_do_not_mix(device: torch.device) -> None:
    own, cpu = torch.ones(3, device=device), torch.ones(3)
    for compute in (lambda: own + cpu, lambda: cpu[own.long()] + own, own.numpy):
        with pytest.raises((RuntimeError, TypeError), match=r"same device|convert standin:0 device type tensor"):
            compute()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with a network of every kind."""
    tmp_path = tmp_path_factory.mktemp("every-kind")
    folder = tmp_path / "store"
    for kind in SMALL:
        publish_small(folder, kind, kind)
    (tmp_path / "mean.onnx").write_bytes(linear_model()[0].SerializeToString())
    assert models.main(["add", str(tmp_path / "mean.onnx"), "--name", "onnx-mean", "--store", str(folder)]) == 0
    return folder


def answers(client: httpx.Client) -> dict[str, Any]:
    """Return the answers of all models, by model."""
    result: dict[str, Any] = {}
    for kind in SMALL:
        path = PATHS[str(KINDS[kind].task)]
        if KINDS[kind].task == "classify":
            params = {"model": kind, "explain": "true", "top_k": 3}
            responses = [client.post(path, params=params, content=image_bytes(size=(40, 30)))]
        else:
            responses = [client.post(path, json={"model": kind, **body}) for body in BODIES[str(KINDS[kind].task)]]
        if KINDS[kind].task == "continue":
            scored = {"model": kind, "prompt": "abcab", "max_tokens": 3, "echo": True, "logprobs": 2, "seed": 1}
            responses.append(client.post("/v1/completions", json=scored))
        assert {response.status_code for response in responses} == {200}, [response.text for response in responses]
        result[kind] = [response.json() for response in responses]
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [1.0] * 8}
    response = client.post("/v2/models/onnx-mean/infer", json={"inputs": [tensor]})
    return {**result, "onnx-mean": response.raise_for_status().json()}


def assert_close(actual: Any, expected: Any, path: str = "") -> None:
    """Check that two answers are equal, except for ids, times and pictures. Numbers may differ by rounding."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected.keys() - {"id", "created", "explanation", "image"}:
            assert_close(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), path
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_close(*pair, f"{path}[{i}]")
    elif isinstance(expected, float):
        assert math.isclose(actual, expected, rel_tol=1e-3, abs_tol=1e-3), path
    else:
        assert actual == expected, path


def test_every_kind_answers_as_on_the_cpu(store: Path, request: pytest.FixtureRequest) -> None:
    settings = Settings(store=store, tta=True, **TEST)
    with serving(settings) as client:
        expected = answers(client)
    device = request.getfixturevalue("device")
    with serving(settings) as client:
        assert {model.get("device") for model in client.get("/v1/models").json()["data"]} == {str(device)}
        before = fake_device.operators
        actual = answers(client)
        assert fake_device.operators > before
    assert_close(actual, expected)


SINGLE: dict[str, tuple[str, dict[str, Any]]] = {  # requests that are computed alone
    "lenet": (f"{CLASSIFY}?model=lenet", {"content": PNG}),
    "gated-rnn": (CONTINUE, {"json": {"prompt": "abc", "max_characters": 4}}),
    "forecaster": (FORECAST, {"json": {"values": SERIES, "horizon": 4}}),
    "gan-generator": (SAMPLE, {"json": {"count": 3}}),
}


def test_a_failed_kernel_gives_one_error_to_one_caller(store: Path, device: torch.device) -> None:
    def fail_once(error: Exception) -> None:
        def fail(operator: Any) -> None:
            del fake_device.before_operator
            raise error

        fake_device.before_operator = fail  # type: ignore[method-assign]

    with serving(Settings(store=store, **TEST)) as client:

        def request(kind: str, **more: Any) -> tuple[int, str | None]:
            path, body = SINGLE[kind]
            if "json" in body:
                body = {"json": {"model": kind, **body["json"], **more}}
            answer = client.post(path, **body)
            return answer.status_code, answer.json().get("error", {}).get("code")

        for kind in SINGLE:
            assert request(kind) == (200, None), kind
            fail_once(torch.AcceleratorError("CUDA error: unspecified launch failure"))
            assert request(kind) == (500, "inference_failed"), kind
            assert request(kind) == (200, None), kind
            fail_once(torch.OutOfMemoryError("CUDA out of memory"))
            assert request(kind) == (503, "out_of_memory"), kind
            assert request(kind) == (200, None), kind
            assert client.get("/health/ready").status_code == 200, kind
        # The texts of a failed batch are computed again, one by one, and succeed.
        fail_once(torch.AcceleratorError("CUDA error: unspecified launch failure"))
        assert request("gated-rnn", n=3) == (200, None)


def test_a_device_that_keeps_failing_stops_the_process(
    store: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, body = SINGLE["gan-generator"]
    limits = Limits(breaker_reset_seconds=0, recovery_check_seconds=0.01)

    def fail(operator: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with serving(Settings(store=store, **{**TEST, "limits": limits})) as client:
        assert client.post(path, **body).status_code == 200
        fake_device.before_operator = fail  # type: ignore[method-assign]
        statuses = set()
        with contextlib.suppress(httpx.TransportError):
            while True:
                statuses.add(client.post(path, **body).status_code)
        assert statuses <= {500, 503}
        assert 500 in statuses


def test_a_step_of_a_text_reads_the_device_once(store: Path, device: torch.device) -> None:
    """More reads would be slow, because each copy to the CPU waits for the device."""
    for kind in ("character-rnn", "gated-rnn"):
        generator = TASKS["continue"].load(Store(store).read(kind, 1), device)
        generator.warm_up(4)
        texts = generator.dummy_texts(4, 5)
        generator.step(texts)
        before = fake_device.copies_to_cpu
        generator.step(texts)
        assert fake_device.copies_to_cpu == before + 1
