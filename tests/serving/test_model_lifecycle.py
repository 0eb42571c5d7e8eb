"""Versions in a running service: canary, loading on demand, eviction, partial copies, damaged files."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path

import httpx
import pytest
from support.networks import TINY, make_invalid, publish_tiny, rewrite_card
from support.responses import metric_samples
from support.service import Serve
from support.waiting import wait_until

from app import store
from app.serving.model import Loader, LoadFailure, Model
from app.store import Store, rollout
from app.tasks.image_generation import ImageSampler

NAME = "tiny-gan"
POLL_SECONDS = 0.02  # time between two scans of the store


def answering_version(client: httpx.Client, model: str = NAME, request_id: str = "", **headers: str) -> int:
    """Send an image request; return the version that answers it."""
    id_header = {"x-request-id": request_id} if request_id else {}
    answer = client.post("/v1/images/sample", json={"count": 1, "model": model}, headers={**headers, **id_header})
    version: int = answer.raise_for_status().json()["version"]
    return version


def model_entry(client: httpx.Client, name: str = NAME) -> dict[str, object]:
    entry: dict[str, object] = client.get(f"/v1/models/{name}").json()
    return entry


def test_a_canary_gets_its_share_and_a_repeated_request_the_same_version(serve: Serve, tiny_store: Path) -> None:
    publish_tiny(tiny_store, NAME)
    Store(tiny_store).activate(NAME, 1)
    with serve(store_poll_seconds=POLL_SECONDS) as client:
        assert {answering_version(client, request_id=f"r{i}") for i in range(20)} == {1}
        Store(tiny_store).activate(NAME, 2, share=25)
        wait_until(lambda: model_entry(client)["canary"] == {"version": 2, "share": 25.0})
        first = [answering_version(client, request_id=f"r{i}") for i in range(200)]
        assert 30 <= first.count(2) <= 70
        assert [answering_version(client, request_id=f"r{i}") for i in range(40)] == first[:40]
        assert (
            answering_version(client, f"{NAME}@1", request_id=f"r{first.index(2)}") == 1
        )  # a version that the request names is used in any case
        assert {answering_version(client) for _ in range(60)} == {1, 2}  # requests without request ids are divided, too
        samples = metric_samples(client)
        by_version = [
            samples["quartet_queue_seconds_count", ("model", NAME), ("version", str(number))] for number in (1, 2)
        ]
        assert sum(by_version) == 20 + 200 + 40 + 1 + 60
        assert by_version[1] >= first.count(2)
        for _ in range(6):  # without a version, not that of a random version
            rows = client.get(f"/v2/models/{NAME}/stats").raise_for_status().json()["model_stats"]
            assert [row["version"] for row in rows] == ["1", "2"]
        Store(tiny_store).rollback(NAME)
        wait_until(lambda: model_entry(client)["canary"] is None)
        assert {answering_version(client, request_id=f"r{i}") for i in range(20)} == {1}


def test_the_active_and_previous_version_are_in_memory_and_others_load_on_demand(
    serve: Serve, tiny_store: Path
) -> None:
    for _ in range(3):
        publish_tiny(tiny_store, NAME)
    with serve() as client:
        assert (model_entry(client)["versions"], model_entry(client)["loaded"]) == ([1, 2, 3, 4], [4])
    Store(tiny_store).activate(NAME, 3)
    with serve() as client:
        assert (model_entry(client)["versions"], model_entry(client)["loaded"]) == ([1, 2, 3, 4], [3, 4])
        assert client.get(f"/v1/models/{NAME}@1").json()["card"]["version"] == 1  # a card needs no loading
        assert answering_version(client, f"{NAME}@1") == 1
        assert model_entry(client)["loaded"] == [1, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
@pytest.mark.parametrize("normal", [0, 15])
def test_only_the_loading_thread_has_a_low_priority(
    serve: Serve, tiny_store: Path, monkeypatch: pytest.MonkeyPatch, normal: int
) -> None:
    """Threads of a shared pool would keep the low priority, and would later serve requests with it.

    Only root could raise the priority again.
    """
    publish_tiny(tiny_store, NAME)
    publish_tiny(tiny_store, NAME)
    changed: dict[int, int] = {}  # niceness by thread
    monkeypatch.setattr(os, "getpriority", lambda which, thread: normal)
    monkeypatch.setattr(os, "setpriority", lambda which, thread, niceness: changed.update({thread: niceness}))
    with serve() as client:
        assert answering_version(client, f"{NAME}@1") == 1
        assert client.get(f"/v1/models/{NAME}").status_code == 200
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
    assert [(names[thread], niceness) for thread, niceness in changed.items()] == [("load_0", max(normal, 10))]


def test_a_request_waits_for_a_loading_version_until_its_deadline(
    serve: Serve, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        publish_tiny(tiny_store, NAME)
    load, release = Loader.load, threading.Event()

    def wait_and_load(self: Loader, name: str, number: int, in_background: bool = False) -> Model | LoadFailure:
        assert not in_background or release.wait(30)
        return load(self, name, number, in_background)

    monkeypatch.setattr(Loader, "load", wait_and_load)
    with serve() as client:
        body, short = {"count": 1, "model": f"{NAME}@1"}, {"x-request-timeout": "0.05"}
        for _ in range(2):
            late = client.post("/v1/images/sample", json=body, headers=short)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answering_version(client) == 3  # other requests do not wait
        release.set()
        assert answering_version(client, f"{NAME}@1") == 1


def test_clients_cannot_load_every_version_or_evict_versions_in_use(
    serve: Serve, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        publish_tiny(tiny_store, NAME)
    Store(tiny_store).activate(NAME, 5)
    Store(tiny_store).activate(NAME, 6)
    with serve(max_on_demand_versions=2) as client:
        assert [answering_version(client, f"{NAME}@{number}") for number in (1, 2, 1)] == [1, 2, 1]
        rejected = client.post("/v1/images/sample", json={"count": 1, "model": f"{NAME}@3"})
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (429, "too_many_versions")
        assert 1 <= int(rejected.headers["retry-after"]) <= 10
        assert model_entry(client)["loaded"] == [1, 2, 5, 6]
        assert answering_version(client, f"{NAME}@5") == 5  # the previous version is always in memory
        monkeypatch.setattr("app.serving.reconcile.IN_USE_SECONDS", 0.0)
        assert answering_version(client, f"{NAME}@3") == 3
        assert model_entry(client)["loaded"] == [1, 3, 5, 6]
    monkeypatch.undo()
    with serve(max_on_demand_versions=0) as client:
        rejected = client.post("/v1/images/sample", json={"count": 1, "model": f"{NAME}@3"})
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (429, "too_many_versions")


def test_beyond_the_memory_limit_a_version_in_use_is_not_evicted(serve: Serve, tiny_store: Path) -> None:
    for _ in range(3):
        publish_tiny(tiny_store, NAME)
    with serve(model_bytes=weights_bytes(tiny_store, *TINY, NAME) - 1) as client:  # the previous version does not fit
        assert answering_version(client, f"{NAME}@1") == 1
        rejected = client.post("/v1/images/sample", json={"count": 1, "model": f"{NAME}@2"})
        assert rejected.status_code == 429
        assert model_entry(client)["loaded"] == [1, 4]


def weights_bytes(folder: Path, *names: str) -> int:
    versions = [Store(folder).read(name, 1) for name in names]
    return sum(tensor.nbytes for version in versions for tensor in version.tensors.values())


def test_beyond_the_memory_limit_the_least_recently_used_version_is_evicted(
    serve: Serve, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.serving.reconcile.IN_USE_SECONDS", 0.0)
    for _ in range(3):
        publish_tiny(tiny_store, NAME)
    sizes = {name: sum(tensor.nbytes for tensor in Store(tiny_store).read(name, 1).tensors.values()) for name in TINY}
    loaded_bytes = ("quartet_loaded_bytes", ("model", NAME), ("version", "1"))
    with serve(model_bytes=sum(sizes.values()) + sizes[NAME]) as client:
        baseline = samplers_in_memory(1)  # samplers that other tests left in memory
        assert answering_version(client, f"{NAME}@1") == 1
        assert model_entry(client)["loaded"] == [1, 4]
        assert metric_samples(client)[loaded_bytes] == sizes[NAME]
        assert len(samplers_in_memory(1)) == len(baseline) + 1
        assert answering_version(client, f"{NAME}@2") == 2
        assert model_entry(client)["loaded"] == [2, 4]
        assert metric_samples(client)[loaded_bytes] == 0
        assert len(samplers_in_memory(1)) == len(baseline)  # its memory is freed without garbage collection
        assert answering_version(client, f"{NAME}@1") == 1  # loaded again on demand
        assert model_entry(client)["loaded"] == [1, 4]
        assert answering_version(client) == 4
    with serve(model_bytes=1) as client:  # default models stay in memory at any limit
        assert client.get("/health/ready").json()["models"] == ["tiny-cnn@1", "tiny-gan@4", "tiny-lstm@1", "tiny-rnn@1"]
        assert answering_version(client, f"{NAME}@2") == 2


def samplers_in_memory(number: int) -> list[object]:
    """Return the image samplers in memory that belong to a version number."""
    return [item for item in gc.get_objects() if isinstance(item, ImageSampler) and item.card.version == number]


def test_a_partly_copied_version_is_served_once_it_is_complete(serve: Serve, tiny_store: Path, tmp_path: Path) -> None:
    publish_tiny(tmp_path / "elsewhere", NAME)
    original = publish_tiny(tmp_path / "elsewhere", NAME).folder
    weights, copy = (original / store.WEIGHTS).read_bytes(), tiny_store / NAME / "2"
    with serve(store_poll_seconds=POLL_SECONDS) as client:
        copy.mkdir()
        wait_until(lambda: "card.json cannot be read" in client.get("/health/ready").text)
        (copy / store.CARD).write_bytes((original / store.CARD).read_bytes())
        (copy / store.WEIGHTS).write_bytes(weights[:200])
        wait_until(lambda: "sha256 is" in client.get("/health/ready").text)
        assert answering_version(client) == 1
        (copy / store.WEIGHTS).write_bytes(weights)
        wait_until(lambda: answering_version(client) == 2)
        assert client.get("/health/ready").json()["failed"] == []


def test_a_version_that_cannot_be_loaded_changes_nothing_and_is_reported(
    serve: Serve, tiny_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = publish_tiny(tmp_path / "elsewhere", NAME).folder
    make_invalid(folder)
    rewrite_card(folder, version=2)
    publish_tiny(tiny_store, "tiny-cnn")
    Store(tiny_store).activate("tiny-cnn", 1)
    rewrite_card(tiny_store / "tiny-cnn" / "2", labels=["one"])
    Store(tiny_store).activate("tiny-cnn", 2)  # the weights fit the network, so activation does not find the error
    with serve(store_poll_seconds=POLL_SECONDS) as client:
        folder.rename(tiny_store / NAME / "2")
        wait_until(lambda: model_entry(client)["failed"] != [])
        (entry,) = model_entry(client)["failed"]  # type: ignore[misc]
        assert entry["reason"] == "tiny-gan/2/model.safetensors: tensor 'layers.0.bias' has 8 non-finite values, expected none"  # fmt: skip  # noqa: E501
        assert answering_version(client) == 1
        assert model_entry(client, "tiny-cnn")["active"] == 1
        assert "tiny-cnn@2 is not served: tiny-cnn@2: there are 1 labels" in caplog.text
        assert "tiny-gan@2 is not served: tiny-gan/2/model.safetensors" in caplog.text


def test_a_version_that_failed_for_lack_of_memory_is_loaded_again(
    serve: Serve, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up, warmed_up = ImageSampler.warm_up, list[int]()

    def fail_once(sampler: ImageSampler, rows: int) -> None:
        warmed_up.append(sampler.card.version)
        if warmed_up.count(2) == 1:
            raise MemoryError
        warm_up(sampler, rows)

    monkeypatch.setattr("app.serving.model.RETRY_SECONDS", POLL_SECONDS)
    monkeypatch.setattr(ImageSampler, "warm_up", fail_once)
    with serve(store_poll_seconds=POLL_SECONDS) as client:
        publish_tiny(tiny_store, NAME)
        wait_until(lambda: answering_version(client) == 2)
        assert warmed_up.count(2) == 2
        assert client.get("/health/ready").json()["failed"] == []


def test_an_unreadable_rollout_file_changes_nothing_while_serving(serve: Serve, tiny_store: Path) -> None:
    publish_tiny(tiny_store, NAME)
    Store(tiny_store).activate(NAME, 1)
    file = tiny_store / NAME / rollout.FILE
    with serve(store_poll_seconds=POLL_SECONDS) as client:
        file.write_text("{")
        wait_until(lambda: "tiny-gan/active.json" in client.get("/health/ready").text)
        assert answering_version(client) == 1
        file.write_text(json.dumps({"active": 2}))
        wait_until(lambda: answering_version(client) == 2)
        assert client.get("/health/ready").json()["failed"] == []


def test_a_retired_version_finishes_its_running_requests(serve: Serve, tiny_store: Path) -> None:
    publish_tiny(tiny_store, "tiny-rnn")
    body = {"prompt": "a", "max_characters": 1500, "n": 16, "stream": True, "model": "tiny-rnn@1"}
    with (
        serve(store_poll_seconds=POLL_SECONDS) as client,
        client.stream("POST", "/v1/text/continue", json=body) as answer,
    ):
        chunks = answer.iter_bytes()
        first_chunk = next(chunks)
        Store(tiny_store).retire("tiny-rnn", 1)
        wait_until(lambda: client.get("/v1/models/tiny-rnn@1").status_code == 404)
        content = first_chunk + b"".join(chunks)
    assert content.count(b'"finish_reason":"length"') == 16
