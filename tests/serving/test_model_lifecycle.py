"""The life of a version in a running service: tried on a share, loaded on demand, unloaded, half copied, broken."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path

import httpx
import pytest
import torch
from support.networks import TINY, publish_tiny, rewrite_card, rewrite_weights
from support.responses import metric_samples
from support.service import Serve
from support.waiting import wait_until

from app import store
from app.serving.loader import LoadedModel, Loader, LoadFailure
from app.store import rollout
from app.tasks.image_generation import ImageSampler

NAME = "tiny-gan"
SOON = 0.02  # seconds between two looks at the store


def ask(client: httpx.Client, model: str = NAME, request_id: str = "", **headers: str) -> int:
    """The version that answers."""
    more = {"x-request-id": request_id} if request_id else {}
    answer = client.post("/v1/images/sample", json={"count": 1, "model": model}, headers={**headers, **more})
    version: int = answer.raise_for_status().json()["version"]
    return version


def described(client: httpx.Client, name: str = NAME) -> dict[str, object]:
    found: dict[str, object] = client.get(f"/v1/models/{name}").json()
    return found


def test_a_canary_has_its_share_and_a_second_try_the_same_version(serve: Serve, tiny_store: Path) -> None:
    publish_tiny(tiny_store, NAME)
    rollout.activate(tiny_store, NAME, 1)
    with serve(store_poll_seconds=SOON) as client:
        assert {ask(client, request_id=f"r{i}") for i in range(20)} == {1}
        rollout.activate(tiny_store, NAME, 2, share=25)
        wait_until(lambda: described(client)["canary"] == {"version": 2, "share": 25.0})
        first = [ask(client, request_id=f"r{i}") for i in range(200)]
        assert 30 <= first.count(2) <= 70
        assert [ask(client, request_id=f"r{i}") for i in range(40)] == first[:40]
        assert ask(client, f"{NAME}@1", request_id=f"r{first.index(2)}") == 1  # who names a version gets it
        assert {ask(client) for _ in range(60)} == {1, 2}  # without an id of their own, too
        counted = metric_samples(client)
        by_version = [
            counted["quartet_queue_seconds_count", ("model", NAME), ("version", str(number))] for number in (1, 2)
        ]
        assert sum(by_version) == 20 + 200 + 40 + 1 + 60
        assert by_version[1] >= first.count(2)
        rollout.rollback(tiny_store, NAME)
        wait_until(lambda: described(client)["canary"] is None)
        assert {ask(client, request_id=f"r{i}") for i in range(20)} == {1}


def test_what_serves_and_the_version_before_are_in_memory_and_others_come_on_demand(
    serve: Serve, tiny_store: Path
) -> None:
    for _ in range(3):
        publish_tiny(tiny_store, NAME)
    with serve() as client:
        assert (described(client)["versions"], described(client)["loaded"]) == ([1, 2, 3, 4], [3, 4])
        assert client.get(f"/v1/models/{NAME}@1").json()["card"]["version"] == 1  # a card needs no loading
        assert ask(client, f"{NAME}@1") == 1
        assert described(client)["loaded"] == [1, 3, 4]


def test_a_request_waits_for_a_version_that_comes_but_not_past_its_deadline(
    serve: Serve, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        publish_tiny(tiny_store, NAME)
    load, release = Loader.load, threading.Event()

    def held(self: Loader, name: str, number: int, in_background: bool = False) -> LoadedModel | LoadFailure:
        assert not in_background or release.wait(30)
        return load(self, name, number, in_background)

    monkeypatch.setattr(Loader, "load", held)
    with serve() as client:
        body, short = {"count": 1, "model": f"{NAME}@1"}, {"x-request-timeout": "0.05"}
        for _ in range(2):
            late = client.post("/v1/images/sample", json=body, headers=short)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert ask(client) == 3  # the others do not wait
        release.set()
        assert ask(client, f"{NAME}@1") == 1


def test_past_the_limit_what_was_asked_for_longest_ago_is_unloaded(serve: Serve, tiny_store: Path) -> None:
    for _ in range(3):
        publish_tiny(tiny_store, NAME)
    sizes = {
        name: sum(tensor.nbytes for tensor in store.read_version(tiny_store, name, 1).tensors.values()) for name in TINY
    }
    one = ("quartet_loaded_bytes", ("model", NAME), ("version", "1"))
    with serve(model_bytes=sum(sizes.values()) + sizes[NAME]) as client:
        earlier = samplers(1)  # of other tests, where nobody has swept them up
        assert ask(client, f"{NAME}@1") == 1
        assert described(client)["loaded"] == [1, 4]
        assert metric_samples(client)[one] == sizes[NAME]
        assert len(samplers(1)) == len(earlier) + 1
        assert ask(client, f"{NAME}@2") == 2
        assert described(client)["loaded"] == [2, 4]
        assert metric_samples(client)[one] == 0
        assert len(samplers(1)) == len(earlier)  # its memory is free, without a search for cycles
        assert ask(client, f"{NAME}@1") == 1  # and back on demand
        assert described(client)["loaded"] == [1, 4]
        assert ask(client) == 4
    with serve(model_bytes=1) as client:  # what serves by default is there all the same
        assert client.get("/health/ready").json()["models"] == ["tiny-cnn@1", "tiny-gan@4", "tiny-lstm@1", "tiny-rnn@1"]
        assert ask(client, f"{NAME}@2") == 2


def samplers(number: int) -> list[object]:
    """What is left in memory of a version that came on demand."""
    return [one for one in gc.get_objects() if isinstance(one, ImageSampler) and one.card.version == number]


def test_a_half_copied_version_is_served_once_it_is_whole(serve: Serve, tiny_store: Path, tmp_path: Path) -> None:
    publish_tiny(tmp_path / "elsewhere", NAME)
    whole = publish_tiny(tmp_path / "elsewhere", NAME).folder
    weights, copy = (whole / store.WEIGHTS).read_bytes(), tiny_store / NAME / "2"
    with serve(store_poll_seconds=SOON) as client:
        copy.mkdir()
        wait_until(lambda: "card.json cannot be read" in client.get("/health/ready").text)
        (copy / store.CARD).write_bytes((whole / store.CARD).read_bytes())
        (copy / store.WEIGHTS).write_bytes(weights[:200])
        wait_until(lambda: "sha256 is" in client.get("/health/ready").text)
        assert ask(client) == 1
        (copy / store.WEIGHTS).write_bytes(weights)
        wait_until(lambda: ask(client) == 2)
        assert client.get("/health/ready").json()["broken"] == []


def test_a_version_that_cannot_be_loaded_changes_nothing_and_says_why(
    serve: Serve, tiny_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = publish_tiny(tmp_path / "elsewhere", NAME).folder
    rewrite_weights(folder, lambda tensors: tensors["layers.0.bias"].fill_(torch.nan))
    rewrite_card(folder, version=2)
    publish_tiny(tiny_store, "tiny-cnn")
    rollout.activate(tiny_store, "tiny-cnn", 1)
    rewrite_card(tiny_store / "tiny-cnn" / "2", labels=["one"])
    rollout.activate(tiny_store, "tiny-cnn", 2)  # its weights fit: only the service finds out
    with serve(store_poll_seconds=SOON) as client:
        folder.rename(tiny_store / NAME / "2")
        wait_until(lambda: described(client)["broken"] != [])
        (entry,) = described(client)["broken"]  # type: ignore[misc]
        assert entry["reason"] == "tiny-gan/2/model.safetensors: tensor 'layers.0.bias' has 8 values that are not finite, expected none"  # fmt: skip  # noqa: E501
        assert ask(client) == 1
        assert described(client, "tiny-cnn")["active"] == 1
        assert "tiny-cnn@2 is not served: tiny-cnn/2: labels are 1" in caplog.text
        assert "tiny-gan@2 is not served: tiny-gan/2/model.safetensors" in caplog.text


def test_a_version_that_found_no_memory_is_tried_again(
    serve: Serve, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up, tried = ImageSampler.warm_up, list[int]()

    def scarce(sampler: ImageSampler, rows: int) -> None:
        tried.append(sampler.card.version)
        if tried.count(2) == 1:
            raise MemoryError
        warm_up(sampler, rows)

    monkeypatch.setattr("app.serving.loader.RETRY_SECONDS", SOON)
    monkeypatch.setattr(ImageSampler, "warm_up", scarce)
    with serve(store_poll_seconds=SOON) as client:
        publish_tiny(tiny_store, NAME)
        wait_until(lambda: ask(client) == 2)
        assert tried.count(2) == 2
        assert client.get("/health/ready").json()["broken"] == []


def test_a_choice_that_cannot_be_read_changes_nothing_while_serving(serve: Serve, tiny_store: Path) -> None:
    publish_tiny(tiny_store, NAME)
    rollout.activate(tiny_store, NAME, 1)
    file = tiny_store / NAME / rollout.FILE
    with serve(store_poll_seconds=SOON) as client:
        file.write_text("{")
        wait_until(lambda: "tiny-gan/active.json" in client.get("/health/ready").text)
        assert ask(client) == 1
        file.write_text(json.dumps({"active": 2}))
        wait_until(lambda: ask(client) == 2)
        assert client.get("/health/ready").json()["broken"] == []


def test_a_retired_version_finishes_what_it_was_asked(serve: Serve, tiny_store: Path) -> None:
    publish_tiny(tiny_store, "tiny-rnn")
    body = {"prompt": "a", "max_characters": 1500, "n": 16, "stream": True, "model": "tiny-rnn@1"}
    with serve(store_poll_seconds=SOON) as client, client.stream("POST", "/v1/text/continue", json=body) as answer:
        pieces = answer.iter_bytes()
        begun = next(pieces)
        rollout.retire(tiny_store, "tiny-rnn", 1)
        wait_until(lambda: client.get("/v1/models/tiny-rnn@1").status_code == 404)
        content = begun + b"".join(pieces)
    assert content.count(b'"finish_reason":"length"') == 16
