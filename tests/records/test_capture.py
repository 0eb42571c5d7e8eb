"""Captured requests, feedback on them, their figures, and the command that deletes them."""

from __future__ import annotations

import io
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.images import image_bytes
from support.networks import rewrite_card
from support.responses import CLASSIFY, CONTINUE, FORECAST, PNG, SAMPLE, ask, captures, metric_samples
from support.service import Serve
from support.waiting import wait_until

from app import key_file
from app.cli import capture as command
from app.main import create_app
from app.records.captured import Captured
from app.records.database import FILE, Database
from app.settings import Settings, SettingsError
from app.tasks.image_codecs import png
from training.data.image_lists import list_images

MODELS = "tiny-cnn,tiny-rnn,tiny-lstm"


def stored(folder: Path, table: str = "requests") -> list[Any]:
    with closing(sqlite3.connect(folder / FILE)) as rows:
        return rows.execute(f"SELECT * FROM {table}").fetchall()


def test_requests_of_all_tasks_are_captured_and_measured(serve: Serve, tmp_path: Path) -> None:
    folder, picture = tmp_path / "capture", PNG
    with serve(capture=MODELS, records_folder=folder) as client:
        best = ask(client, "image", CLASSIFY, content=picture).json()["results"][0]["predictions"]
        ask(client, "again", CLASSIFY, files=[("file", ("a.png", picture))] * 2)
        text = ask(client, "text", CONTINUE, json={"prompt": "a", "max_characters": 3}).json()
        ask(client, "stream", CONTINUE, json={"prompt": "a", "max_characters": 3, "stream": True})
        series = {"values": [1.0, 3.0] * 20, "horizon": 4, "levels": [80]}
        forecast = ask(client, "series", FORECAST, json=series).json()["results"][0]
        ask(client, "digits", SAMPLE, json={"count": 1})  # of a model that is not named
        wait_until(lambda: len(stored(folder)) == 5)

        right, wrong = best[0]["label"], best[1]["label"]
        median = forecast["median"]
        for body in (
            {"request_id": "image", "label": wrong},
            {"request_id": "image", "label": right},  # replaces the feedback before
            {"request_id": "again", "item": 1, "label": wrong},
            {"request_id": "text", "text": text["results"][0]["text"]},
            {"request_id": "stream", "accepted": False},
            {"request_id": "series", "values": [median[0] + 1, None, 1e9]},
            {"request_id": "series", "values": [median[3]], "first_step": 3},
        ):
            client.post("/v1/feedback", json=body).raise_for_status()
        wait_until(lambda: sum(row["count"] for row in client.get("/v1/feedback").json()["data"]) == 12)
        figures = {row["name"]: row for row in client.get("/v1/feedback").json()["data"]}
        samples = metric_samples(client)
        listed = {model["id"]: model.get("feedback") for model in client.get("/v1/models").json()["data"]}
    assert listed["tiny-cnn"] == [figures["accuracy"], figures["confidence"]]
    assert listed["tiny-gan"] is None
    assert figures["accuracy"] | {"interval": None} == {
        "model": "tiny-cnn", "version": 1, "name": "accuracy", "count": 2, "mean": 0.5, "interval": None
    }  # fmt: skip
    assert figures["accuracy"]["interval"] == pytest.approx([0.095, 0.905], abs=1e-3)  # Wilson's, from a table
    assert figures["confidence"]["mean"] == pytest.approx(best[0]["probability"], abs=1e-6)
    assert (figures["accepted"]["count"], figures["accepted"]["mean"]) == (2, 0.5)
    assert figures["coverage_80"]["count"] == figures["mase"]["count"] == 3
    assert figures["mase"]["mean"] == pytest.approx((1 + (1e9 - median[2]) + 0) / 2 / 3)  # values change by 2
    labels = ("figure", "accuracy"), ("model", "tiny-cnn"), ("version", "1")
    assert samples["quartet_feedback_mean", *labels] == 0.5
    assert samples["quartet_captured_requests_total", ("model", "tiny-cnn"), ("result", "stored")] == 2
    images = list((folder / "images").iterdir())
    assert len(images) == 1  # the same picture three times
    expected = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    assert np.array_equal(np.asarray(Image.open(images[0])), expected)


