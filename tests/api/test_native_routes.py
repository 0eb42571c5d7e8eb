"""The four native endpoints with the included networks."""

from __future__ import annotations

import base64
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from support.faults import Fault, Hold
from support.images import image_bytes
from support.service import IMAGES, Serve
from support.waiting import wait_until

SINE = [math.sin(20 / 999 * i) for i in range(1000)]


def noisy(start: int, end: int, seed: int = 0) -> list[float]:
    """Return a part of the workshop's series with new noise."""
    generator = random.Random(seed)
    return [value + generator.gauss(0, 0.2) for value in SINE[start:end]]


def test_photos_are_classified(shipped: httpx.Client) -> None:
    files = sorted((IMAGES / "cifar10").glob("*.png"))
    form = shipped.post("/v1/images/classify", files=[("file", (path.name, path.read_bytes())) for path in files])
    labels = [result["predictions"][0]["label"] for result in form.json()["results"]]
    correct = [label == path.stem.split("-")[1] for label, path in zip(labels, files, strict=True)]
    assert sum(correct) >= 8  # of ten images; the accuracy of the network is about 95%


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/text/continue", {"max_characters": 120}), ("/v1/images/sample", {"count": 2})]
)
def test_the_seed_of_an_answer_repeats_it(shipped: httpx.Client, path: str, body: dict[str, int]) -> None:
    answers = [shipped.post(path, json=body).json() for _ in range(2)]
    seeds = [answer.get("seed", answer["results"][0].get("seed")) for answer in answers]
    assert seeds[0] != seeds[1]
    assert shipped.post(path, json={**body, "seed": seeds[0]}).json() == answers[0] != answers[1]


def test_forecasts_follow_a_sine_and_95_percent_intervals_contain_it(shipped: httpx.Client) -> None:
    errors, inside = [], []
    for begin in range(100, 900, 40):
        body = {"values": noisy(begin - 100, begin, begin), "horizon": 50, "levels": [50, 95], "model": "sine-lstm"}
        answer = shipped.post("/v1/series/forecast", json=body).json()
        (result,) = answer["results"]
        errors += [mean - true for mean, true in zip(result["mean"], SINE[begin:], strict=False)]
        bounds = [result["intervals"]["95"][side] for side in ("lower", "upper")]
        actual = noisy(begin, begin + 50, -begin - 1)
        inside += [lower <= value <= upper for lower, value, upper in zip(*[bounds[0], actual, bounds[1]], strict=True)]
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.15
    assert 0.9 < sum(inside) / len(inside) <= 1


def test_generated_digits_are_recognised_as_digits(shipped: httpx.Client) -> None:
    images = shipped.post("/v1/images/sample", json={"count": 64, "seed": 11}).json()["results"]
    labels: set[str] = set()
    confident = 0
    for begin in range(0, 64, 16):
        body = {"images": [entry["image"] for entry in images[begin : begin + 16]]}
        answer = shipped.post("/v1/images/classify?model=mnist-judge&top_k=1", json=body).json()
        best = [result["predictions"][0] for result in answer["results"]]
        labels |= {entry["label"] for entry in best}
        confident += sum(entry["probability"] > 0.8 for entry in best)
    assert len(labels) >= 8
    assert confident >= 45


def test_the_backward_pass_of_an_explanation_does_not_run_on_the_event_loop(
    serve: Serve, faults: dict[str, Fault]
) -> None:
    threads: list[str] = []

    def record_thread(maps: torch.Tensor, *_: Any) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return maps

    faults["classify"] = record_thread
    with serve(inline_seconds=0.05) as client:
        threads.clear()
        client.post("/v1/images/classify?explain=true", content=image_bytes()).raise_for_status()
    assert [name.partition("_")[0] for name in threads] == ["compute"]


def test_a_full_queue_rejects_only_its_own_requests(serve: Serve, faults: dict[str, Fault]) -> None:
    """Classifications and explanations of a model wait in different queues."""
    faults["classify"] = hold = Hold()
    with serve(queue_rows=1, inline_seconds=0) as client, ThreadPoolExecutor(7) as pool:
        hold.armed.set()

        def classify(explain: bool) -> int:
            query = {"explain": explain}
            return client.post("/v1/images/classify", params=query, content=image_bytes()).status_code

        running = pool.submit(classify, False)
        assert hold.entered.wait(30)
        answers = [pool.submit(classify, False) for _ in range(3)]
        wait_until(lambda: sum(answer.done() for answer in answers) == 2)
        explained = pool.submit(classify, True)
        wait_until(lambda: client.get("/health/live").status_code == 200)
        hold.release.set()
        assert [running.result(), explained.result()] == [200, 200]
        assert sorted(answer.result() for answer in answers) == [200, 429, 429]


def test_prompts_are_limited_by_the_time_that_reading_takes(serve: Serve) -> None:
    prompts = ["a" * 15, "b" * 15]
    tensor = {"name": "prompt", "datatype": "BYTES", "shape": [2], "data": prompts}
    with serve(max_prompt_seconds=1e-6) as client:
        for path, problem, body in (
            ("/v1/text/continue", "prompt has 30", {"prompt": "a" * 30}),
            ("/v1/completions", "prompt has 15", {"prompt": prompts}),
            ("/v2/models/tiny-rnn/generate", "text_input has 30", {"text_input": "a" * 30}),
            ("/v2/models/tiny-rnn/infer", "prompt has 15", {"inputs": [tensor]}),
        ):
            answer = client.post(path, json=body)
            error = answer.json()["error"]
            message = error if path.startswith("/v2") else error["message"]
            assert (answer.status_code, message.partition(", which")[0]) == (400, f"{problem} characters")
            assert path.startswith("/v2") or error["param"] == "prompt"


def test_large_base64_is_decoded_in_parts(tiny: httpx.Client) -> None:
    photo = random.Random(0).randbytes(2**20)  # not compressible, and longer than a part when it is in base64
    image = image_bytes(size=(32, 32)) + photo
    text = base64.b64encode(image).decode()
    answers = [
        tiny.post("/v1/images/classify?model=tiny-cnn", **body)
        for body in ({"content": image}, {"json": {"images": [text]}})
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    part = "A" * (2**20 - 4)
    for wrong in (f"{part}QQ==QQ==", f"{text[:-1]}", f"{part}QUFB\nQQ=", f"{text}é"):
        answer = tiny.post("/v1/images/classify?model=tiny-cnn", json={"images": [wrong]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (415, "images.0")
        assert "it should be an image file in base64" in answer.json()["error"]["message"]
