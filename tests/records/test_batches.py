"""OpenAI's files and batch jobs: with its client, with interruptions, and with keys."""

from __future__ import annotations

import base64
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


def start(api: OpenAI, content: bytes, url: Any = COMPLETIONS, **options: Any) -> Any:
    """Upload a file, and create a job for it."""
    file = api.files.create(file=("lines.jsonl", content), purpose="batch")
    return api.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h", **options)


def finished(api: OpenAI, job: Any) -> Any:
    wait_until(lambda: api.batches.retrieve(job.id).status not in ("validating", "in_progress", "cancelling"))
    return api.batches.retrieve(job.id)


def output(api: OpenAI, file: str) -> list[Any]:
    return [json.loads(line) for line in api.files.content(file).text.splitlines()]


def test_the_openai_client_runs_batch_jobs_of_all_tasks(serve: Serve, tmp_path: Path) -> None:
    """The steps are those of OpenAI's guide to its Batch API."""
    wrong = json.dumps({"custom_id": "wrong", "method": "POST", "url": COMPLETIONS, "body": {"temperature": -1}})
    content = lines(5, model="tiny-rnn", prompt="ab", max_tokens=4) + f"\n{wrong}\n".encode()
    bodies: dict[str, dict[str, Any]] = {
        "/v1/images/sample": {"count": 1},
        "/v1/series/forecast": {"values": [1.0, 2.0] * 20, "horizon": 2},
        "/v1/images/classify": {"images": [base64.b64encode(image_bytes()).decode()]},
    }
    with serve(records_folder=tmp_path / "records") as client, openai(client) as api:
        made = start(api, content, metadata={"description": "nightly"})
        others = []
        for url, body in bodies.items():
            line = {"custom_id": "a", "method": "POST", "url": url, "body": body}
            others.append(start(api, json.dumps(line).encode(), url))
        batch = finished(api, made)
        counts = batch.request_counts
        assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 6, 5, 1)
        assert batch.metadata == {"description": "nightly"}
        rows = output(api, batch.output_file_id)
        assert [row["custom_id"] for row in rows] == [f"line-{i}" for i in range(5)]
        for i, row in enumerate(rows):
            live = api.completions.create(model="tiny-rnn", prompt="ab", max_tokens=4, seed=i)
            assert row["response"]["body"]["choices"][0]["text"] == live.choices[0].text
        (failed,) = output(api, batch.error_file_id)
        assert (failed["custom_id"], failed["response"]["status_code"]) == ("wrong", 400)
        assert "temperature is -1" in failed["response"]["body"]["error"]["message"]
        for job, (url, body) in zip(others, bodies.items(), strict=True):
            (row,) = output(api, finished(api, job).output_file_id)
            assert row["response"]["body"].keys() == client.post(url, json=body).json().keys()
        assert [each.id for each in api.batches.list().data] == [each.id for each in (*reversed(others), made)]
        assert len(api.files.list().data) == 9  # four inputs, four outputs, and the errors
        assert api.files.delete(batch.input_file_id).deleted
        with pytest.raises(NotFoundError):
            api.files.retrieve(batch.input_file_id)


def test_invalid_lines_are_reported_and_invalid_requests_rejected(serve: Serve, tmp_path: Path) -> None:
    good = lines(1).decode()
    rows = [good, good, "no json", '{"custom_id": "b", "method": "GET", "url": "/v1/completions", "body": {}}',
            '{"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"stream": true}}']  # fmt: skip
    with serve(records_folder=tmp_path, capture="tiny-rnn") as client, openai(client) as api:
        batch = finished(api, start(api, "\n".join(rows).encode()))
        assert batch.status == "failed"
        assert [(each.line, each.message.split(" ")[0]) for each in batch.errors.data] == [
            (2, "custom_id"), (3, "the"), (4, "method"), (5, "body")
        ]  # fmt: skip
        assert batch.output_file_id is None
        job = {"input_file_id": batch.input_file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        for path, body, status, message in (
            ("/v1/batches", {"json": {**job, "input_file_id": "file-1"}}, 404, "there is no file 'file-1'"),
            ("/v1/batches", {"json": {**job, "input_file_id": "f" * 60_000}}, 400, "at most 100 characters"),
            ("/v1/batches", {"json": {**job, "endpoint": "/v1/models"}}, 400, "allowed values: /v1/images/classify"),
            ("/v1/files", {"files": {"file": b"x"}, "data": {"purpose": "fine-tune"}}, 400, "purpose is 'fine-tune'"),
            ("/v1/files", {"content": b""}, 400, "content-type is ''; send a form, multipart/form-data"),
            ("/v1/feedback", {"json": {"request_id": "unknown", "text": "a" * 90_000}}, 404, "there is no request"),
        ):
            answer = client.post(path, **body)  # type: ignore[arg-type]
            assert (answer.status_code, message in answer.text) == (status, True), answer.text


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
        missing = start(api, content)
        (tmp_path / "files" / missing.input_file_id).unlink()
        stored.write_bytes(content)
        assert finished(api, waiting).status == "completed"
        message = f"the content of {missing.input_file_id} is missing"
        assert finished(api, missing).errors.data[0].message == message


def test_a_job_survives_a_restart_and_is_cancelled(serve: Serve, tmp_path: Path) -> None:
    content = lines(40, model="tiny-rnn", max_tokens=200)
    with serve(records_folder=tmp_path) as client, openai(client) as api:
        made = [start(api, content) for _ in range(2)]
        wait_until(lambda: api.batches.retrieve(made[0].id).request_counts.completed >= 3)
    with serve(records_folder=tmp_path) as client, openai(client) as api:
        assert api.batches.cancel(made[1].id).status == "cancelling"
        rows = output(api, finished(api, made[0]).output_file_id)
        assert [row["custom_id"] for row in rows] == [f"line-{i}" for i in range(40)]
        assert finished(api, made[1]).status == "cancelled"
        answer = client.post(f"/v1/batches/{made[0].id}/cancel")
        assert (answer.status_code, "is completed" in answer.text) == (409, True)


def test_keys_see_only_their_own_files_and_jobs(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    alice, bob = key_file.add(keys, "alice"), key_file.add(keys, "bob")
    with serve(records_folder=tmp_path / "records", keys_file=keys) as client:
        with openai(client, alice) as api:
            batch = start(api, lines(1, max_tokens=1))
            assert finished(api, batch).request_counts.completed == 1
        with openai(client, bob) as api:
            assert (api.files.list().data, api.batches.list().data) == ([], [])
            with pytest.raises(NotFoundError):
                api.batches.retrieve(batch.id)
            with pytest.raises(NotFoundError):
                api.batches.create(input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h")


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