def test_feedback_that_does_not_fit_is_rejected(serve: Serve, tmp_path: Path) -> None:
    with serve(capture=MODELS, records_folder=tmp_path / "capture") as client:
        ask(client, "image", CLASSIFY, content=PNG)
        ask(client, "series", FORECAST, json={"values": [1.0, 2.0] * 20, "horizon": 3})
        wait_until(lambda: len(stored(tmp_path / "capture")) == 2)
        for body, status, message in (
            ({"request_id": "none", "label": "cat"}, 404, "there is no request 'none'"),
            ({"request_id": "image"}, 400, "the body has no truth"),
            ({"request_id": "image", "label": "cat", "accepted": True}, 400, "label and accepted"),
            ({"request_id": "image", "label": "unicorn"}, 400, "label is 'unicorn'; the model has "),
            ({"request_id": "image", "label": "cat", "item": 1}, 400, "item is 1; the answer has 1 items"),
            ({"request_id": "image", "accepted": True}, 400, "is for the task 'classify', which takes label"),
            ({"request_id": "series", "values": [1.0] * 9}, 400, "values has one for step 8; the forecast has 3 steps"),
        ):
            answer = client.post("/v1/feedback", json=body)
            assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text
        assert client.get("/v1/feedback").json() == {"data": []}


def test_without_a_model_nothing_is_captured_and_there_is_no_feedback(serve: Serve, tmp_path: Path) -> None:
    with serve(records_folder=tmp_path / "capture") as client:
        client.post(SAMPLE, json={}).raise_for_status()
        assert client.post("/v1/feedback", json={"request_id": "a", "label": "b"}).status_code == 404
        assert "/v1/feedback" not in client.get("/openapi.json").json()["paths"]
    assert stored(tmp_path / "capture") == []
    with pytest.raises(SettingsError, match="QUARTET_CAPTURE is 'pets', which needs QUARTET_RECORDS_FOLDER"):
        create_app(Settings(capture="pets"))
    with pytest.raises(SettingsError, match="QUARTET_CAPTURE has 'pets:200'"):
        create_app(Settings(capture="pets:200", records_folder=tmp_path))


def test_requests_are_deleted_by_id_by_key_and_by_age(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, keys = tmp_path / "capture", tmp_path / "keys"
    secrets = {name: key_file.add(keys, name) for name in ("alice", "bob")}
    with serve(capture="tiny-cnn", records_folder=folder, keys_file=keys) as client:
        for number, (name, size) in enumerate([("alice", (32, 32)), ("bob", (32, 32)), ("bob", (20, 32))]):
            headers = {"x-api-key": secrets[name]}
            ask(client, str(number), CLASSIFY, content=image_bytes(size=size), headers=headers)
        wait_until(lambda: len(stored(folder)) == 3)
        for name, status in (("bob", 404), ("alice", 200)):
            body = {"request_id": "0", "label": client.get("/v1/models/tiny-cnn", headers=headers).json()["labels"][0]}
            assert client.post("/v1/feedback", json=body, headers={"x-api-key": secrets[name]}).status_code == status
    content = b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())
    assert not any(key.encode() in content for key in secrets.values())
    images = folder / "images"
    for arguments, left, pictures in (
        (["--days", "1"], {"0", "1", "2"}, 2),
        (["--request", "2"], {"0", "1"}, 1),
        (["--key", "bob"], {"0"}, 1),
        (["--days", "0"], set(), 0),
    ):
        before = len(stored(folder))
        assert command.main(["delete", "--records", str(folder), *arguments]) == 0
        assert {row[0] for row in stored(folder)} == left
        assert capsys.readouterr().out == f"deleted {before - len(left)} requests\n"
        assert len(list(images.iterdir())) == pictures
    assert command.main(["list", "--records", str(tmp_path)]) == 1


