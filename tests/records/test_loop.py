"""From serving to a better version: requests that differ, drift, labels, a training, a shadow, and its promotion."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from PIL import Image, ImageOps
from support.responses import metric_samples
from support.service import ROOT, serving
from support.waiting import wait_until

from app.settings import Settings
from app.store import Store

NAME, LABELLED, NEW = "digits", 500, 200


def digits(client: httpx.Client, count: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield labels and generated digits, light on a dark ground."""
    for label in map(str, range(10)):
        body = {"model": "mnist-cgan", "count": count // 10, "label": label, "seed": int(label)}
        for row in client.post("/v1/images/sample", json=body).raise_for_status().json()["results"]:
            yield label, Image.open(io.BytesIO(base64.b64decode(row["image"])))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_version_trained_on_captured_requests_replaces_the_old_one(tmp_path: Path) -> None:
    records, folder = tmp_path / "records", tmp_path / "store"
    shutil.copytree(ROOT / "models_store", folder)
    store = Store(folder)

    def quartet(*arguments: object) -> str:
        command = [sys.executable, "-m", "app.cli.quartet", *map(str, arguments)]
        own = {"QUARTET_STORE": str(folder), "QUARTET_RECORDS_FOLDER": str(records)}
        result = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def send(client: httpx.Client, examples: list[tuple[str, bytes]], prefix: str) -> None:
        """Classify images, and give feedback."""
        for number, (_, image) in enumerate(examples):
            head = {"x-request-id": f"{prefix}-{number}"}
            client.post(f"/v1/images/classify?model={NAME}", content=image, headers=head).raise_for_status()
        for number, (label, _) in enumerate(examples):
            body = {"request_id": f"{prefix}-{number}", "label": label}
            wait_until(lambda body=body: client.post("/v1/feedback", json=body).is_success)

    def figures(client: httpx.Client) -> dict[tuple[int, str], Any]:
        return {(row["version"], row["name"]): row for row in client.get("/v1/feedback").json()["data"]}

    def drifted(client: httpx.Client) -> bool:
        samples = metric_samples(client).items()
        return any(value > 1 for (name, *_), value in samples if name == "quartet_drift")

    with serving(Settings(port=0, store=folder)) as client:
        for number, (label, image) in enumerate(digits(client, 1000)):
            (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "images" / label / f"{number}.png")
        examples = [(label, png(ImageOps.invert(image))) for label, image in digits(client, LABELLED + NEW)]
    Random(0).shuffle(examples)
    quartet("train", "cnn", "--images", tmp_path / "images", "--name", NAME, "--minutes", 0.5)
    settings = Settings(port=0, store=folder, records_folder=records, capture=NAME)
    with serving(settings) as client:
        send(client, examples[:LABELLED], "first")
        wait_until(lambda: drifted(client))
        quartet("capture", "export", NAME, tmp_path / "new.csv")
        training = ("cnn", "--images", tmp_path / "new.csv", "--from", NAME, "--name", NAME, "--minutes", 0.5)
        quartet("train", *training, "--no-activate")
        new = max(store.numbers(NAME))
        quartet("models", "shadow", NAME, new)
        wait_until(lambda: new in client.get(f"/v1/models/{NAME}").json()["loaded"])
        send(client, examples[LABELLED:], "second")
        wait_until(lambda: figures(client).get((new, "accuracy"), {}).get("count", 0) > NEW / 2)
        found = figures(client)
        quartet("models", "promote", NAME)
    assert store.roles(NAME).active == new
    before, after = found[1, "accuracy"], found[new, "accuracy"]
    assert before["interval"][1] < after["interval"][0], json.dumps(found[1, "accuracy"])
