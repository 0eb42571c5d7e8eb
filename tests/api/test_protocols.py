"""The same request gives the same numbers in each protocol."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support.images import image_bytes


def tensors(client: httpx.Client, name: str, parameters: dict[str, Any], **inputs: tuple[str, Any]) -> dict[str, Any]:
    """Send tensors to a model; return its outputs by name, as arrays."""
    entries = [
        {"name": key, "datatype": datatype, "shape": list(np.shape(values)), "data": np.asarray(values).tolist()}
        for key, (datatype, values) in inputs.items()
    ]
    answer = client.post(f"/v2/models/{name}/infer", json={"inputs": entries, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return {each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in answer.json()["outputs"]}


def test_all_protocols_give_the_same_probabilities(tiny: httpx.Client) -> None:
    content = image_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)[None]
    native = tiny.post("/v1/images/classify?top_k=10", content=content).json()["results"][0]["predictions"]
    for datatype in ("UINT8", "FP32"):
        (probabilities,) = tensors(tiny, "tiny-cnn", {}, image=(datatype, pixels))["probabilities"]
        for prediction in native:
            assert prediction["probability"] == pytest.approx(probabilities[prediction["index"]], abs=1e-7)


def test_all_protocols_give_the_same_text(tiny: httpx.Client) -> None:
    options = {"temperature": 0.9, "seed": 11, "top_k": 5}
    body = {"prompt": "cab", "max_characters": 50, **options}
    native = tiny.post("/v1/text/continue", json=body).json()["results"][0]["text"]
    parameters = {"max_characters": 50, **options}
    completion = {"model": "tiny-rnn", "prompt": "cab", "max_tokens": 50, **options}
    texts = [
        tiny.post("/v1/completions", json=completion).json()["choices"][0]["text"],
        tiny.post("/v1/completions", json={**completion, "logprobs": 2}).json()["choices"][0]["text"],
        tiny.post("/v2/models/tiny-rnn/generate", json={"text_input": "cab", **parameters}).json()["text_output"],
        tensors(tiny, "tiny-rnn", parameters, prompt=("BYTES", ["cab"]))["text"][0],
    ]
    assert texts == [native] * 4


def test_all_protocols_give_the_same_forecast(tiny: httpx.Client) -> None:
    values = np.sin(np.arange(30) / 3).tolist()
    body = {"values": values, "horizon": 7, "levels": [80, 95]}
    native = tiny.post("/v1/series/forecast", json=body).json()["results"][0]
    series = {"type": "univariate_time_series", "series": values, "frequency": "H"}
    options = {"horizon": 7, "quantiles": [0.025, 0.9]}
    answer = tiny.post("/v1/timeseries/forecast", json={"inputs": [series], "options": options}).json()
    (content,) = answer["outputs"][0]["content"]
    outputs = tensors(tiny, "tiny-lstm", {"horizon": 7, "levels": "80,95"}, values=("FP64", [values]))
    assert content["mean_forecast"] == native["mean"] == outputs["mean"][0].tolist()
    assert content["quantiles"]["0.025"] == native["intervals"]["95"]["lower"] == outputs["lower"][0, 1].tolist()
    assert content["quantiles"]["0.9"] == native["intervals"]["80"]["upper"] == outputs["upper"][0, 0].tolist()


def test_all_protocols_give_the_same_images(tiny: httpx.Client) -> None:
    body = {"count": 3, "label": "y", "seed": 8, "model": "tiny-cgan"}
    native = [entry["image"] for entry in tiny.post("/v1/images/sample", json=body).json()["results"]]
    request = {"prompt": "y", "n": 3, "seed": 8, "model": "tiny-cgan"}
    openai = [entry["b64_json"] for entry in tiny.post("/v1/images/generations", json=request).json()["data"]]
    latents = np.random.Generator(np.random.Philox(8)).standard_normal((3, 4))
    images = tensors(tiny, "tiny-cgan", {}, latents=("FP64", latents), classes=("INT64", [1, 1, 1]))["images"]
    assert openai == native
    for image, text in zip(images, native, strict=True):
        assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) == image[0]).all()


def test_a_text_is_the_same_beside_other_requests_and_alone(tiny: httpx.Client) -> None:
    def complete(i: int) -> Any:
        seed, prompt = i // 4, "abcdefghij"[: i % 7 + 1]
        options = (
            {},
            {"logprobs": 3},
            {"logit_bias": {"2": 1.5}},
            {"frequency_penalty": 0.7, "echo": True, "logprobs": 1},
        )
        body = {"prompt": prompt, "max_tokens": 60, "seed": seed, **options[i % 4]}
        (choice,) = tiny.post("/v1/completions", json=body).json()["choices"]
        return choice["text"], choice["logprobs"]

    alone = [complete(i) for i in range(32)]
    with ThreadPoolExecutor(16) as pool:
        concurrent = list(pool.map(complete, range(32)))
    assert [text for text, _ in concurrent] == [text for text, _ in alone]
    assert [logprobs for _, logprobs in concurrent] == [logprobs for _, logprobs in alone]
    assert len({text for text, _ in alone}) > 16