def test_a_share_of_the_requests_is_captured(serve: Serve, tmp_path: Path) -> None:
    with serve(capture="tiny-rnn:50", records_folder=tmp_path) as client:
        for number in range(40):
            ask(client, str(number), CONTINUE, json={"max_characters": 1})
    assert 0 < len(stored(tmp_path)) < 40


def test_the_oldest_requests_are_deleted_beyond_the_limit(tmp_path: Path, records_url: str) -> None:
    database = Database(tmp_path / "capture", records_url)
    database.open()
    database.add([Captured(str(i), "m", 1, "continue", "a" * 2000, "{}", time=1e9 + i) for i in range(40)])
    size = database.size()
    database.trim(size // 2, 1e12)
    with database.transaction() as rows:
        left = {int(row.id) for row in rows.execute("SELECT id FROM requests")}
    assert left == set(range(40 - len(left), 40))
    assert size // 4 < database.size() <= size // 2
    database.close()


def test_a_damaged_file_is_moved_aside_and_the_service_goes_on(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database" * 1000)
    with serve(capture="tiny-rnn", records_folder=tmp_path) as client:
        ask(client, "a", CONTINUE, json={"max_characters": 1})
        wait_until(lambda: len(stored(tmp_path)) == 1)
    assert len(list(tmp_path.glob(f"{FILE}.damaged-*"))) == 1


def test_a_locked_file_loses_captures_and_no_request(serve: Serve, tmp_path: Path) -> None:
    with serve(capture="tiny-rnn", records_folder=tmp_path, captures_waiting=4) as client:
        with closing(sqlite3.connect(tmp_path / FILE)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(20):  # more than may wait
                ask(client, str(number), CONTINUE, json={"max_characters": 1})
        wait_until(lambda: captures(client, "tiny-rnn", "stored") + captures(client, "tiny-rnn", "dropped") == 20)
        assert 4 <= len(stored(tmp_path)) == captures(client, "tiny-rnn", "stored") <= 9


def test_a_disk_that_cannot_be_written_loses_captures_and_no_request(serve: Serve, tmp_path: Path) -> None:
    images = tmp_path / "images"
    with serve(capture="tiny-cnn", records_folder=tmp_path) as client:
        images.rmdir()
        images.touch()  # writing an image fails, as on a full disk
        ask(client, "lost", CLASSIFY, content=PNG)
        wait_until(lambda: captures(client, "tiny-cnn", "dropped") == 1)
        images.unlink()
        ask(client, "stored", CLASSIFY, content=PNG)
        wait_until(lambda: [row[0] for row in stored(tmp_path)] == ["stored"])


def test_requests_with_feedback_become_training_data(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "records", tmp_path / "data"

    def exported(model: str, count: int) -> str:
        assert command.main(["export", model, str(file), "--records", str(folder)]) == 0
        assert capsys.readouterr().out == f"{file}: {count} requests with feedback\n"
        return file.read_text()

    with serve(capture=MODELS, records_folder=folder) as client:
        labels = client.get("/v1/models/tiny-cnn").json()["labels"]
        for number in range(5):
            ask(client, str(number), CLASSIFY, content=image_bytes(size=(32, 20 + number)))
        ask(client, "series", FORECAST, json={"values": [1.0, 2.5] * 20, "horizon": 4})
        text = ask(client, "text", CONTINUE, json={"prompt": "ab", "max_characters": 3, "n": 2}).json()
        wait_until(lambda: len(stored(folder)) == 7)
        for body in (
            *({"request_id": str(number), "label": labels[number % 2]} for number in range(5)),
            {"request_id": "series", "values": [5.0, None, 7.0]},
            {"request_id": "text", "item": 0, "accepted": True},
            {"request_id": "text", "item": 1, "text": "right"},
        ):
            client.post("/v1/feedback", json=body).raise_for_status()
    exported("tiny-cnn", 5)
    images = list_images(file).images
    assert [image.labels for image in images] == [(labels[number % 2],) for number in range(5)]
    assert [image.part for image in images] == ["train"] * 4 + ["test"]
    assert {image.path.parent for image in images} == {folder / "images"}
    values = [*(["1.0", "2.5"] * 20), "5.0", "", "7.0"]
    assert exported("tiny-lstm", 1).splitlines() == ["series,value", *(f"series-0,{value}" for value in values)]
    assert exported("tiny-rnn", 1) == f"ab{text['results'][0]['text']}\n\nabright\n"
    assert command.main(["export", "other", str(file), "--records", str(folder)]) == 1
    assert capsys.readouterr().err == "error: no request of other has feedback\n"


def test_drift_is_reported_for_full_windows(
    serve: Serve, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reference may have features that this service does not compute."""
    histogram = {"edges": [128.0], "counts": [10, 0], "threshold": 0.5}
    series = {"edges": [0.5], "counts": [5, 5], "threshold": 0.25}
    for name, found in (
        ("tiny-cnn", {"brightness": histogram, "new": histogram}),
        ("tiny-lstm", {"level": series, "seasonality": series}),
        ("tiny-rnn", {"character": {"edges": [97.5], "counts": [5, 5], "threshold": 0.5}}),
    ):
        rewrite_card(tiny_store / name / "1", reference={"window": 4, "features": found})

    def drift(model: str) -> dict[str, float]:
        samples = metric_samples(client)
        return {
            dict(labels)["feature"]: value
            for (name, *labels), value in samples.items()
            if name == "quartet_drift" and ("model", model) in labels
        }

    def report(model: str) -> tuple[int, str]:
        options = ["--store", str(tiny_store), "--records", str(tmp_path)]
        return command.main(["drift", model, *options]), "".join(capsys.readouterr())

    dark, bright = (png(np.full((3, 32, 32), value, dtype=np.uint8)) for value in (10, 250))
    with serve(capture="tiny-cnn,tiny-lstm,tiny-rnn", records_folder=tmp_path) as client:
        client.post(CONTINUE, json={"prompt": "ab", "max_characters": 1}).raise_for_status()
        client.post(CLASSIFY, files=[("file", dark)] * 3).raise_for_status()
        wait_until(lambda: len(stored(tmp_path)) == 2)
        message = "error: tiny-cnn@1 has no drift; it needs 4 captured images, series or characters\n"
        assert (report("tiny-cnn"), drift("tiny-cnn")) == ((1, message), {})
        client.post(CLASSIFY, content=dark).raise_for_status()
        wait_until(lambda: drift("tiny-cnn") == {"brightness": 0.0})
        client.post(CLASSIFY, files=[("file", bright)] * 4).raise_for_status()
        huge = {"values": [1e300, -1e300] * 20, "horizon": 2}  # squares overflow
        client.post(FORECAST, json=huge).raise_for_status()
        rising = {"values": [0.0] * 30 + [100.0] * 10, "horizon": 2}
        for _ in range(3):
            client.post(FORECAST, json=rising).raise_for_status()
        wait_until(lambda: drift("tiny-cnn")["brightness"] > 1 and drift("tiny-lstm"))
        assert drift("tiny-cnn") == {"brightness": pytest.approx(2 * math.log(1.005 / 0.005) / 0.5)}
        one_sided = pytest.approx(0.5 * math.log(1.005 / 0.005) / 0.25)
        assert drift("tiny-lstm")["seasonality"] == one_sided
        assert report("tiny-rnn")[0] == 1  # two characters
        client.post(CONTINUE, json={"prompt": "abab", "max_characters": 1}).raise_for_status()
        wait_until(lambda: drift("tiny-rnn") == {"character": 0.0})
        client.post(CONTINUE, json={"prompt": "b" * 50, "max_characters": 1}).raise_for_status()
        wait_until(lambda: drift("tiny-rnn")["character"] > 1)
    assert report("tiny-cnn") == (0, "brightness    21.21  drift\n")
    assert report("tiny-gan") == (1, "error: tiny-gan@1 has no drift; it needs a reference\n")
