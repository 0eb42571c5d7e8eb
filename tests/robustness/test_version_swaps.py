"""Versions change under load, and on a disk that is full or read-only.

The environment variables SWAPS and CALLERS set the numbers of repetitions. ``make swaps`` uses higher numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.networks import publish_tiny
from support.processes import TIMEOUT_SECONDS, serving
from support.service import Serve, run_models_command
from support.waiting import wait_until

from app.store import Store, archive, catalogue

SWAPS, CALLERS = (int(os.environ.get(name, default)) for name, default in (("SWAPS", 6), ("CALLERS", 2)))
NAME = "tiny-rnn"
BODY = {"prompt": "abc", "max_characters": 30, "seed": 1}

CALLER = """
import json, sys, threading
import httpx
url, body, expected = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
answers, wrong, versions = 0, [], set()
with httpx.Client(timeout=60) as client:
    while not stop.is_set():
        pinned = [None, None, "1", "2"][answers % 4]
        model = f"tiny-rnn@{pinned}" if pinned else "tiny-rnn"
        answer = client.post(url, json={**body, "model": model})
        answers += 1
        if answers == 1:
            print("started", flush=True)
        content = answer.json() if answer.status_code == 200 else {"version": answer.text, "results": [{"text": ""}]}
        version, text = str(content["version"]), content["results"][0]["text"]
        versions.add(version)
        if text != expected.get(version) or pinned not in (None, version):
            wrong.append([model, version, text])
print(json.dumps({"answers": answers, "wrong": wrong[:5], "versions": sorted(versions)}))
"""


def test_version_changes_under_load_give_no_failed_or_mixed_up_answer(
    tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        publish_tiny(tiny_store, NAME)
    with serving(tiny_store, store_poll_seconds=0.5) as service:
        url = f"{service.url}/v1/text/continue"
        answers_by_version = [
            httpx.post(url, json={**BODY, "model": f"{NAME}@{number}"}, timeout=60).json() for number in (1, 2, 3)
        ]
        expected = {str(answer["version"]): answer["results"][0]["text"] for answer in answers_by_version}
        assert len(set(expected.values())) == 3
        command = [sys.executable, "-c", CALLER, url, json.dumps(BODY), json.dumps(expected)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        callers = [subprocess.Popen(command, **pipes) for _ in range(CALLERS)]  # type: ignore[call-overload]
        for caller in callers:
            assert caller.stdout.readline() == "started\n"
        swap_seconds = [swap(tiny_store, url, i) for i in range(SWAPS)]
        reports = [json.loads(caller.communicate(timeout=TIMEOUT_SECONDS)[0]) for caller in callers]
    assert [report["wrong"] for report in reports] == [[]] * CALLERS
    assert all(report["answers"] > 0 and set(report["versions"]) <= {"1", "2", "3"} for report in reports)
    with capsys.disabled():
        answers = sum(report["answers"] for report in reports)
        print(f"\n{SWAPS} swaps, {answers} answers; until all workers follow: {max(swap_seconds):.2f} s at most")


def swap(folder: Path, url: str, index: int) -> float:
    """Activate another version or roll back, under load. Return the seconds until every worker serves it."""
    active = Store(folder).roles(NAME).active or 0
    started = time.monotonic()
    state = Store(folder).rollback(NAME) if index % 3 == 2 else Store(folder).activate(NAME, active % 3 + 1)

    def all_workers_follow() -> bool:  # four connections reach every worker
        versions = {httpx.post(url, json=BODY, timeout=60).json()["version"] for _ in range(4)}
        return versions == {state.active}

    wait_until(all_workers_follow)
    return time.monotonic() - started


@contextmanager
def mounted(folder: Path, source: Path, size: str) -> Iterator[Path]:
    """Mount a small file system with a copy of a store. Without permission to mount, skip the test."""
    folder.mkdir()
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if result.returncode:
        pytest.skip(f"cannot mount a file system: {result.stderr.decode().strip()}")
    try:
        subprocess.run(["cp", "-r", source, folder / "store"], check=True)
        yield folder / "store"
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def visible(folder: Path) -> list[Path]:
    """Return the files and folders that readers of the store do not ignore."""
    return sorted(path for path in folder.rglob("*") if not path.name.startswith("."))


def test_a_full_disk_gives_an_error_and_changes_nothing(
    tiny_store: Path, tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_tiny(tiny_store, "tiny-gan")
    Store(tiny_store).activate("tiny-gan", 2)
    archive_path = tmp_path / "gan.zip"
    archive_path.write_bytes(b"".join(archive.export_version(Store(tiny_store), "tiny-cnn", 1)))
    with mounted(tmp_path / "disk", tiny_store, "1m") as disk:
        before = visible(disk)
        filler = disk.parent / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(2 * 2**20))
        with pytest.raises(OSError, match="No space left"):
            publish_tiny(disk, "tiny-cnn")
        status, _, error = run_models_command(capsys, disk, "activate", "tiny-gan", "1")
        assert (status, error) == (1, "error: the store cannot be read or written: No space left on device\n")
        with serve(store=disk, admin_key="k" * 32, store_poll_seconds=0.02) as client:
            client.headers["authorization"] = f"Bearer {'k' * 32}"
            answer = client.post("/v1/admin/import?renumber=true", content=archive_path.read_bytes())
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "store_unavailable")
            assert str(disk) not in answer.text
            assert client.post("/v1/images/sample", json={"count": 1}).json()["version"] == 2
            assert visible(disk) == before
            assert not [row for row in catalogue.verify(Store(disk)) if row["problem"]]
            filler.unlink()
            assert client.post("/v1/admin/models/tiny-gan/activate", json={"version": 1}).status_code == 200
            wait_until(lambda: client.post("/v1/images/sample", json={"count": 1}).json()["version"] == 1)


def test_a_read_only_store_is_served_and_rejects_changes_with_a_message(
    tiny_store: Path, tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", tiny_store, "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk.parent], check=True)
        status, _, error = run_models_command(capsys, disk, "activate", "tiny-gan", "1")
        assert (status, error) == (1, "error: the store cannot be read or written: Read-only file system\n")
        with serve(store=disk, admin_key="k" * 32) as client:
            client.headers["authorization"] = f"Bearer {'k' * 32}"
            content = client.get("/v1/admin/models/tiny-gan/export?version=1").content
            assert content == b"".join(archive.export_version(Store(disk), "tiny-gan", 1))  # has the times of the files
            for path, body in (
                ("import", {"content": content}),
                ("models/tiny-gan/activate", {"json": {"version": 1}}),
            ):
                answer = client.post(f"/v1/admin/{path}", **body)  # type: ignore[arg-type]
                assert (answer.status_code, answer.json()["error"]["message"]) == (
                    507,
                    "the store cannot be read or written: Read-only file system",
                )
            assert client.post("/v1/images/sample", json={"count": 1}).status_code == 200
    assert Store(tiny_store).defaults()["sample"] == "tiny-gan"
