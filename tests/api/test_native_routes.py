"""The four native endpoints with the included networks."""

from __future__ import annotations

import base64
import io
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from support.faults import Fault, Hold
from support.images import decode_image, image_bytes
from support.service import IMAGES, Serve
from support.waiting import wait_until

SINE = [math.sin(20 / 999 * i) for i in range(1000)]


def noisy(start: int, end: int, seed: int = 0) -> list[float]:
    """Return a part of the workshop's series with new noise."""
    generator = random.Random(seed)
    return [value + generator.gauss(0, 0.2) for value in SINE[start:end]]


def test_photos_are_classified_from_a_form_from_bytes_and_from_json(shipped: httpx.Client) -> None:
    files = sorted((IMAGES / "cifar10").glob("*.png"))
    form = shipped.post("/v1/images/classify", files=[("file", (path.name, path.read_bytes())) for path in files])
    answer = form.json()
    assert (answer["model"], answer["version"]) == ("cifar10-whitened", 1)
    assert [result["filename"] for result in answer["results"]] == [path.name for path in files]
    correct = [result["predictions"][0]["label"] == path.stem.split("-")[1] for result, path in
             zip(answer["results"], files, strict=True)]  # fmt: skip
    assert sum(correct) >= 8  # of ten images; the accuracy of the network is about 95%
    first = files[0].read_bytes()
    from_bytes = shipped.post("/v1/images/classify", content=first, headers={"content-type": "image/png"}).json()
    from_json = shipped.post("/v1/images/classify", json={"images": [base64.b64encode(first).decode()]}).json()
    by_default = {"content-type": "application/x-www-form-urlencoded"}  # curl's default
    content = b'\n {"images": ["%b"]}' % base64.b64encode(first)
    from_curl = shipped.post("/v1/images/classify", content=content, headers=by_default).json()
    expected = answer["results"][0]["predictions"]
    for single in (from_bytes, from_json, from_curl):
        assert single["results"][0]["filename"] is None
        for prediction, reference in zip(single["results"][0]["predictions"], expected, strict=True):
            assert prediction["label"] == reference["label"]
            assert prediction["probability"] == pytest.approx(reference["probability"], abs=1e-6)


def test_the_reference_classifier_recognises_digits(shipped: httpx.Client) -> None:
    files = sorted((IMAGES / "mnist").glob("*.png"))
    parts = [("file", (path.name, path.read_bytes())) for path in files]
    answer = shipped.post("/v1/images/classify", params={"model": "mnist-judge", "top_k": 1}, files=parts).json()
    assert [result["predictions"][0]["label"] for result in answer["results"]] == [
        path.stem.split("-")[1] for path in files
    ]


def test_a_seed_reproduces_a_generated_text(shipped: httpx.Client) -> None:
    body = {"prompt": "ROMEO:", "max_characters": 120, "seed": 7}
    answer = shipped.post("/v1/text/continue", json=body).json()
    (result,) = answer["results"]
    assert answer["model"] == "shakespeare-rnn"
    assert len(result["text"]) == 120
    assert (result["finish_reason"], result["seed"]) == ("length", 7)
    assert shipped.post("/v1/text/continue", json=body).json() == answer
    unseeded = shipped.post("/v1/text/continue", json={**body, "seed": None}).json()["results"][0]
    repeated = shipped.post("/v1/text/continue", json={**body, "seed": unseeded["seed"]}).json()["results"][0]
    assert unseeded == repeated


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


def test_image_i_of_a_seed_does_not_depend_on_the_count(shipped: httpx.Client) -> None:
    answer = shipped.post("/v1/images/sample", json={"count": 20, "seed": 3}).json()
    assert (answer["model"], answer["seed"], len(answer["results"])) == ("mnist-cgan", 3, 20)
    for count in (1, 7):
        fewer = shipped.post("/v1/images/sample", json={"count": count, "seed": 3}).json()
        assert fewer["results"] == answer["results"][:count]
    first = decode_image(answer["results"][0]["image"])
    assert (first.shape, first.dtype) == ((28, 28), np.uint8)
    unseeded = shipped.post("/v1/images/sample", json={"count": 2}).json()
    again = shipped.post("/v1/images/sample", json={"count": 2, "seed": unseeded["seed"]}).json()
    assert again == unseeded


def test_an_image_sheet_shows_the_images_of_the_json_answer(shipped: httpx.Client) -> None:
    body = {"count": 5, "seed": 3}
    accept = [("accept", "image/png"), ("accept", "application/json;q=0.5")]  # like one header with both values
    sheet = shipped.post("/v1/images/sample", json=body, headers=accept)
    assert sheet.headers["content-type"] == "image/png"
    assert (sheet.headers["x-model"], sheet.headers["x-seed"]) == ("mnist-cgan@1", "3")
    pixels = np.asarray(Image.open(io.BytesIO(sheet.content)))
    assert pixels.shape == (2 * 30 + 2, 3 * 30 + 2)
    images = [decode_image(entry["image"]) for entry in shipped.post("/v1/images/sample", json=body).json()["results"]]
    assert np.array_equal(pixels[2:30, 2:30], images[0])
    assert np.array_equal(pixels[32:60, 32:60], images[4])


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


def test_an_explanation_has_the_size_of_the_uploaded_image(shipped: httpx.Client) -> None:
    image = Image.open(IMAGES / "cifar10" / "0013-horse.png").resize((200, 150))
    file = io.BytesIO()
    image.save(file, "PNG")
    url, content = "/v1/images/classify", file.getvalue()
    plain = shipped.post(url, content=content).json()["results"][0]
    (explained,) = shipped.post(url, params={"explain": "true"}, content=content).json()["results"]
    explanation = explained.pop("explanation")
    assert [entry["label"] for entry in explained["predictions"]] == [entry["label"] for entry in plain["predictions"]]
    overlay = Image.open(io.BytesIO(base64.b64decode(explanation)))
    assert overlay.size == (200, 150)
    assert "explanation" not in plain
    both = shipped.post(
        url, params={"explain": "1"}, files=[("file", ("a.png", content)), ("file", ("b.png", content))]
    )
    assert [result["explanation"] for result in both.json()["results"]] == [explanation, explanation]


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
