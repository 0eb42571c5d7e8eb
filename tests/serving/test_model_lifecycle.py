"""Versions in a running service: canary, loading on demand, eviction, partial copies, damaged files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from support.networks import make_invalid, publish_tiny, rewrite_card
from support.responses import ADMIN_HEADERS, ADMIN_KEY, metric_samples
from support.service import Serve
from support.waiting import wait_until

from app.limits import Limits
from app.store import Store

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


def test_clients_cannot_load_every_version_or_evict_versions_in_use(serve: Serve, tiny_store: Path) -> None:
    for _ in range(3):
        publish_tiny(tiny_store, NAME)
    with serve(max_on_demand_versions=2) as client:
        assert [answering_version(client, f"{NAME}@{number}") for number in (1, 2, 1)] == [1, 2, 1]
        rejected = client.post("/v1/images/sample", json={"count": 1, "model": f"{NAME}@3"})
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (429, "too_many_versions")
        assert 1 <= int(rejected.headers["retry-after"]) <= 10
        assert model_entry(client)["loaded"] == [1, 2, 4]
    limits = replace(Limits(), model_in_use_seconds=0.0)
    loaded_bytes = ("quartet_loaded_bytes", ("model", NAME), ("version", "1"))
    with serve(max_on_demand_versions=1, limits=limits) as client:
        assert answering_version(client, f"{NAME}@1") == 1
        assert metric_samples(client)[loaded_bytes] == sum(
            tensor.nbytes for tensor in Store(tiny_store).read(NAME, 1).tensors.values()
        )
        assert answering_version(client, f"{NAME}@2") == 2
        assert model_entry(client)["loaded"] == [2, 4]
        assert metric_samples(client)[loaded_bytes] == 0


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


def test_the_admin_list_shows_the_versions_that_the_process_uses(serve: Serve, tiny_store: Path) -> None:
    folder = publish_tiny(tiny_store, NAME).folder
    make_invalid(folder)  # the card stays valid, so only loading finds the error
    with serve(admin_key=ADMIN_KEY, store_poll_seconds=3600) as client:

        def row() -> dict[str, object]:
            rows = client.get("/v1/admin/models", headers=ADMIN_HEADERS).raise_for_status().json()["data"]
            return next(row for row in rows if row["name"] == NAME)

        assert (row()["active"], row()["versions"], row()["task"]) == (1, [1, 2], "sample")
        publish_tiny(tiny_store, NAME)
        assert (row()["active"], row()["versions"]) == (3, [1, 2, 3])  # changes of the store are seen at once


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
