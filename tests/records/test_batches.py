"""OpenAI's files and batch jobs: with its client, with interruptions, and with keys."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI
from support.images import image_bytes
from support.service import Serve
from support.waiting import wait_until

from app import key_file
from app.records.batches import Batches, LeaseLost
from app.records.database import Database

COMPLETIONS = "/v1/completions"


def lines(count: int, url: str = COMPLETIONS, **body: Any) -> bytes:
    """Return an input: line i has the seed i."""
    rows = [{"custom_id": f"line-{i}", "method": "POST", "url": url, "body": {"seed": i, **body}} for i in range(count)]
    return "\n".join(map(json.dumps, rows)).encode()


def openai(client: httpx.Client, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0)


def finished(api: OpenAI, batch: str) -> Any:
    wait_until(lambda: api.batches.retrieve(batch).status not in ("validating", "in_progress", "cancelling"))
    return api.batches.retrieve(batch)


def test_the_openai_client_runs_a_batch_job(serve: Serve, tmp_path: Path) -> None:
    """The steps are those of OpenAI's guide to its Batch API."""
    path = tmp_path / "batch.jsonl"
    wrong = json.dumps({"custom_id": "wrong", "method": "POST", "url": COMPLETIONS, "body": {"temperature": -1}})
    path.write_bytes(lines(5, model="tiny-rnn", prompt="ab", max_tokens=4) + f"\n{wrong}\n".encode())
    with serve(records_folder=tmp_path / "records") as client, openai(client) as api:
        with path.open("rb") as file:
            uploaded = api.files.create(file=file, purpose="batch")
        made = api.batches.create(
            input_file_id=uploaded.id,
            endpoint=COMPLETIONS,
            completion_window="24h",
            metadata={"description": "nightly"},
        )
        batch = finished(api, made.id)
        counts = batch.request_counts
        assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 6, 5, 1)
        assert batch.metadata == {"description": "nightly"}
        output = [json.loads(line) for line in api.files.content(batch.output_file_id).text.splitlines()]
        assert [line["custom_id"] for line in output] == [f"line-{i}" for i in range(5)]
        for i, line in enumerate(output):
            live = api.completions.create(model="tiny-rnn", prompt="ab", max_tokens=4, seed=i)
            assert line["response"]["body"]["choices"][0]["text"] == live.choices[0].text
        (failed,) = (json.loads(line) for line in api.files.content(batch.error_file_id).text.splitlines())
        assert (failed["custom_id"], failed["response"]["status_code"]) == ("wrong", 400)
        assert "temperature is -1" in failed["response"]["body"]["error"]["message"]
        assert [each.id for each in api.batches.list().data] == [made.id]
        assert len(api.files.list().data) == 3
        assert api.files.delete(uploaded.id).deleted
        with pytest.raises(NotFoundError):
            api.files.retrieve(uploaded.id)


