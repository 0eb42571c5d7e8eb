"""Several replicas share their records in PostgreSQL."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from openai import OpenAI
from support.images import image_bytes
from support.service import Serve
from support.waiting import wait_until

from app.cli import capture as command
from app.main import create_app
from app.settings import Settings, SettingsError

COMPLETIONS = "/v1/completions"


@pytest.mark.slow
def test_replicas_share_requests_feedback_and_jobs(
    serve: Serve,
    tmp_path: Path,
    postgres: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "records"
    options = {"capture": "tiny-cnn,tiny-rnn", "records_folder": folder, "records_url": postgres}
    names = [f"line \0 {i}" for i in range(30)]  # PostgreSQL has no texts with NUL
    lines = [
        {"custom_id": name, "method": "POST", "url": COMPLETIONS, "body": {"model": "tiny-rnn", "max_tokens": 20}}
        for name in names
    ]
    with serve(**options) as first, serve(**options) as second:
        label = first.get("/v1/models/tiny-cnn").json()["labels"][0]
        first.post("/v1/images/classify", content=image_bytes(), headers={"x-request-id": "a"}).raise_for_status()
        for _ in range(2):  # the second one replaces the first
            body = {"request_id": "a", "label": label}
            wait_until(lambda body=body: second.post("/v1/feedback", json=body).status_code == 200)
        wait_until(lambda: len(first.get("/v1/feedback").json()["data"]) == 2)
        assert {row["count"] for row in first.get("/v1/feedback").json()["data"]} == {1}

        with OpenAI(base_url=f"{second.base_url}/v1", api_key="none", max_retries=0) as api:
            file = api.files.create(file=("a.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
            made = [
                api.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h").id
                for _ in range(3)
            ]
            assert first.post(f"/v1/batches/{made[2]}/cancel").json()["status"] == "cancelling"
            jobs = {each["id"]: each for each in first.get("/v1/batches").json()["data"]}
            assert set(jobs) == set(made)
            for id in made:
                wait_until(lambda id=id: api.batches.retrieve(id).status in ("completed", "cancelled"))
            assert api.batches.retrieve(made[2]).status == "cancelled"
            for id in made[:2]:
                job = first.get(f"/v1/batches/{id}").json()
                assert job["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
                output = first.get(f"/v1/files/{job['output_file_id']}/content").text.splitlines()
                assert [json.loads(line)["custom_id"] for line in output] == names

    monkeypatch.setenv("QUARTET_RECORDS_URL", postgres)
    assert command.main(["list", "--records", str(folder)]) == 0
    assert "tiny-cnn@1  1 requests" in capsys.readouterr().out
    assert command.main(["delete", "--days", "0", "--records", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("deleted ")
    assert list((folder / "images").iterdir()) == []


def test_without_its_server_or_its_driver_a_database_gives_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "postgresql://quartet:secret@127.0.0.1:9/records"
    monkeypatch.setenv("QUARTET_RECORDS_URL", url)
    for message in ("the records cannot be read or written now", "needs the extra [postgres]"):
        with pytest.raises(SettingsError) as error:
            create_app(Settings(records_folder=tmp_path, records_url=url))
        assert command.main(["list", "--records", str(tmp_path)]) == 1
        for text in (str(error.value), capsys.readouterr().err):
            assert message in text
            assert "secret" not in text
        monkeypatch.setitem(sys.modules, "psycopg", None)
