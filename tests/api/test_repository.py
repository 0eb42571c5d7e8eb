"""Loading and unloading models in all processes, with the admin key and an unmodified tritonclient."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tritonclient.http as triton
from support.networks import publish_tiny
from support.processes import serving
from support.responses import ADMIN_HEADERS, ADMIN_KEY, metric_samples
from support.service import Serve, address, run_models_command
from support.tensors import SHAPES, infer_inputs
from tritonclient.utils import InferenceServerException

from app import store
from app.serving.preload import worker_bytes
from app.store import Store

NAME = "tiny-cgan"  # not the default model of the task, which is tiny-gan
SAMPLE = {"count": 1, "model": NAME, "seed": 4}


@pytest.fixture
def two(tiny_store: Path) -> Path:
    """Return a store with two versions of a model that is not the default of its task."""
    for _ in range(2):
        publish_tiny(tiny_store, NAME)
    return tiny_store


@pytest.fixture
def service(serve: Serve, two: Path) -> Iterator[httpx.Client]:
    with serve(admin_key=ADMIN_KEY) as client:
        yield client


def states(client: triton.InferenceServerClient, name: str = NAME) -> list[tuple[str, str, str]]:
    index = client.get_model_repository_index()
    return [(entry["version"], entry["state"], entry["reason"]) for entry in index if entry["name"] == name]


def test_descriptions_of_a_version_do_not_load_it(serve: Serve, two: Path) -> None:
    with serve(max_on_demand_versions=0) as client:
        for path in ("", "/config", "/ready", "/stats"):
            answer = client.get(f"/v2/models/{NAME}/versions/1{path}")
            assert answer.status_code == 200, (path, answer.text)
        assert client.get(f"/v1/models/{NAME}").json()["loaded"] == [2]


def test_the_client_unloads_and_loads_a_model(service: httpx.Client) -> None:
    before = service.post("/v1/images/sample", json=SAMPLE).raise_for_status().json()
    with triton.InferenceServerClient(address(service)) as client:
        assert "model_repository" in client.get_server_metadata()["extensions"]
        waiting = "available, but not in memory; the first request loads it"
        assert states(client) == [("1", "UNAVAILABLE", waiting), ("2", "READY", "")]
        client.infer(NAME, infer_inputs(NAME, True), model_version="1")  # loads the version
        assert states(client) == [("1", "READY", ""), ("2", "READY", "")]
        client.unload_model(NAME, headers=ADMIN_HEADERS)
        assert not client.is_model_ready(NAME)
        assert states(client) == [("1", "UNAVAILABLE", "unloaded"), ("2", "UNAVAILABLE", "unloaded")]
        with pytest.raises(InferenceServerException, match="model 'tiny-cgan' is unloaded and must be loaded first"):
            client.infer(NAME, infer_inputs(NAME, True))
        with pytest.raises(InferenceServerException, match="is unloaded"):
            client.infer(NAME, infer_inputs(NAME, True), model_version="1")
        samples = metric_samples(service)
        assert {samples["quartet_loaded_bytes", ("model", NAME), ("version", str(version))] for version in (1, 2)} == {
            0
        }
        client.unload_model(NAME, headers=ADMIN_HEADERS)  # no effect, because the model is already unloaded
        client.load_model(NAME, headers=ADMIN_HEADERS)
        assert client.is_model_ready(NAME)
        assert ("2", "READY", "") in states(client)
        assert client.infer(NAME, infer_inputs(NAME, True)).as_numpy("images").shape == SHAPES[NAME]["images"]
        client.load_model(NAME, headers=ADMIN_HEADERS)
    assert service.post("/v1/images/sample", json=SAMPLE).json() == before


def test_a_loaded_model_with_a_canary_answers_for_its_active_version(service: httpx.Client, two: Path) -> None:
    Store(two).activate(NAME, 1)
    Store(two).activate(NAME, 2, share=50)
    for _ in range(8):
        loaded = service.post(f"/v2/repository/models/{NAME}/load", json={}, headers=ADMIN_HEADERS)
        assert loaded.raise_for_status().json() == {"name": NAME, "version": "1", "load": True}


@pytest.mark.parametrize("damaged_at_start", [True, False])
def test_a_model_with_a_damaged_active_version_is_loaded_with_another_one(
    serve: Serve, two: Path, damaged_at_start: bool
) -> None:
    Store(two).activate(NAME, 1)
    Store(two).activate(NAME, 2)
    weights = two / NAME / "2" / store.WEIGHTS
    if damaged_at_start:
        weights.write_bytes(b"")
    with serve(admin_key=ADMIN_KEY) as client:
        for change in ("load", "unload", "load"):
            answer = client.post(f"/v2/repository/models/{NAME}/{change}", headers=ADMIN_HEADERS).raise_for_status()
            weights.write_bytes(b"")
        assert answer.json() == {"name": NAME, "version": "1", "load": True}
        for number in (1, 2):
            (two / NAME / str(number) / store.CARD).unlink()
        client.post(f"/v2/repository/models/{NAME}/unload", headers=ADMIN_HEADERS).raise_for_status()
        refused = client.post(f"/v2/repository/models/{NAME}/load", headers=ADMIN_HEADERS)
        assert (refused.status_code, "card.json cannot be read" in refused.json()["error"]) == (503, True)


def test_a_version_is_loaded_by_its_number(serve: Serve, two: Path) -> None:
    publish_tiny(two, NAME)
    with serve(admin_key=ADMIN_KEY) as client, triton.InferenceServerClient(address(client)) as triton_client:
        assert [state for _, state, _ in states(triton_client)] == ["UNAVAILABLE", "UNAVAILABLE", "READY"]
        triton_client.load_model(f"{NAME}@1", headers=ADMIN_HEADERS)
        assert [state for _, state, _ in states(triton_client)] == ["READY", "UNAVAILABLE", "READY"]


def test_a_version_that_cannot_be_loaded_leaves_its_model_unloaded(service: httpx.Client, two: Path) -> None:
    Store(two).retire(NAME, 1)
    service.post(f"/v2/repository/models/{NAME}/unload", headers=ADMIN_HEADERS).raise_for_status()
    for version in ("1", "9", "x"):
        refused = service.post(f"/v2/repository/models/{NAME}@{version}/load", headers=ADMIN_HEADERS)
        assert (refused.status_code, refused.json()["error"]) == (
            404,
            f"'{NAME}@{version}' cannot be loaded; versions that can be loaded: 2",
        )
    assert Store(two).rollout(NAME).unloaded


def test_a_running_text_is_completed_when_its_model_is_unloaded(serve: Serve, two: Path) -> None:
    publish_tiny(two, "tiny-rnn")
    (two / "defaults.json").write_text("{}")
    body = {"prompt": "a", "max_characters": 1500, "n": 16, "stream": True, "model": "tiny-rnn"}
    with serve(admin_key=ADMIN_KEY) as client, client.stream("POST", "/v1/text/continue", json=body) as answer:
        chunks = answer.iter_bytes()
        first_chunk = next(chunks)
        client.post("/v2/repository/models/tiny-rnn/unload", headers=ADMIN_HEADERS).raise_for_status()
        assert client.get("/v2/models/tiny-rnn/ready").status_code == 404
        content = first_chunk + b"".join(chunks)
    assert content.count(b'"finish_reason":"length"') == 16


def test_a_service_that_does_not_poll_its_store_rejects_changes(serve: Serve, two: Path) -> None:
    with serve(admin_key=ADMIN_KEY, store_poll_seconds=0) as client:
        rejected = client.post(f"/v2/repository/models/{NAME}/unload", headers=ADMIN_HEADERS)
        assert rejected.status_code == 409
        assert rejected.json()["error"].startswith("QUARTET_STORE_POLL_SECONDS is 0")
    assert not Store(two).rollout(NAME).unloaded


@pytest.mark.slow
def test_all_processes_load_and_unload_before_the_change_is_confirmed(two: Path) -> None:
    path = f"/v2/models/{NAME}"
    with serving(two, store_poll_seconds=60, admin_key=ADMIN_KEY) as service:  # no poll during the test
        clients = [httpx.Client(base_url=service.url, timeout=60) for _ in range(4)]  # distributed over both workers
        for _ in range(2):
            for change, ready in (("unload", 404), ("load", 200)):
                clients[0].post(f"/v2/repository/models/{NAME}/{change}", headers=ADMIN_HEADERS).raise_for_status()
                assert {client.get(f"{path}/ready").status_code for client in clients} == {ready}
                statuses = {client.post("/v1/images/sample", json=SAMPLE).status_code for client in clients}
                assert statuses == {ready}
        clients[0].post(f"/v2/repository/models/{NAME}/unload", headers=ADMIN_HEADERS).raise_for_status()
        assert {client.get(f"{path}/ready").status_code for client in clients} == {404}
        clients[0].post(f"/v2/repository/models/{NAME}/load", headers=ADMIN_HEADERS).raise_for_status()
        statuses = {client.post("/v1/images/sample", json=SAMPLE).status_code for client in clients}
        assert statuses == {200}  # a worker reads the store before it rejects a request
        for client in clients:
            client.close()


def test_the_command_line_unloads_and_loads_a_model(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_models_command(capsys, two, "unload", NAME) == (0, "tiny-cgan is unloaded\n", "")
    assert worker_bytes(two) < 101 * 2**20
    assert "2 (unloaded)" in run_models_command(capsys, two, "list", NAME)[1]
    assert run_models_command(capsys, two, "load", NAME) == (0, "tiny-cgan@2 is active (latest)\n", "")