def test_large_bodies_are_read_and_wrong_ones_rejected(serve: Serve, tmp_path: Path) -> None:
    with serve(records_folder=tmp_path / "records", capture="tiny-rnn") as client:
        file = {"file": ("lines.jsonl", lines(2000, prompt="ab"))}
        uploaded = client.post("/v1/files", files=file, data={"purpose": "batch"})
        batch = client.post("/v1/batches", json={"input_file_id": "f" * 60_000, "endpoint": COMPLETIONS})
        feedback = client.post("/v1/feedback", json={"request_id": "unknown", "text": "a" * 90_000})
        no_form = client.post("/v1/files", content=b"")
    assert [each.status_code for each in (uploaded, batch, feedback, no_form)] == [200, 400, 404, 400]
    assert no_form.json()["error"]["message"] == "content-type is ''; send a form, multipart/form-data"
    assert "at most 100 characters" in batch.json()["error"]["message"]


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/images/sample", {"count": 1}),
        ("/v1/series/forecast", {"values": [1.0, 2.0] * 20, "horizon": 2}),
        ("/v1/images/classify", {"images": [__import__("base64").b64encode(image_bytes()).decode()]}),
    ],
)
def test_a_job_may_use_each_task(serve: Serve, tmp_path: Path, url: str, body: dict[str, Any]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    with serve(records_folder=tmp_path) as client, openai(client) as api:
        file = api.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = finished(api, api.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h").id)  # type: ignore[arg-type]
        assert batch.request_counts.completed == 1
        answer = json.loads(api.files.content(batch.output_file_id).text)["response"]["body"]
        expected = client.post(url, json=body).json()
        assert answer.keys() == expected.keys()


def test_invalid_lines_are_reported_and_nothing_is_sent(serve: Serve, tmp_path: Path) -> None:
    good = lines(1).decode()
    rows = [good, good, "no json", '{"custom_id": "b", "method": "GET", "url": "/v1/completions", "body": {}}',
            '{"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"stream": true}}']  # fmt: skip
    with serve(records_folder=tmp_path) as client, openai(client) as api:
        file = api.files.create(file=("a.jsonl", "\n".join(rows).encode()), purpose="batch")
        batch = finished(
            api, api.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h").id
        )
        assert batch.status == "failed"
        assert [(each.line, each.message.split(" ")[0]) for each in batch.errors.data] == [
            (2, "custom_id"), (3, "the"), (4, "method"), (5, "body")
        ]  # fmt: skip
        assert batch.output_file_id is None
        for body, message in (
            ({"input_file_id": "file-1"}, "there is no file 'file-1'"),
            ({"endpoint": "/v1/models"}, "endpoint is '/v1/models'; allowed values: /v1/images/classify"),
        ):
            full = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h", **body}
            answer = client.post("/v1/batches", json=full)
            assert (answer.status_code // 100, message in answer.text) == (4, True)
        answer = client.post("/v1/files", files={"file": b"x"}, data={"purpose": "fine-tune"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "purpose")


def test_only_a_missing_input_fails_a_job(serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(records_folder=tmp_path) as client, openai(client) as api:
        file = api.files.create(file=("a.jsonl", lines(1, max_tokens=1)), purpose="batch")
        stored = tmp_path / "files" / file.id
        content = stored.read_bytes()
        stored.unlink()
        stored.mkdir()  # cannot be read, as on a disk that fails
        waiting = api.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
        wait_until(lambda: "batch jobs: the records cannot be read" in caplog.text)
        assert client.get(f"/v1/files/{file.id}/content").status_code == 503
        stored.rmdir()
        stored.write_bytes(content)
        assert finished(api, waiting.id).status == "completed"
        stored.unlink()
        missing = api.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
        assert finished(api, missing.id).errors.data[0].message == f"the content of {file.id} is missing"


def test_a_job_survives_a_restart_and_is_cancelled(serve: Serve, tmp_path: Path) -> None:
    content = lines(40, model="tiny-rnn", max_tokens=200)
    with serve(records_folder=tmp_path) as client, openai(client) as api:
        file = api.files.create(file=("a.jsonl", content), purpose="batch")
        made = [
            api.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h").id
            for _ in range(2)
        ]
        wait_until(lambda: api.batches.retrieve(made[0]).request_counts.completed >= 3)
    with serve(records_folder=tmp_path) as client, openai(client) as api:
        assert api.batches.cancel(made[1]).status == "cancelling"
        batch = finished(api, made[0])
        output = [json.loads(line) for line in api.files.content(batch.output_file_id).text.splitlines()]
        assert [line["custom_id"] for line in output] == [f"line-{i}" for i in range(40)]
        assert finished(api, made[1]).status == "cancelled"
        answer = client.post(f"/v1/batches/{made[0]}/cancel")
        assert (answer.status_code, "is completed" in answer.text) == (409, True)


def test_keys_see_only_their_own_files_and_jobs(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    alice, bob = key_file.add(keys, "alice"), key_file.add(keys, "bob")
    with serve(records_folder=tmp_path / "records", keys_file=keys) as client:
        with openai(client, alice) as api:
            file = api.files.create(file=("a.jsonl", lines(1, max_tokens=1)), purpose="batch")
            batch = api.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
            assert finished(api, batch.id).request_counts.completed == 1
        with openai(client, bob) as api:
            assert (api.files.list().data, api.batches.list().data) == ([], [])
            with pytest.raises(NotFoundError):
                api.batches.retrieve(batch.id)
            with pytest.raises(NotFoundError):
                api.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")


def test_a_job_belongs_to_one_process_and_each_line_is_stored_once(tmp_path: Path, records_url: str) -> None:
    database = Database(tmp_path, records_url)
    database.open()
    first, second = Batches(database), Batches(database)
    file = first.add_file(None, "a", "batch", b"")
    first.add(None, file["id"], COMPLETIONS, {})
    claimed = first.claim()
    assert claimed
    batch = claimed[1]["id"]
    assert second.claim() is None
    first.add_line(batch, 1, "a", 200, '"first"')
    first.add_line(batch, 1, "a", 200, '"again"')
    with database.transaction() as rows:  # the process hangs for longer than its lease
        rows.execute("UPDATE api_objects SET lease = :lease", {"lease": time.time() - 1})
    assert second.claim()
    with pytest.raises(LeaseLost):
        first.add_line(batch, 2, "b", 200, '"late"')
    second.finish(None, batch, "completed")
    output = second.content(None, second.get(None, "batch", batch)["output_file_id"])
    assert [json.loads(line)["response"]["body"] for line in output.splitlines()] == ["first"]
    database.close()
