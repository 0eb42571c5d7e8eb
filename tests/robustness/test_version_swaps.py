"""Versions change under load, and on a disk that is full or read-only.

The environment variables SWAPS and CALLERS set the numbers of repetitions. ``make swaps`` uses higher numbers.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.networks import publish_tiny
from support.processes import serving
from support.responses import ADMIN_HEADERS, ADMIN_KEY
from support.service import Serve, run_models_command
from support.waiting import wait_until

from app.store import Store, archive, catalogue

SWAPS, CALLERS = (int(os.environ.get(name, default)) for name, default in (("SWAPS", 6), ("CALLERS", 2)))
NAME = "tiny-rnn"
BODY = {"prompt": "abc", "max_characters": 30, "seed": 1}


def keep_asking(url: str, expected: dict[int, str], stop: threading.Event) -> tuple[int, list[str]]:
    """Send requests until ``stop`` is set. Return the number of answers, and the wrong ones."""
    answers, wrong = 0, []
    with httpx.Client(timeout=60) as client:
        while not stop.is_set():
            pinned = (None, None, 1, 2)[answers % 4]
            answer = client.post(url, json={**BODY, "model": f"{NAME}@{pinned}" if pinned else NAME})
            answers += 1
            version = answer.json().get("version")
            if pinned not in (None, version) or version_text(answer) != expected.get(version):
                wrong.append(answer.text)
    return answers, wrong


def version_text(answer: httpx.Response) -> str:
    return str(answer.raise_for_status().json()["results"][0]["text"])


def test_version_changes_under_load_give_no_failed_or_mixed_up_answer(tiny_store: Path) -> None:
    for _ in range(2):
        publish_tiny(tiny_store, NAME)
    stop = threading.Event()
    with serving(tiny_store, store_poll_seconds=0.1) as service, ThreadPoolExecutor(CALLERS) as pool:
        url = f"{service.url}/v1/text/continue"
        expected = {
            number: version_text(httpx.post(url, json={**BODY, "model": f"{NAME}@{number}"}, timeout=60))
            for number in (1, 2, 3)
        }
        assert len(set(expected.values())) == 3
        callers = [pool.submit(keep_asking, url, expected, stop) for _ in range(CALLERS)]
        try:
            for index in range(SWAPS):
                swap(tiny_store, url, index)
        finally:
            stop.set()
        for caller in callers:
            answers, wrong = caller.result()
            assert answers >= SWAPS
            assert not wrong


def swap(folder: Path, url: str, index: int) -> None:
    """Activate another version or roll back. Return as soon as every worker serves it."""
    active = Store(folder).roles(NAME).active or 0
    state = Store(folder).rollback(NAME) if index % 3 == 2 else Store(folder).activate(NAME, active % 3 + 1)

    def all_workers_follow() -> bool:  # four connections reach every worker
        versions = {httpx.post(url, json=BODY, timeout=60).json()["version"] for _ in range(4)}
        return versions == {state.active}

    wait_until(all_workers_follow)


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


@pytest.mark.parametrize("problem", ["No space left on device", "Read-only file system"])
def test_a_full_or_read_only_disk_is_served_and_rejects_changes_with_a_message(
    tiny_store: Path, tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str], problem: str
) -> None:
    publish_tiny(tiny_store, "tiny-gan")
    Store(tiny_store).activate("tiny-gan", 2)
    with mounted(tmp_path / "disk", tiny_store, "1m") as disk:
        before = visible(disk)
        content = b"".join(archive.export_version(Store(disk), "tiny-cnn", 1))
        if problem.startswith("Read-only"):
            subprocess.run(["mount", "-o", "remount,ro", disk.parent], check=True)
        with pytest.raises(OSError, match=problem):
            (disk.parent / "filler").write_bytes(bytes(2 * 2**20))
        with pytest.raises(OSError, match=problem):
            publish_tiny(disk, "tiny-cnn")
        message = f"the store cannot be read or written: {problem}"
        assert run_models_command(capsys, disk, "activate", "tiny-gan", "1") == (1, "", f"error: {message}\n")
        with serve(store=disk, admin_key=ADMIN_KEY) as client:
            client.headers.update(ADMIN_HEADERS)
            assert client.get("/v1/admin/models/tiny-cnn/export").content == content
            for path, body in (
                ("import?renumber=true", {"content": content}),
                ("models/tiny-gan/activate", {"json": {"version": 1}}),
            ):
                answer = client.post(f"/v1/admin/{path}", **body)  # type: ignore[arg-type]
                assert (answer.status_code, answer.json()["error"]["message"]) == (507, message)
            assert client.post("/v1/images/sample", json={"count": 1}).json()["version"] == 2
        assert visible(disk) == before
        assert not [row for row in catalogue.verify(Store(disk)) if row["problem"]]
        if problem.startswith("No space"):
            (disk.parent / "filler").unlink()
            assert run_models_command(capsys, disk, "activate", "tiny-gan", "1")[0] == 0
